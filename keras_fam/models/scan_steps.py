"""A long input in steps of whole blocks: memory for one step at a time, forwards and backwards.

With `remat` only the states at the steps' boundaries are kept in training: backwards, each step is computed again from
the state that it started with (Sec. 3.1 takes such checkpoints for granted). `remat="layers"` nests this: of a step
that is computed again, what the layers got is kept, and each is computed once more.
"""

import keras
from keras import ops

from keras_fam.layers.chunk import make_chunk
from keras_fam.models.scan_layers import SEEDS_PER_LAYER
from keras_fam.ops.backend import indices, remat
from keras_fam.ops.random import fold_in
from keras_fam.ops.scan import scan

REMAT_BLOCKS = 4
STEP_TOKENS = 4096  # outside of training: enough to keep any device busy


def step_blocks(model, training):
    """Blocks in a step of a backbone, or None if it takes all at once."""
    if model.blocks_per_step:
        return model.blocks_per_step
    if training:  # what is stored for the backward pass grows with the input whatever the steps, unless `remat`
        return REMAT_BLOCKS if model.remat or model.backpropagation_steps is not None else None
    return max(1, STEP_TOKENS // model.block_size)


def scan_steps(model, x, state, chunk, size, *, seed=None, training=False):
    """`forward_layers` of a backbone for an aligned chunk, `size` tokens at a time.

    Args:
        model: a `TransformerFAMBackbone`.
        x: `[B, T, D]` embeddings, T > `size`.
        state: `StreamState`.
        chunk: the aligned `Chunk` of all T tokens.
        size: tokens in a step, whole blocks.
        seed: None, or an integer tensor `[2]`.
        training: whether gradients will be asked for.

    Returns:
        `([B, T, D], state)`.
    """
    length, every = x.shape[1], model.backpropagation_steps if training else None
    num_steps, lengths = length // size, chunk.lengths
    whole = ops.reshape(x[:, : num_steps * size], (-1, num_steps, size, x.shape[-1]))
    xs = {"x": ops.moveaxis(whole, 1, 0)}
    index = indices(num_steps)
    if lengths is not None:
        xs["lengths"] = ops.clip(ops.expand_dims(lengths, 0) - ops.expand_dims(index * size, 1), 0, size)
    if seed is not None:
        xs["seed"] = fold_in(seed, 1 + SEEDS_PER_LAYER * model.num_layers * index)
    if every:
        xs["stop_gradient"] = ops.logical_and(ops.mod(index, every) == 0, index > 0)
    # Rows that fill whole blocks have no unfinished one to carry.
    spare = model.block_size if lengths is None else 0

    def forward(x, state, lengths, seed, keep_state=True):
        part = make_chunk(x, state.position, model.block_size, "block", lengths=lengths, keep_state=keep_state)
        return model.forward_layers(x, state, part, seed=seed, training=training)

    def step(state, given):
        if every:
            state = stop_gradient_where(given["stop_gradient"], state)
        y, state = forward(given["x"], unpack(state, spare), given.get("lengths"), given.get("seed"))
        return pack(state, spare), (y,)

    if model.remat and training:
        read = [v for v in model.weights if keras.backend.is_float_dtype(v.dtype)]
        step = remat(step, read)
    state, (ys,) = scan(step, pack(state, spare), xs, (xs["x"][0],))
    state = unpack(state, spare)
    y = ops.reshape(ops.moveaxis(ys, 0, 1), (-1, num_steps * size, x.shape[-1]))
    if not length % size:
        return y, state
    if every and num_steps % every == 0:
        state = keras.tree.map_structure(ops.stop_gradient, state)
    rest = None if lengths is None else ops.maximum(lengths - num_steps * size, 0)
    last, state = forward(x[:, num_steps * size :], state, rest, seed, chunk.keep_state)
    return ops.concatenate([y, last], axis=1), state


def stop_gradient_where(condition, state):
    """`state`, through which no gradient passes if the bool scalar `condition` holds."""

    def part(x):
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype)):
            return x
        return ops.where(condition, ops.stop_gradient(x), x)

    return keras.tree.map_structure(part, state)


def pack(state, spare):
    """A state without the last `spare` slots of its keys and values, those of the unfinished block."""
    return _keys(state, lambda x: x[:, : x.shape[1] - spare]) if spare else state


def unpack(state, spare):
    """A state with `spare` empty slots at the end of its keys and values: what `pack` took away at a boundary."""
    return _keys(state, lambda x: ops.pad(x, [[0, 0], [0, spare], [0, 0], [0, 0]])) if spare else state


def _keys(state, change):
    layers = tuple(layer._replace(key=change(layer.key), value=change(layer.value)) for layer in state.layers)
    return state._replace(layers=layers)
