"""The state of a stream: everything a TransformerFAM model carries from one call to the next.

Axes: B batch rows, S tokens in a block, m memory segments, F memory rows, P visible memories,
K key/value heads, H head width, D model width (see the glossary in the README).

The state has a constant size. Slot `s` of a layer's key and value buffers belongs to one place: the first m·S
slots are the m previous blocks, oldest first, and the last S slots are the block being filled. Keys are stored
rotated by their place *inside their own block*, so a stored key is never touched again and no absolute position
exists; which slots are filled follows from the stream's position alone.
"""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_fam.ops.backend import is_eager


class StreamPosition(NamedTuple):
    """The position of each row in its stream. One `StreamPosition` serves all layers of a model.

    Attributes:
        offset: int32 `[B]`, tokens in the unfinished block, 0 … S−1.
        block_index: int32 `[B]`, blocks completed since the row was reset.
        fresh: bool `[B]`, True until the row's memory is first written or passed on: the first update has no residual.
        visible_memories: int32 `[B]`, how many memories may be read, 0 … P.
    """

    offset: Any
    block_index: Any
    fresh: Any
    visible_memories: Any


class LayerState(NamedTuple):
    """What one layer remembers. Fields that a configuration does not need are empty tuples.

    Attributes:
        key: `[B, (m+1)·S, K, H]`, keys of the m previous blocks and of the unfinished one; empty slots are 0.
        value: `[B, (m+1)·S, K, H]`, their values.
        fam: float32 `[B, F, D]`, the memory F_τ of the last completed block (or F_0).
        fam_key: `[B, P·F, K, H]`, keys of the visible memories, newest first, rotated for the block being filled.
        fam_value: `[B, P·F, K, H]`, their values.
        sink_key: `[B, W, K, H]`, keys of the first W tokens of the stream (attention sinks), rotated as in `key`.
        sink_value: `[B, W, K, H]`, their values.
    """

    key: Any
    value: Any
    fam: Any = ()
    fam_key: Any = ()
    fam_value: Any = ()
    sink_key: Any = ()
    sink_value: Any = ()


class StreamState(NamedTuple):
    """The state of B streams: one `StreamPosition` and a tuple with one `LayerState` per layer."""

    position: StreamPosition
    layers: tuple

    def __deepcopy__(self, memo):  # torch copies no tensor through which gradients pass
        return keras.tree.map_structure(lambda x: ops.copy(ops.stop_gradient(x)), self)


class Spec(NamedTuple):
    """Shape and dtype of one tensor of a state; the batch dimension may be None."""

    shape: tuple
    dtype: str


def is_spec(x):
    return isinstance(x, Spec)


def map_specs(function, spec):
    """Applies `function(Spec)` to every `Spec` of a structure and keeps the structure."""
    if is_spec(spec):
        return function(spec)
    if isinstance(spec, tuple):
        items = [map_specs(function, item) for item in spec]
        return type(spec)(*items) if hasattr(spec, "_fields") else tuple(items)
    raise TypeError(f"A state spec consists of tuples and Spec; received {type(spec).__name__}.")


def position_spec(batch_size):
    """`StreamPosition` of `Spec`s for `batch_size` rows."""
    return StreamPosition(
        Spec((batch_size,), "int32"),
        Spec((batch_size,), "int32"),
        Spec((batch_size,), "bool"),
        Spec((batch_size,), "int32"),
    )


def initial_position(batch_size, visible_memories):
    """The position of rows before their first token; `visible_memories` is 1 if there is an F_0 to read, else 0."""
    return StreamPosition(
        offset=ops.zeros((batch_size,), "int32"),
        block_index=ops.zeros((batch_size,), "int32"),
        fresh=ops.ones((batch_size,), "bool"),
        visible_memories=ops.ones((batch_size,), "int32") * visible_memories,
    )


def advance_position(position, chunk, max_visible_memories):
    """The position after the tokens of a chunk.

    Args:
        position: `StreamPosition`.
        chunk: `keras_fam.layers.chunk.Chunk`.
        max_visible_memories: P, or 0 without memory.
    """
    if chunk.completes is False:
        return position._replace(offset=position.offset + chunk.taken)
    completed = chunk.completed
    return StreamPosition(
        offset=position.offset + chunk.taken - completed * chunk.block_size,
        block_index=position.block_index + completed,
        fresh=ops.logical_and(position.fresh, completed == 0),
        visible_memories=ops.minimum(position.visible_memories + completed, max_visible_memories),
    )


