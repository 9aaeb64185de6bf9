"""How many operations a decoded token or a memory update takes: what a GPU launches, or an eager backend dispatches.

    KERAS_BACKEND=jax python -m examples.benchmarks.kernels --out out/kernels_jax.json
    KERAS_BACKEND=jax python -m examples.benchmarks.kernels --of update --out out/kernels_update_jax.json

JAX: instructions of the optimized program of `generate` that run for a token with which no block is completed: those of
    the loop's body, of the cheaper side of each branch in it, without what moves nothing (tuples, bitcasts, constants).
    The program is the one for this machine; for a GPU, XLA fuses differently.
torch: operations that `torch.profiler` sees while tokens are decoded from recorded graphs. Views, which move nothing,
    are counted apart.

Both are counted for `--layers` and for twice as many layers of width `--width`; the difference belongs to the layers,
the rest to embedding, positions, logits and the sampler. `bytes copied` (JAX) are the results of copy instructions.

`--of update` counts what one block's memory update takes in a layer, where several blocks are read at once: the
sequential part of a prefill. JAX: the body of the loop over blocks. torch: what more blocks add, per block.
"""

import argparse
import collections
import json
import math
import pathlib
import re

import numpy as np

from examples.record import run_record

FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")  # HLO that moves nothing
VIEWS = (
    *("view", "reshape", "_reshape_alias", "_unsafe_view", "unsqueeze", "squeeze", "permute", "transpose", "t"),
    *("expand", "slice", "select", "split", "as_strided", "unbind", "alias", "detach", "narrow", "unfold", "diagonal"),
)
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


