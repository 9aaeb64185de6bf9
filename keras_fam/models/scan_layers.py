"""How layers are run: equal ones as one compiled loop, and any so that the backward pass computes them again."""

import keras
from keras import ops

from keras_fam.distribution.state_sharding import shard_output
from keras_fam.ops.backend import remat
from keras_fam.ops.random import fold_in
from keras_fam.ops.scan import scan

SEEDS_PER_LAYER = 4096  # layer i of a model draws from seeds 4096·i on


def remat_layer(block, x, state, position, *, rider=None, **options):
    """`block.advance_layer`, of which nothing is kept for the backward pass: it is computed again there.

    Args:
        block: `TransformerFAMBlock`.
        x: `[B, T, D]`.
        state: its `LayerState`.
        position, rider, options: see `keras_fam.layers.chunk_attention.advance_layer`.

    Returns:
        What `advance_layer` returns.
    """

    def compute(x, state, *riders):
        parts = block.advance_layer(x, state, position, rider=riders[0] if riders else None, **options)
        return tuple(part for part in parts if part is not None)  # what is differentiated is tensors alone

    riders = () if rider is None else (rider,)
    read = [v for v in block.weights if keras.backend.is_float_dtype(v.dtype)]
    y, *rest = remat(compute, read)(x, state, *riders)
    rider = rest.pop() if riders else None
    return y, rest[0] if rest else None, rider


def scan_layers_once(blocks, x, state, *, replay=False, seed=None, rider=None, keep_state=True, **options):
    """What calling `advance_layer` of one block after the other gives.

    The weights of all layers are stacked, which copies them once per call.

    Args:
        blocks: `TransformerFAMBlock`s of equal settings.
        x: `[B, T, D]`.
        state: `StreamState` with one `LayerState` per block.
        replay: whether each layer is computed again in the backward pass.
        seed: None, or an integer tensor `[2]`.
        rider: see `keras_fam.layers.chunk_attention.advance_layer`; likewise `keep_state` and `options`.

    Returns:
        `(y, layers)`: `[B, T, D]`, and the list of the new `LayerState`s (of None unless `keep_state`).
    """
    first, layer_state = blocks[0], state.layers[0]
    weights = [[w.value for w in block.weights] for block in blocks]
    states = [keras.tree.flatten(layer) for layer in state.layers]
    xs = {"index": ops.arange(len(blocks), dtype="int32")}
    xs |= {f"weight_{j}": ops.stack(same) for j, same in enumerate(zip(*weights, strict=True))}
    xs |= {f"state_{j}": ops.stack(same) for j, same in enumerate(zip(*states, strict=True))}
    parts, rider_given = len(states[0]), rider is not None

    def step(carry, given):
        x, rider = carry if rider_given else (carry, None)
        mapping = [(v, given[f"weight_{j}"]) for j, v in enumerate(first.weights)]
        layer = keras.tree.pack_sequence_as(layer_state, [given[f"state_{j}"] for j in range(parts)])
        with keras.StatelessScope(state_mapping=mapping):
            y, new, rider = first.advance_layer(
                x,
                layer,
                state.position,
                seed=fold_in(seed, SEEDS_PER_LAYER * given["index"]),
                rider=rider,
                keep_state=keep_state,
                **options,
            )
        y = shard_output(y, first)
        kept = tuple(keras.tree.flatten(new)) if keep_state else ()
        return ((y, rider) if rider_given else y), kept

    if rider_given:  # the rows that a layer hands on have one shape and dtype in all layers
        like = layer_state.fam
        rider = ops.cast(ops.broadcast_to(rider, ops.shape(like)), like.dtype)
    if replay:
        step = remat(step, [])  # it is given all that it reads
    carry, kept = scan(step, (x, rider) if rider_given else x, xs, tuple(states[0]) if keep_state else ())
    y = carry[0] if rider_given else carry
    if not keep_state:
        return y, [None] * len(blocks)
    return y, [keras.tree.pack_sequence_as(layer_state, [part[i] for part in kept]) for i in range(len(blocks))]