def where_rows(mask, new, old):
    """Rows of `new` where `mask` `[B]` is True, else rows of `old`; over whole structures."""

    def choose(a, b):
        return ops.where(ops.reshape(mask, (-1,) + (1,) * (len(a.shape) - 1)), a, b)

    return keras.tree.map_structure(choose, new, old)


def broadcast_position(position, batch_size):
    """The position of one row, repeated for `batch_size` rows; one of `batch_size` rows is returned as it is."""
    if position.offset.shape[0] != 1:
        return position
    return StreamPosition(*(ops.broadcast_to(field, (batch_size,)) for field in position))


def select_rows(state, rows):
    """The streams with the given row numbers (a sequence of ints), as a new state."""
    index = np.asarray(rows, "int32").reshape(-1)
    return keras.tree.map_structure(lambda x: ops.take(x, index, axis=0), state)


def replace_rows(state, rows, other):
    """A copy of `state` in which the streams `rows` are those of `other`, in order."""
    index = np.asarray(rows, "int32").reshape(-1, 1)
    return keras.tree.map_structure(lambda x, y: ops.scatter_update(x, index, y), state, other)


def check_structure(state, spec, owner):
    """Raises ValueError unless `state` has the structure, shapes and dtypes of `spec`.

    Args:
        state: what the caller handed in.
        spec: `StreamState` of `Spec`s; None dimensions match anything.
        owner: name used in the message.
    """
    if not isinstance(state, StreamState) or not isinstance(state.layers, tuple):
        raise ValueError(
            f"The state of {owner} is a keras_fam.StreamState; received {type(state).__name__}. Take one from "
            f"`get_initial_state(batch_size)` or from a call with `return_state=True`."
        )
    if len(state.layers) != len(spec.layers):
        raise ValueError(
            f"The state of {owner} has {len(spec.layers)} layer(s); received one with {len(state.layers)}. It was "
            "made by another model: take one from this model's `get_initial_state(batch_size)`."
        )
    groups = [("position", state.position, spec.position)]
    groups += [(f"layers[{i}]", a, b) for i, (a, b) in enumerate(zip(state.layers, spec.layers, strict=True))]
    for name, part, expected in groups:
        if type(part) is not type(expected):
            raise ValueError(
                f"`{name}` of a state of {owner} is a {type(expected).__name__}; received {type(part).__name__}."
            )
        for field in expected._fields:
            _check_field(f"{name}.{field}", getattr(part, field), getattr(expected, field), owner)


def _check_field(name, value, expected, owner):
    if not is_spec(expected):
        if not (isinstance(value, tuple) and not value):
            raise ValueError(
                f"`{name}` of a state of {owner} is empty in this configuration; received a tensor. The state was "
                "made by a layer with other settings."
            )
        return
    shape = getattr(value, "shape", None)
    if shape is None:
        raise ValueError(
            f"`{name}` of a state of {owner} is a tensor of shape {expected.shape}; received {type(value).__name__}. "
            "The state was made by a layer with other settings."
        )
    shape = tuple(shape)
    same = len(shape) == len(expected.shape) and all(
        a is None or b is None or a == b for a, b in zip(shape, expected.shape, strict=True)
    )
    if not same:
        raise ValueError(
            f"`{name}` of a state of {owner} has shape {expected.shape} (None matches any size); received {shape}. "
            "Pass the state of the same layer, made for the same number of rows."
        )
    dtype = keras.backend.standardize_dtype(value.dtype)
    if dtype != expected.dtype:
        raise ValueError(
            f"`{name}` of a state of {owner} has dtype {expected.dtype}; received {dtype}. Cast it, or make the state "
            "under the same dtype policy."
        )


def named_leaves(state, name=""):
    """Pairs `("layers[1].value", tensor)` of a state, in `keras.tree` order."""
    if not isinstance(state, tuple):
        yield name, state
        return
    fields = getattr(state, "_fields", None)
    for i, part in enumerate(state):
        yield from named_leaves(part, f"{name}[{i}]" if fields is None else f"{name}.{fields[i]}".lstrip("."))


def check_finite(state, owner):
    """Raises ValueError if an eager state holds NaN or infinity; symbolic and traced states pass unchecked."""
    for path, leaf in named_leaves(state):
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(leaf.dtype)):
            continue
        if not is_eager(leaf):
            return
        if not bool(ops.convert_to_numpy(ops.all(ops.isfinite(leaf)))):
            raise ValueError(
                f"The state of {owner} is finite; received NaN or infinity in `{path}`. The input "
                "or the weights of an earlier call were not finite: reset the rows or restore an earlier state."
            )
