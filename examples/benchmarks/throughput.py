"""Throughput of prefill as a share of the machine's matrix products, timed alternately in one process.

    KERAS_BACKEND=jax python -m examples.benchmarks.throughput --width 1024 --tokens 8192 --out out/throughput.json

The machine's throughput is the best of three plain products of the same backend, dtype and threads: tokens by the
widest kernel, fewer tokens by the same kernel, and a square. The operations of prefill are those that the method
requires: products with weights for tokens and memory rows, and attention over visible keys. The masked half of a
token's own block, norms, softmax, rotations and the embedding count as time but not as operations.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

from examples.benchmarks import measuring
from examples.benchmarks.against_attention import prefill


def needed_operations(args):
    """Operations of a prefill: `{"tokens", "memory rows", "attention"}`."""
    D, S, m, F, T = args.width, args.block_size, args.memory_segments, args.fam_length, args.tokens
    weights, blocks = 4 * D * D + 3 * D * args.intermediate, T // S
    seen = sum(S * (F + min(i, m) * S + (S + 1) / 2) for i in range(blocks))
    parts = {
        "tokens": 2 * weights * T,
        "memory rows": 2 * weights * F * blocks,
        "attention": 4 * D * (seen + blocks * F * (F + S)),
    }
    return {name: args.layers * n for name, n in parts.items()}


def product(shape):
    """A function without arguments that multiplies `[a, b]` by `[b, c]` and waits."""
    import keras
    from keras import ops

    from keras_fam.ops.backend import compiled

    rng = np.random.default_rng(0)
    a, b = (ops.convert_to_tensor(rng.normal(size=s).astype("float32")) for s in (shape[:2], shape[1:]))
    run = compiled(ops.matmul, list)
    if keras.backend.backend() == "jax":
        return lambda: run(a, b).block_until_ready()
    return lambda: run(a, b)


def child(args):
    ids = np.random.default_rng(0).integers(0, args.vocabulary, (1, args.tokens)).astype("int32")
    inner = args.intermediate
    shapes = [(args.tokens, args.width, inner), (1024, args.width, inner), (2048, 2048, 2048)]
    functions = {str(shape): product(shape) for shape in shapes} | {"prefill": prefill("fam", args, ids)}
    times = measuring.take_turns(functions, args.repeats)
    products = {str(s): 2e-9 * s[0] * s[1] * s[2] / times[str(s)]["median"] for s in shapes}
    needed = needed_operations(args)
    rate = 1e-9 * sum(needed.values()) / times["prefill"]["median"]
    return {
        "products in GFLOP/s": products,
        "prefill in GFLOP/s": rate,
        "fraction": rate / max(products.values()),
        "operations": needed,
        "seconds": times,
    }


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, help="default: width / 64")
    parser.add_argument("--intermediate", type=int, help="default: 4 * width")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--memory-segments", type=int, default=1)
    parser.add_argument("--fam-length", type=int, default=32)
    parser.add_argument("--memory-update", default="residual")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--blocks-per-step", type=int)
    parser.add_argument("--remat", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", help="where to write a JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.heads = args.heads or max(1, args.width // 64)
    args.intermediate = args.intermediate or 4 * args.width
    if args.child:
        measuring.use_cores(args.threads)
        Path(args.child).write_text(json.dumps(child(args)))
        return
    backend = os.environ["KERAS_BACKEND"]
    settings = {name: value for name, value in vars(args).items() if name not in ("child", "out", "remat")}
    result = {"settings": settings, "machine": measuring.machine(args.threads)}
    result["versions"] = measuring.versions("keras", backend)
    result |= measuring.run_child("examples.benchmarks.throughput", argv, backend, args.threads)
    print(json.dumps({k: v for k, v in result.items() if k != "seconds"}, indent=1))
    measuring.write(result, args.out)


if __name__ == "__main__":
    main()
