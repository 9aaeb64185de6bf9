"""Full back-propagation through many blocks: peak memory, time and gradients, with and without rematerialization.

    python -m examples.benchmarks.backpropagation --blocks 64 --backends jax,torch,tensorflow --out out/memory.json

One fresh process per backend and method; each runs a few train steps (SGD) on one sequence. The methods: "plain";
"layer", where each layer is rematerialized as a whole (`keras.remat` around the layer, the usual gradient
checkpointing); "block" (`remat=True, blocks_per_step=1`) and "steps of n" (`remat=True, blocks_per_step=n`), which keep
only the states at the boundaries of steps; "layers in steps of n" (`remat="layers"`), which also rematerializes each
layer of a step. Peak memory is that of the whole process, and what the train steps add to it; on JAX also the temporary
memory reported by the compiler (`memory_analysis`). Gradients are compared with the plain ones: with the large learning
rate of SGD, the change of the weights is the gradient.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

MODULE = "examples.benchmarks.backpropagation"
RATE = 1e4


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backends", default="jax,torch,tensorflow")
    parser.add_argument("--ways", default="plain,layer,block,steps of 4,steps of 8")
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--memory-segments", type=int, default=1)
    parser.add_argument("--fam-length", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--worker", default=None, help="internal: one method in this process")
    return parser.parse_args(argv)


def options(way, blocks):
    if way == "plain":
        return {}
    if way == "layer":  # one step over all blocks
        return {"remat": "layers", "blocks_per_step": blocks}
    steps = {"remat": True, "blocks_per_step": 1 if way == "block" else int(way.split()[-1])}
    if way.startswith(
        "layers"
    ):  # without a loop over layers, XLA on a CPU merges the recomputation with the forward pass
        steps |= {"remat": "layers", "scan_layers": os.environ.get("KERAS_BACKEND") == "jax"}
    return steps


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(args):
    """Measures one method in this process: prints a line of JSON and saves the gradients."""
    import keras

    import keras_fam

    keras.utils.set_random_seed(0)
    backbone = keras_fam.TransformerFAMBackbone(
        args.vocabulary,
        args.layers,
        args.width,
        args.width // 64,
        4 * args.width,
        block_size=args.block_size,
        memory_segments=args.memory_segments,
        fam_length=args.fam_length,
        **options(args.worker, args.blocks),
    )
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.build()
    lm.compile(keras.optimizers.SGD(RATE), weighted_metrics=[])
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, args.vocabulary, (args.batch, args.blocks * args.block_size + 1)).astype("int32")
    x, y = tokens[:, :-1], tokens[:, 1:]
    result = {"way": args.worker, "backend": keras.backend.backend(), "before_mib": peak_mib()}
    weights = [keras.ops.convert_to_numpy(v).copy() for v in lm.trainable_variables]
    lm.train_on_batch(x, y)
    after = [keras.ops.convert_to_numpy(v) for v in lm.trainable_variables]
    np.savez(args.out, *[(a - b) / RATE for a, b in zip(after, weights, strict=True)])
    seconds = []
    for _ in range(args.repeats):
        for variable, value in zip(lm.trainable_variables, weights, strict=True):
            variable.assign(value)
        started = time.perf_counter()
        lm.train_on_batch(x, y)
        seconds.append(time.perf_counter() - started)
    result.update(peak_mib=peak_mib(), step_seconds=median(seconds))
    result["added_mib"] = result["peak_mib"] - result["before_mib"]
    if result["backend"] == "jax":
        result["compiled_temp_mib"] = compiled_temp_mib(lm, x, y)
    print(json.dumps(result), flush=True)


def compiled_temp_mib(lm, x, y):
    """Temporary memory of loss and gradients as reported by XLA."""
    import jax

    def loss(trainable, rest, x, y):
        logits, _ = lm.stateless_call(trainable, rest, x, training=True)
        return lm.compute_loss(x, y, logits)

    trainable = [v.value for v in lm.trainable_variables]
    rest = [v.value for v in lm.non_trainable_variables]
    compiled = jax.jit(jax.grad(loss)).lower(trainable, rest, x, y).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def run(argv, backend, way, folder):
    gradients = Path(folder) / "gradients.npz"
    command = [sys.executable, "-m", MODULE, *argv, "--worker", way, "--out", str(gradients)]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{backend}, {way}:\n{done.stderr[-4000:]}")
    with np.load(gradients) as found:
        return json.loads(done.stdout.strip().splitlines()[-1]), [found[name] for name in found.files]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    if args.worker:
        return worker(args)
    rows = []
    for backend in args.backends.split(","):
        plain = None
        for way in args.ways.split(","):
            with tempfile.TemporaryDirectory() as folder:
                result, gradients = run(argv, backend, way, folder)
            plain = plain or (result, gradients)
            result["gradient_difference"] = max(
                float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(gradients, plain[1], strict=True)
            )
            result["time_ratio"] = result["step_seconds"] / plain[0]["step_seconds"]
            result["memory_ratio"] = result["added_mib"] / plain[0]["added_mib"]
            rows.append(result)
            temp = f", compiled temp {result['compiled_temp_mib']:.0f} MiB" if "compiled_temp_mib" in result else ""
            print(
                f"{backend:<11}{way:<21} peak {result['peak_mib']:6.0f} MiB, added {result['added_mib']:6.0f}{temp}; "
                f"step {result['step_seconds']:.2f} s ({result['time_ratio']:.2f}); gradients differ by "
                f"{result['gradient_difference']:.1e}",
                flush=True,
            )
    if args.out:
        from examples.record import run_record

        report = {"rows": rows, **run_record(MODULE, args, argv)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
