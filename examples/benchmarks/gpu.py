"""TransformerFAM on one GPU: decoding, prefill and train step, against BSWA, full attention and Mistral.

    python -m examples.benchmarks.gpu --backends jax --out gpu.json      # eight minutes; again with --backends torch
    python -m examples.benchmarks.gpu --small --out gpu_small.json       # everything at small sizes, on a CPU

The model has the shape of the paper's 1B (18 layers, width 1536, 12 heads, S 1024, m 3, F 64) and random weights, in
bfloat16. Systems: `fam`; `inputs`, with the memory of converted models (`fam_query="layer_inputs"`); `masked`: `fam`,
its attention by masks and not by the kernels of `keras_fam.ops.attention_kernels`; `bswa`, without memory; `full`, the
same width and depth with full attention through the backend's fused kernel; `mistral`, Hugging Face's with a sliding
window of as many keys (torch, where transformers is installed).

A run is a list of cells, the most valuable ones first, and ends after `--seconds` for each backend. Each (task, system,
rows) runs in its own process, shortest inputs first, so that the peak memory after an input is that of the input.
Results are printed and written as they come; a file that is there keeps what this run does not measure, so that several
short runs fill one table. Running out of memory or time and other failures are reported.

card: one large bfloat16 matrix product, reading 4 GiB, and how far attention without masks is from that with masks.
decode: `--new` tokens of each row, chosen and read after a context, in the systems' own way (`StreamingModel.generate`;
    full attention has a cache of the context's size). Milliseconds are those of one token of all rows.
prefill: T tokens a row; the last hidden state is fetched. FAM and BSWA read one chunk at a time, full attention reads
    all tokens at once, without keeping caches, Mistral one window at a time.
train: one step with Adafactor (mixed bfloat16, remat; cross-entropy over the whole vocabulary, in pieces).

`share` is the throughput of the model's arithmetic (matrix products of the forward pass; three times that for training,
without rematerialization) relative to that of the matrix product in the same process; for decoding, the bytes of the
weights, read once a token, relative to the bandwidth. Times are medians of `--repeats` calls, or of as many as fit into
`--cell-seconds`, after calls that compile, trace and capture.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter

from examples.benchmarks.gpu_tasks import (
    SYSTEMS,
    TASKS,
    bandwidth,
    kernel_difference,
    matrix_throughput,
    work_per_token,
)
from examples.benchmarks.measuring import seconds, write

K = 1024
CELLS = [  # (task, systems, rows, lengths), the most valuable first
    ("card", ["-"], 1, [0]),
    ("decode", ["fam"], 1, [K, 1024 * K]),
    ("prefill", ["fam", "bswa"], 1, [8 * K, 128 * K, 1024 * K]),
    ("decode", ["bswa", "full", "mistral"], 1, [32 * K]),
    ("train", ["fam", "bswa"], 1, [32 * K]),
    ("prefill", ["fam", "bswa"], 4, [32 * K, 128 * K]),
    ("decode", ["fam"], 32, [K]),
    ("prefill", ["full", "mistral"], 1, [8 * K, 32 * K]),
    ("prefill", ["masked", "inputs"], 1, [128 * K]),
    ("train", ["fam"], 1, [128 * K]),
]
SMALL = {"card": [0], "prefill": [64, 256], "train": [64], "decode": [64]}
RESULT = "result: "  # prefix of the output lines with results
KEY = ("backend", "device", "task", "system", "rows", "length")  # a later result takes the place of one with the same
FEWEST = 20.0  # seconds that a process needs to be of use


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
    backend, throughput = os.environ["KERAS_BACKEND"], matrix_throughput(args.small)
    read = bandwidth(args.small) if args.task in ("card", "decode") else None
    about = {"device": device_name(), "rows": args.rows, "matrix_product_per_second": throughput}
    about |= {"bytes_per_second": read, "versions": {name: metadata.version(name) for name in ("keras", backend)}}
    if args.task == "card":
        yield {"length": 0, **about, "kernel_difference": kernel_difference()}
        return
    at = TASKS[args.task](args)
    for length in lengths:
        run = at(length)
        start = perf_counter()
        compiling = [seconds(run)]
        while len(compiling) < run.calls_before and perf_counter() - start <= 4 * args.cell_seconds:
            compiling.append(seconds(run))  # a first call compiles; on torch, others come before graphs
        times = []
        while len(times) < args.repeats and sum(times) <= args.cell_seconds:
            times.append(seconds(run))
        decoding = args.task == "decode"
        taken = median(times) / (args.new if decoding else 1)  # of a token
        tokens = args.rows * (1 if decoding else length)
        if decoding:
            share = run.weight_bytes / taken / read
        else:
            share = tokens * work_per_token(args, length) * (3 if args.task == "train" else 1) / taken / throughput
        yield {
            "length": length,
            **about,
            "seconds": taken,
            "all_seconds": times,
            "first_calls_seconds": compiling,
            "tokens_per_second": tokens / taken,
            "peak_bytes": peak_bytes(),
            "share": share,
        }


def run_child(argv, backend, task, system, rows, lengths, limit):
    """Yields the results of `measure` in a new process; a result with `"error"` for the length at which it fails, or is
    stopped after `limit` seconds."""
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, "KERAS_BACKEND": backend, "PYTHONUNBUFFERED": "1"}
    own = ["--child", ",".join(map(str, lengths)), "--task", task, "--system", system, "--rows", str(rows)]
    command, lines, found = [sys.executable, "-m", "examples.benchmarks.gpu", *argv, *own], [], 0
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        late = threading.Timer(limit, child.kill)
        late.start()
        for line in child.stdout:
            if line.startswith(RESULT):
                found += 1
                yield json.loads(line.removeprefix(RESULT))
            elif line.strip():
                lines.append(line.strip())
        stopped = late.finished.is_set()
        late.cancel()
    if found < len(lengths):
        lines = lines or [f"exit status {child.returncode}"]
        memory = [line for line in lines if "out of memory" in line.lower() or "RESOURCE_EXHAUSTED" in line]
        error = "out of time" if stopped else "out of memory: " + memory[0] if memory else lines[-1]
        yield {"length": lengths[found], "rows": rows, "error": error[:300]}


def row(result):
    name = f"{result['backend']:6}{result['task']:9}{result['system']:8}{result['rows']:>4}{result['length']:>9}"
    if "error" in result:
        return f"{name}  {result['error']}"
    if result["task"] == "card":
        product, read = result["matrix_product_per_second"] / 1e12, result["bytes_per_second"] / 1e12
        return f"{name}  {product:.0f} TFLOP/s, {read:.2f} TB/s, {result['device']}"
    peak = "-" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**30:.1f}"
    speed = f"{result['seconds'] * 1e3:12.2f} ms{result['tokens_per_second']:12.0f} /s"
    return f"{name}{speed}{100 * result['share']:8.1f} %{peak:>8}"


def merged(before, new):
    """The results of a file and new ones, of which each takes the place of one for the same cell."""
    keys = {tuple(result.get(name) for name in KEY) for result in new}
    return [result for result in before if tuple(result.get(name) for name in KEY) not in keys] + new


def planned(args, backend):
    """`(task, system, rows, lengths)` of the cells to measure, in order."""
    for task, systems, rows, lengths in CELLS:
        if task not in args.tasks.split(",") or (args.systems and task == "card"):
            continue
        for system in systems:
            if args.systems and system not in args.systems.split(","):
                continue
            if system == "mistral" and (backend != "torch" or find_spec("transformers") is None):
                continue
            yield task, system, min(rows, 2) if args.small else rows, SMALL[task] if args.small else lengths


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="jax,torch", help="of which those that are installed are used")
    parser.add_argument("--seconds", type=float, default=480.0, help="time for each backend")
    parser.add_argument("--tasks", default=",".join(dict.fromkeys(cell[0] for cell in CELLS)))
    parser.add_argument("--systems", help=f"of {', '.join(SYSTEMS)}; all of them by default")
    parser.add_argument("--small", action="store_true", help="small model and inputs, for a CPU")
    parser.add_argument("--blocks-per-step", type=int, default=8, help="blocks that a prefill reads at a time")
    parser.add_argument("--train-blocks", type=int, default=2, help="blocks between checkpoints of a train step")
    parser.add_argument("--memory-update", choices=("residual", "normalized"), default="residual")
    parser.add_argument("--new", type=int, default=64, help="tokens that a call decodes")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls")
    parser.add_argument("--cell-seconds", type=float, default=3.0, help="time after which no call of a cell is started")
    parser.add_argument("--out", type=Path, help="a JSON file, to which results are added")
    for name in ("child", "system", "task", "rows"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        args.rows = int(args.rows)
        for result in measure(args, list(map(int, args.child.split(",")))):
            print(RESULT + json.dumps(result), flush=True)
        return
    before = json.loads(args.out.read_text())["results"] if args.out and args.out.exists() else []
    results, settings = [], {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    print(f"{'':6}{'':9}{'':8}{'rows':>4}{'tokens':>9}{'time':>15}{'tokens':>15}{'share':>10}{'GiB':>8}", flush=True)
    for backend in args.backends.split(","):
        if find_spec(backend) is None:
            print(f"{backend} is not installed", flush=True)
            continue
        end = perf_counter() + args.seconds
        for task, system, rows, lengths in planned(args, backend):
            if end - perf_counter() < FEWEST:
                print(f"{backend:6}{task:9}{system:8}{rows:>4}  not started: out of time", flush=True)
                continue
            for found in run_child(argv, backend, task, system, rows, lengths, end - perf_counter()):
                results.append({"backend": backend, "task": task, "system": system, **found})
                print(row(results[-1]), flush=True)
                write({"settings": settings, "results": merged(before, results)}, args.out)
    if any("error" in r and "out of" not in r["error"] for r in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
