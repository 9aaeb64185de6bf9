"""Compile time of a train step on JAX, by number of blocks and of layers.

    python -m examples.benchmarks.compile_time --layers 12 --blocks 4,16,64 --out out/compile_time.json

One process per number of blocks, in the order given. Compile time is the time of the first
`train_on_batch` minus that of the second; JAX reports its parts: tracing, lowering and XLA's compilation.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

from examples.benchmarks import measuring


def child(args):
    import jax
    import keras

    import keras_fam

    parts = {"trace": 0.0, "lower": 0.0, "compile": 0.0}
    names = {"jaxpr_trace_duration": "trace", "jaxpr_to_mlir_module": "lower", "backend_compile": "compile"}

    def listen(event, duration, **_):
        for name, part in names.items():
            if name in event:
                parts[part] += duration

    keras.utils.set_random_seed(0)
    backbone = keras_fam.TransformerFAMBackbone(
        args.vocabulary,
        args.layers,
        args.width,
        args.heads,
        4 * args.width,
        block_size=args.block_size,
        memory_segments=args.memory_segments,
        fam_length=args.fam_length,
        remat=args.remat,
        scan_layers=args.scan_layers,
    )
    model = keras_fam.TransformerFAMCausalLM(backbone)
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    count = args.count * args.block_size
    ids = np.random.default_rng(0).integers(0, args.vocabulary, (1, count)).astype("int32")

    def step():
        return float(model.train_on_batch(ids, ids, return_dict=True)["loss"])

    model.build()
    model.optimizer.build(model.trainable_variables)
    jax.monitoring.register_event_duration_secs_listener(listen)
    first = measuring.seconds(step)
    measured = dict(parts)
    second = measuring.seconds(step)
    return {"seconds": first - second, "step": second, "of which": measured}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv

    def numbers(text):
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--blocks", type=numbers, default=[4, 16, 64])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, help="default: width / 64")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--memory-segments", type=int, default=1)
    parser.add_argument("--fam-length", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--scan-layers", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", help="where to write a JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.heads = args.heads or max(1, args.width // 64)
    if args.child:
        measuring.use_cores(args.threads)
        Path(args.child).write_text(json.dumps(child(args)))
        return
    settings = {name: value for name, value in vars(args).items() if name not in ("child", "out", "count")}
    result = {"settings": settings, "machine": measuring.machine(args.threads), "blocks": {}}
    result["versions"] = measuring.versions("keras", "jax")
    for count in args.blocks:
        found = measuring.run_child(
            "examples.benchmarks.compile_time", [*argv, "--count", str(count)], "jax", args.threads
        )
        result["blocks"][str(count)] = found
        split = ", ".join(f"{name} {t:.1f}" for name, t in found["of which"].items())
        print(f"{args.layers} layers, {count} blocks: {found['seconds']:.1f} s ({split}), step {found['step']:.2f} s")
    measuring.write(result, args.out)


if __name__ == "__main__":
    main()
