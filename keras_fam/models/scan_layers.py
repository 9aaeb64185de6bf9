"""How layers are run: equal ones as one compiled loop, and any so that the backward pass computes them again."""

import keras
from keras import ops

from keras_fam.distribution.state_sharding import shard_output
from keras_fam.ops.backend import indices, remat
from keras_fam.ops.random import fold_in
from keras_fam.ops.scan import scan

SEEDS_PER_LAYER = 4096  # layer i of a model draws from seeds 4096·i on


def remat_layer(block, x, state, position, chunk, *, seed=None, rows_below=None):
    """`block.forward_chunk`, rematerialized: nothing of it is kept for the backward pass, which computes it again.

    Args and returns: see `keras_fam.layers.chunk_attention.forward_chunk`.
    """

    def compute(x, state, *rows):
        parts = block.forward_chunk(x, state, position, chunk, seed=seed, rows_below=rows[0] if rows else None)
        return tuple(part for part in parts if part is not None)  # what is differentiated is tensors alone

    rows = () if rows_below is None else (rows_below,)
    read = [v for v in block.weights if keras.backend.is_float_dtype(v.dtype)]
    y, *rest = remat(compute, read)(x, state, *rows)
    rows_below = rest.pop() if rows else None
    return y, rest[0] if rest else None, rows_below


def scan_layers(blocks, x, state, chunk, *, remat_layers=False, seed=None, rows_below=None):
    """What calling `forward_chunk` of one block after the other gives, as one compiled loop.

    The weights of all layers are stacked, which copies them once per call.

    Args:
        blocks: `TransformerFAMBlock`s of equal settings.
        x: `[B, T, D]`.
        state: `StreamState` with one `LayerState` per block.
        chunk: `Chunk`.
        remat_layers: whether each layer is rematerialized.
        seed: None, or an integer tensor `[2]`.
        rows_below: see `keras_fam.layers.chunk_attention.forward_chunk`.

    Returns:
        `(y, layers)`: `[B, T, D]`, and the list of the new `LayerState`s (of None unless `chunk.keep_state`).
    """
    first, layer_state = blocks[0], state.layers[0]
    weights = [[w.value for w in block.weights] for block in blocks]
    states = [keras.tree.flatten(layer) for layer in state.layers]
    xs = {"index": indices(len(blocks))}
    xs |= {f"weight_{j}": ops.stack(same) for j, same in enumerate(zip(*weights, strict=True))}
    xs |= {f"state_{j}": ops.stack(same) for j, same in enumerate(zip(*states, strict=True))}
    parts, rows_given = len(states[0]), rows_below is not None

    def step(carry, given):
        x, rows = carry if rows_given else (carry, None)
        mapping = [(v, given[f"weight_{j}"]) for j, v in enumerate(first.weights)]
        layer = keras.tree.pack_sequence_as(layer_state, [given[f"state_{j}"] for j in range(parts)])
        with keras.StatelessScope(state_mapping=mapping):
            seed_here = fold_in(seed, SEEDS_PER_LAYER * given["index"])
            y, new, rows = first.forward_chunk(x, layer, state.position, chunk, seed=seed_here, rows_below=rows)
        y = shard_output(y, first)
        kept = tuple(keras.tree.flatten(new)) if chunk.keep_state else ()
        return ((y, rows) if rows_given else y), kept

    if rows_given:  # the rows that a layer passes on have one shape and dtype in all layers
        batch_size, *row = ops.shape(layer_state.fam)
        blocks_written = (chunk.num_updates,) if len(rows_below.shape) == 4 else ()
        rows_below = ops.broadcast_to(rows_below, (batch_size, *blocks_written, *row))
        rows_below = ops.cast(rows_below, layer_state.fam.dtype)
    if remat_layers:
        step = remat(step, [])  # it is given all that it reads
    like = tuple(states[0]) if chunk.keep_state else ()
    carry, kept = scan(step, (x, rows_below) if rows_given else x, xs, like)
    y = carry[0] if rows_given else carry
    if not chunk.keep_state:
        return y, [None] * len(blocks)
    return y, [keras.tree.pack_sequence_as(layer_state, [part[i] for part in kept]) for i in range(len(blocks))]