def make_backbone(args, layers):
    import keras

    import keras_fam

    keras.utils.set_random_seed(0)
    return keras_fam.TransformerFAMBackbone(
        256,
        layers,
        args.width,
        max(1, args.width // 64),
        2 * args.width,
        block_size=args.block_size,
        memory_segments=args.memory_segments,
        fam_length=args.fam_length,
        memory_update=args.memory_update,
    )


def make_stream(args, layers):
    import keras_fam

    backbone = make_backbone(args, layers)
    stream = keras_fam.StreamingModel(keras_fam.TransformerFAMCausalLM(backbone), args.rows)
    stream.predict(np.ones((args.rows, args.block_size + 1), "int32"))
    return stream


def computations(text):
    """The instructions of an HLO module by computation: `{name: [(operation, line)]}`."""
    found, current = {}, None
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        operation = re.search(r"= .*? ([\w\-]+)\(", line)
        if head and not line.startswith(" "):
            current = found.setdefault(head[1], [])
        elif operation and current is not None:
            current.append((operation[1], line))
    return found


def executed(module, name):
    """Counts of instructions that a run of a computation executes, of branches those of the shorter side."""
    total = collections.Counter()
    for operation, line in module[name]:
        if operation in FREE:
            continue
        total[operation] += 1
        if operation == "copy":
            kind, shape = re.search(r"= (\w+)\[([\d,]*)\]", line).groups()
            total["bytes copied"] += SIZES[kind] * math.prod(int(n) for n in shape.split(",") if n)
        if operation == "conditional":
            sides = re.search(r"branch_computations=\{([^}]*)\}", line)
            sides = sides[1].split(",") if sides else re.findall(r"(?:true|false)_computation=([^,\s]+)", line)
            counts = [executed(module, side.strip().lstrip("%")) for side in sides]
            total += min(counts, key=lambda c: c.total() - c["bytes copied"])
        if operation == "call":
            total += executed(module, re.search(r"to_apply=%?([\w.\-]+)", line)[1])
    return total


def count_jax(args, layers):
    import jax

    programs, make = [], jax.jit

    def recording(function, **options):
        program = make(function, **options)

        def run(*given):
            programs.append(program.lower(*given).compile().as_text())
            return program(*given)

        return run

    stream = make_stream(args, layers)
    jax.jit = recording
    try:
        stream.generate(max_new_tokens=16)
    finally:
        jax.jit = make
    module = computations(next(text for text in programs if " while(" in text))
    bodies = {name for lines in module.values() for _, line in lines for name in re.findall(r"body=%?([\w.\-]+)", line)}
    counts = [executed(module, name) for name in bodies]
    return max(counts, key=lambda c: c["dot"] + c["custom-call"] if not c["while"] else -1)


def count_torch(args, layers):
    from torch.profiler import ProfilerActivity, profile

    stream, number = make_stream(args, layers), 16
    stream.generate(max_new_tokens=number)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        stream.generate(max_new_tokens=number)
    with profile(activities=[ProfilerActivity.CPU]) as once:  # what a call does, whatever the number of its tokens
        stream.generate(max_new_tokens=1)
    counts = dispatched(found)
    counts.subtract(dispatched(once))
    return per(counts, number - 1)


def dispatched(profiled):
    """Counts of the operations that a profiler saw; a conversion that converts nothing is a view."""
    counts = collections.Counter()
    for event in profiled.events():
        if event.name.startswith("aten::") and event.cpu_parent is None:
            name = event.name.removeprefix("aten::")
            counts["views" if name in VIEWS or (name == "to" and not event.cpu_children) else name] += 1
    return counts


def per(counts, number):
    return collections.Counter({name: count / number for name, count in counts.items()})


def updates_jax(args):
    """Counts of one update of one layer: of the loops of a program, those over blocks."""
    import jax

    backbone = make_backbone(args, args.layers)
    backbone.build()
    ids = np.ones((args.rows, 8 * args.block_size), "int32")
    program = jax.jit(lambda ids, state: backbone.advance(ids, state, aligned=True))
    module = computations(program.lower(ids, backbone.get_initial_state(args.rows)).compile().as_text())
    bodies = {name for lines in module.values() for _, line in lines for name in re.findall(r"body=%?([\w.\-]+)", line)}
    counts = sorted((executed(module, name) for name in bodies), key=lambda c: -c["dot"] - c["custom-call"])
    return {name: count / args.layers for name, count in sum(counts[: args.layers], collections.Counter()).items()}


def updates_torch(args):
    from torch.profiler import ProfilerActivity, profile

    backbone, total = make_backbone(args, args.layers), collections.Counter()
    for blocks in (16, 8):
        ids, state = np.ones((args.rows, blocks * args.block_size), "int32"), backbone.get_initial_state(args.rows)
        backbone.advance(ids, state, aligned=True)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            backbone.advance(ids, state, aligned=True)
        total.update(dispatched(found)) if blocks == 16 else total.subtract(dispatched(found))
    return per(total, 8 * args.layers)


def operations(counts):
    return sum(value for name, value in counts.items() if name not in ("views", "bytes copied"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", choices=["token", "update"], default="token")
    parser.add_argument("--memory-update", default="normalized")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--memory-segments", type=int, default=1)
    parser.add_argument("--fam-length", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    args = parser.parse_args(argv)
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        parser.error("operations are counted on JAX and torch (KERAS_BACKEND)")
    if args.of == "update":
        counts = {"jax": updates_jax, "torch": updates_torch}[backend](args)
        shown = {name: round(value, 3) for name, value in sorted(counts.items(), key=lambda x: -x[1]) if value}
        show({"operations_per_update_and_layer": operations(counts), "per_update_and_layer": shown}, args, argv)
        return
    count = {"jax": count_jax, "torch": count_torch}[backend]
    some, twice = count(args, args.layers), count(args, 2 * args.layers)
    names = sorted({*some, *twice}, key=lambda name: -twice[name])
    per_layer = {name: (twice[name] - some[name]) / args.layers for name in names}
    result = {
        "operations_per_token_and_layer": operations(per_layer),
        "operations_per_token_beside": operations(some) - args.layers * operations(per_layer),
        "per_token_and_layer": {name: round(value, 3) for name, value in per_layer.items() if value},
    }
    show(result, args, argv)


def show(result, args, argv):
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = run_record("examples.benchmarks.kernels", args, argv)
        args.out.write_text(json.dumps(result | record, indent=1) + "\n")


if __name__ == "__main__":
    main()
