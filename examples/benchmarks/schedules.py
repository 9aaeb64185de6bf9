"""Orders of computing (layer, block) in a prefill on JAX, with the same weights and outputs.

    python -m examples.benchmarks.schedules --layers 8 --block-size 128 --tokens 4096 --out out/schedules.json

layers over k blocks: a layer reads k blocks at once, then the next layer (k is `blocks_per_step`; "all" is a layer
    over the whole sequence).
diagonals: layer l reads block d - l at step d, all layers at once as one batched product with stacked weights (the
    diagonal batching of arXiv 2506.05229). Layers of this prototype are keras_fam's own, under `jax.vmap`; at both
    ends of the sequence some layers compute results that are discarded.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

from examples.benchmarks import measuring


def make_backbone(args, blocks_per_step=None):
    import keras

    import keras_fam

    keras.utils.set_random_seed(0)
    backbone = keras_fam.TransformerFAMBackbone(
        args.vocabulary,
        args.layers,
        args.width,
        args.heads,
        args.intermediate,
        block_size=args.block_size,
        memory_segments=args.memory_segments,
        fam_length=args.fam_length,
        memory_update="normalized",
        blocks_per_step=blocks_per_step,
    )
    backbone.build()
    return backbone


def by_layers(backbone):
    """`(values, ids) -> hidden` of the package's own schedule."""
    import keras

    def run(values, ids):
        with keras.StatelessScope(state_mapping=list(zip(backbone.variables, values, strict=True))):
            return backbone(ids, return_state=True)

    return run, [v.value for v in backbone.variables]


def by_diagonals(backbone, num_blocks):
    """The same by anti-diagonals: `(values, ids) -> hidden`, with the layers' weights stacked in `values`."""
    import jax
    import jax.numpy as jnp
    import keras

    from keras_fam.layers.chunk import make_chunk
    from keras_fam.state import LayerState, StreamPosition, advance_position

    first, L, S = backbone.blocks[0], backbone.num_layers, backbone.block_size
    block_variables = [block.variables for block in backbone.blocks]
    taken = {id(v) for variables in block_variables for v in variables}
    rest = [v for v in backbone.variables if id(v) not in taken]
    stacked = [jnp.stack([v.value for v in same]) for same in zip(*block_variables, strict=True)]

    def one_layer(weights, x, state, position, active):
        with keras.StatelessScope(state_mapping=list(zip(first.variables, weights, strict=True))):
            chunk = make_chunk(x, position, S, "block")
            y, new, _ = first.forward_chunk(x, state, position, chunk)
            moved = advance_position(position, chunk, first.max_memories)
        keep = jax.tree.map(lambda a, b: jnp.where(active, a, b), (new, moved), (state, position))
        return y, *keep

    def run(values, ids):
        stacked, rest_values, state = values
        with keras.StatelessScope(state_mapping=list(zip(rest, rest_values, strict=True))):
            x = backbone.embed(ids)
        blocks = x.reshape(x.shape[0], num_blocks, S, -1).swapaxes(0, 1)
        blocks = jnp.concatenate([blocks, jnp.zeros((L - 1, *blocks.shape[1:]), x.dtype)])
        layers, positions = state

        def diagonal(carry, given):
            hidden, layers, positions = carry
            block, d = given
            hidden = jnp.concatenate([block[None], hidden[:-1]])
            active = (d >= jnp.arange(L)) & (d - jnp.arange(L) < num_blocks)
            hidden, layers, positions = jax.vmap(one_layer)(stacked, hidden, layers, positions, active)
            return (hidden, layers, positions), hidden[-1]

        carry = jnp.zeros((L, *blocks.shape[1:]), x.dtype), LayerState(*layers), StreamPosition(*positions)
        _, outputs = jax.lax.scan(diagonal, carry, (blocks, jnp.arange(num_blocks + L - 1)))
        y = outputs[L - 1 :].swapaxes(0, 1).reshape(x.shape)
        with keras.StatelessScope(state_mapping=list(zip(rest, rest_values, strict=True))):
            return backbone.final_norm(y)

    start = backbone.get_initial_state(1)
    layers = jax.tree.map(lambda *parts: jnp.stack(parts), *start.layers)
    positions = jax.tree.map(lambda part: jnp.stack([part] * L), start.position)
    return run, (stacked, [v.value for v in rest], (tuple(layers), tuple(positions)))


def child(args):
    import jax

    ids = jax.numpy.asarray(np.random.default_rng(0).integers(0, args.vocabulary, (1, args.tokens)).astype("int32"))
    num_blocks = args.tokens // args.block_size
    runs = {f"layers over {k} blocks": by_layers(make_backbone(args, k)) for k in args.blocks if k < num_blocks}
    runs["layers over all blocks"] = by_layers(make_backbone(args))
    runs["diagonals"] = by_diagonals(make_backbone(args), num_blocks)
    functions, outputs, temporary = {}, {}, {}
    for name, (run, values) in runs.items():
        program = jax.jit(run).lower(values, ids).compile()
        temporary[name] = program.memory_analysis().temp_size_in_bytes / 2**20
        functions[name] = lambda program=program, values=values: jax.block_until_ready(program(values, ids))
        result = functions[name]()
        outputs[name] = np.asarray(result[0] if isinstance(result, tuple) else result)
    reference = outputs["layers over all blocks"]
    difference = {name: float(np.abs(y - reference).max() / np.abs(reference).max()) for name, y in outputs.items()}
    assert max(difference.values()) < 1e-4, difference
    times = measuring.take_turns(functions, args.repeats, warm=False)
    base = times["layers over all blocks"]["median"]
    return {
        "seconds": times,
        "time over that of a layer over all blocks": {name: t["median"] / base for name, t in times.items()},
        "temporary MiB": temporary,
        "relative difference": difference,
    }


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv

    def numbers(text):
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, help="default: width / 64")
    parser.add_argument("--intermediate", type=int, help="default: 4 * width")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--memory-segments", type=int, default=1)
    parser.add_argument("--fam-length", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--blocks", type=numbers, default=[1, 2, 4, 8])
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
    settings = {name: value for name, value in vars(args).items() if name not in ("child", "out")}
    result = {"settings": settings, "machine": measuring.machine(args.threads)}
    result["versions"] = measuring.versions("keras", "jax")
    result |= measuring.run_child("examples.benchmarks.schedules", argv, "jax", args.threads)
    print(json.dumps({k: v for k, v in result.items() if k != "seconds"}, indent=1))
    measuring.write(result, args.out)


if __name__ == "__main__":
    main()
