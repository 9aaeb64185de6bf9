"""Training in two processes on each engine: the losses of one process, and checkpoints that another number resumes.

    python -m examples.distributed.processes torch         # Keras' fit, DDP and FSDP
    python -m examples.distributed.processes jax --float64 # keras.distribution, 4 simulated devices in each process
    python -m examples.distributed.processes tensorflow    # MultiWorkerMirroredStrategy

Starts the processes on this machine and compares three things with one process on one device: training with Random
State Passing at p = 0.5, training on carried state over documents whose rows are divided over the processes, and that
training cut in three: begun by two processes, resumed by one, ended by two. What one process of an engine does is in
`jax_processes.py`, `torch_processes.py` and `tf_processes.py`, which several machines can run. `--float64` tells
rounding from anything else: on JAX, which also divides heads and vocabulary, a memory that is passed on from step to
step has, in float32, sums in another order too many for the bound.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile

import numpy as np

from examples.distributed.common import DECIMALS, same_to
from examples.distributed.starting import start

MODULES = {"jax": "jax_processes", "torch": "torch_processes", "tensorflow": "tf_processes"}
LEFT = 1e-4  # of the largest number: rounding grows in a memory that is passed on from step to step
COMPARED = ("training, RSP 0.5", "after: passed memory", "training, carried state", "after: carried state")


def runs(engine, processes, steps, options, folder, run_one=None, timeout=600):
    """The results of one process and of several, by variant; "resumed" are the losses of the three parts in one list.

    Args:
        engine: a key of `MODULES`.
        processes: int, processes beside one.
        steps: int, a multiple of 3; a third each is run by several, by one, and by several processes.
        options: list of str, for every process.
        folder: `pathlib.Path`, for checkpoints.
        run_one: None, or a function of options that stands in for the run of one process.
        timeout: seconds for each start.
    """
    module, options = MODULES[engine], [*options, "--steps", str(steps)]
    both = ["--phases", "passing", "carried"]
    many = start(module, processes, [*options, *both, str(steps // 3)], folder, timeout)
    middle = [*options, *both, str(2 * steps // 3)]
    one = start(module, 1, middle, folder, timeout) if run_one is None else run_one(middle)
    end = start(module, processes, [*options, "--phases", str(steps)], folder, timeout)
    for variant, found in many.items():
        parts = (found, one[variant], end[variant])
        found["resumed"] = [loss for part in parts for loss in part.pop("resumed")]
    return next(iter(one.values())), many


def differences(one, found):
    """The largest difference of each quantity from one process: of losses in absolute terms, else relative."""
    largest = {}
    for what in COMPARED:
        expected, values = np.asarray(one[what], "float64"), np.asarray(found[what], "float64")
        scale = np.abs(expected).max() if what.startswith("after") else 1.0
        largest[what] = float(np.abs(values - expected).max() / scale)
    resumed = np.asarray(found["resumed"]) - np.asarray(one["training, carried state"])
    return {**largest, "resumed": float(np.abs(resumed).max())}


def agree(largest):
    """Whether losses agree to `DECIMALS` decimals, and memory and state after training to `LEFT`."""
    return all(d <= (LEFT if what.startswith("after") else same_to(DECIMALS)) for what, d in largest.items())


def show(variant, processes, one, found, largest):
    """Prints the losses of one process beside those of several, and the differences."""
    print(f"\n{variant}")
    columns = {"training, RSP 0.5": ("one process", f"{processes} processes")}
    columns["training, carried state"] = (*columns["training, RSP 0.5"], f"{processes} → 1 → {processes}")
    for what, names in columns.items():
        print(f"{what:30}" + "".join(f"{name:>16}" for name in names))
        losses = [one[what], found[what], found["resumed"]][: len(names)]
        for i, row in enumerate(zip(*losses, strict=True)):
            print(f"{'step ' + str(i + 1):>30}" + "".join(f"{loss:16.7f}" for loss in row))
    for what, difference in largest.items():
        kind = "largest relative difference" if what.startswith("after") else "largest difference"
        print(f"{what:30}{kind:>28} {difference:.1e}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=MODULES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="a multiple of 3")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--float64", action="store_true", help="computes in float64; JAX only")
    parser.add_argument(
        "--variants", nargs="+", help="ways of training; all that the engine's module knows if not given"
    )
    parser.add_argument("--timeout", type=int, default=600, help="seconds for each of the three starts")
    parser.add_argument("--json", type=pathlib.Path, help="a file to record losses and differences in")
    args = parser.parse_args(argv)
    if args.steps % 3:
        parser.error("--steps must be a multiple of 3")
    if args.float64 and args.engine != "jax":
        parser.error("--float64 is an option of JAX, whose memories need it; the other engines agree in float32")
    os.environ["KERAS_BACKEND"] = args.engine
    with tempfile.TemporaryDirectory() as folder:
        options = ["--layers", str(args.layers), *(["--variants", *args.variants] if args.variants else [])]
        options += ["--float64"] if args.float64 else []
        one, many = runs(args.engine, args.processes, args.steps, options, pathlib.Path(folder), timeout=args.timeout)
    largest = {variant: differences(one, found) for variant, found in many.items()}
    for variant, found in many.items():
        show(variant, args.processes, one, found, largest[variant])
    same = all(map(agree, largest.values()))
    print(f"\n{'the same' if same else 'NOT the same'} to {DECIMALS} decimals")
    if args.json:
        from examples.record import run_record

        losses = {"one process": _losses(one), **{variant: _losses(found) for variant, found in many.items()}}
        record = {**run_record("examples.distributed.processes", args, argv), "same": same}
        args.json.write_text(json.dumps({**record, "largest_difference": largest, "losses": losses}, indent=1) + "\n")
    sys.exit(0 if same else 1)


def _losses(found):
    return {what: values for what, values in found.items() if not what.startswith("after")}


if __name__ == "__main__":
    main()
