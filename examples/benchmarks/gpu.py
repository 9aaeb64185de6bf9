"""TransformerFAM on one GPU: prefill, train step and decode, against BSWA and against full attention.

    python -m examples.benchmarks.gpu --out gpu.json              # JAX and torch, whatever is installed; about an hour
    python -m examples.benchmarks.gpu --small                     # everything at small sizes, on a CPU, in a minute

The model has the shape of the paper's 1B (18 layers, width 1536, 12 heads, S 1024, m 3, F 64) and random weights, in
bfloat16. Systems: `fam`; `inputs`, with the memory of converted models (`fam_query="layer_inputs"`); `bswa`, without
memory; `full`, the same width and depth with full attention through the backend's fused kernel, up to `--longest-full`
tokens. Each task of a system runs in its own process, shortest inputs first, so that the peak memory after an input is
that of the input. Running out of memory and other failures are reported.

prefill: T tokens of one row, in bfloat16 weights; the last hidden state is fetched. FAM and BSWA read one
    chunk at a time, full attention reads all tokens at once, without keeping caches.
train: one step with Adafactor (mixed bfloat16, remat; cross-entropy over the whole vocabulary, in pieces).
decode: one token after a context, `--rows` rows; full attention has a cache of that size.

`share` is the throughput of the model's arithmetic (matrix products of the forward pass; three times that for training,
without rematerialization) relative to that of one large bfloat16 matrix product in the same process. Times are medians
of `--repeats` calls, or of as many as fit into `--seconds`, after a first call that compiles (decoding on torch: after
the calls before a graph is traced).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from examples.benchmarks.gpu_tasks import SYSTEMS, TASKS, matrix_throughput, work_per_token
from examples.benchmarks.measuring import seconds

K = 1024
SIZES = {
    "prefill": [8 * K, 32 * K, 128 * K, 256 * K, 1024 * K],
    "train": [32 * K, 128 * K],
    "decode": [32 * K, 128 * K],
}
SMALL = {"prefill": [64, 256], "train": [64], "decode": [64]}
RESULT = "result: "  # prefix of the output lines with results


def peak_bytes():
    """Peak memory of the device; None if the backend does not report it (CPUs)."""
    if os.environ["KERAS_BACKEND"] == "torch":
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def device_name():
    if os.environ["KERAS_BACKEND"] == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    import jax

    return jax.local_devices()[0].device_kind


def measure(args, lengths):
    """Yields the results of one task of one system."""
    from keras_fam.ops.torch_graph import WARMUP_CALLS

    throughput, backend = matrix_throughput(args.small), os.environ["KERAS_BACKEND"]
    at = TASKS[args.task](args)
    for length in lengths:
        run = at(length)
        compiling = seconds(run)
        if args.task == "decode":  # torch traces its graph after some calls
            for _ in range(WARMUP_CALLS):
                run()
        times, most = [], args.repeats * (16 if args.task == "decode" else 1)
        while len(times) < most and sum(times) <= args.seconds:
            times.append(seconds(run))
        taken = median(times)
        tokens = args.rows if args.task == "decode" else length
        work = tokens * work_per_token(args, length, args.task == "decode") * (3 if args.task == "train" else 1)
        yield {
            "length": length,
            "device": device_name(),
            "seconds": taken,
            "all_seconds": times,
            "first_call_seconds": compiling,
            "tokens_per_second": tokens / taken,
            "peak_bytes": peak_bytes(),
            "matrix_product_per_second": throughput,
            "share": work / taken / throughput,
            "versions": {name: metadata.version(name) for name in ("keras", backend)},
        }


def run_child(argv, backend, system, task, lengths):
    """Yields the results of `measure` in a new process; a result with `"error"` for the length at which it fails."""
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, "KERAS_BACKEND": backend, "PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        "-m",
        "examples.benchmarks.gpu",
        *argv,
        "--child",
        ",".join(map(str, lengths)),
        "--system",
        system,
    ]
    lines, found = [], 0
    with subprocess.Popen(
        [*command, "--task", task], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        for line in child.stdout:
            if line.startswith(RESULT):
                found += 1
                yield json.loads(line.removeprefix(RESULT))
            elif line.strip():
                lines.append(line.strip())
    if found < len(lengths):
        lines = lines or [f"exit status {child.returncode}"]
        memory = [line for line in lines if "out of memory" in line.lower() or "RESOURCE_EXHAUSTED" in line]
        error = "out of memory: " + memory[0] if memory else lines[-1]
        yield {"length": lengths[found], "error": error[:300]}


def row(result):
    name = f"{result['backend']:6}{result['task']:9}{result['system']:6}{result['length']:>9}"
    if "error" in result:
        return f"{name}  {result['error']}"
    peak = "-" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**30:.1f}"
    speed = f"{result['seconds'] * 1e3:11.1f} ms{result['tokens_per_second']:12.0f} /s"
    return f"{name}{speed}{100 * result['share']:8.1f} %{peak:>8}"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="jax,torch", help="of which those that are installed are used")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--tasks", default="prefill,train,decode")
    parser.add_argument("--small", action="store_true", help="small model and inputs, for a CPU")
    parser.add_argument("--lengths", help="tokens for all tasks, instead of the defaults")
    parser.add_argument("--rows", type=int, default=1, help="rows that decode together")
    parser.add_argument("--blocks-per-step", type=int, default=8, help="blocks that a prefill reads at a time")
    parser.add_argument("--train-blocks", type=int, default=2, help="blocks between checkpoints of a train step")
    parser.add_argument("--memory-update", choices=("residual", "normalized"), default="residual")
    parser.add_argument("--longest-full", type=int, default=256 * K, help="most tokens read with full attention")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls (of a token: 16 times as many)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time after which no call is started")
    parser.add_argument("--out", type=Path, help="where to write a JSON file")
    for name in ("child", "system", "task"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        for result in measure(args, map(int, args.child.split(","))):
            print(RESULT + json.dumps(result), flush=True)
        return
    results = []
    print(f"{'':6}{'':9}{'':6}{'tokens':>9}{'time':>14}{'tokens':>15}{'share':>10}{'GiB':>8}", flush=True)
    for backend in args.backends.split(","):
        if find_spec(backend) is None:
            print(f"{backend} is not installed", flush=True)
            continue
        for task in args.tasks.split(","):
            sizes = (
                [int(n) for n in args.lengths.split(",")] if args.lengths else (SMALL if args.small else SIZES)[task]
            )
            for system in args.systems.split(","):
                lengths = sorted(n for n in sizes if system != "full" or n <= args.longest_full)
                for found in run_child(argv, backend, system, task, lengths) if lengths else ():
                    results.append({"backend": backend, "task": task, "system": system, **found})
                    print(row(results[-1]), flush=True)
                    if args.out:
                        args.out.parent.mkdir(parents=True, exist_ok=True)
                        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
                        args.out.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    if any("error" in r and "memory" not in r["error"] for r in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
