"""Writing the memory: the scan over completed blocks, memory rows only (Alg. 2, the second half).

A memory row of a layer needs only that layer's keys and values of the block and its own past. So the scan touches F
rows a step and never the tokens; tokens read what it leaves behind, all blocks at once.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_fam.layers.memory_projection import MemoryRows
from keras_fam.ops import masks
from keras_fam.ops.attention import attend
from keras_fam.ops.random import fold_in, noise
from keras_fam.ops.rope import rotate
from keras_fam.ops.scan import branch, scan
from keras_fam.state import where_rows

RMS_EPSILON = 1e-6


class Memory(NamedTuple):
    """A memory and its projections while blocks are read."""

    fam: Any  # [B, F, D], float32 or wider
    residual: Any  # [B, F, D], what the next update adds to; zeros before the first
    query: Any  # [B, F, N, H]
    key: Any  # [B, P·F, K, H], newest memory first
    value: Any  # [B, P·F, K, H]


class Written(NamedTuple):
    """What the scan leaves behind.

    Attributes:
        key: `[B, n, P·F, K, H]`, the memories that the tokens of each block read.
        value: likewise.
        state: `LayerState` with the memory fields after the last completed block.
        rider: `[B, F, D]`, for `initial_fam="summary"`: the rows for the layer above.
    """

    key: Any
    value: Any
    state: Any
    rider: Any


def write_memories(layer, state, position, keys, values, completed, plan, *, every_row, hooks, rider):
    """Updates the memory once per completed block.

    Args:
        layer: the `FeedbackAttention` whose projections are used.
        state: `LayerState` of B rows.
        position: `StreamPosition` before the call.
        keys: `[B, n, S, K, H]` of the blocks that the call touches, rotated by place in block.
        values: `[B, n, S, K, H]`.
        completed: int32 `[B]` (or `[1]`), blocks that the call fills.
        plan: how the tokens lie in blocks, see `reading.py`; `num_blocks` and `num_updates` are read.
        every_row: whether each row takes every update (known when the program is made).
        hooks: `Hooks`.
        rider: the rows that ride up with block 1, see `advance_layer`.

    Returns:
        `Written`.
    """
    norm, write, seed = hooks.norm, hooks.write, hooks.seed
    num_updates, num_blocks = plan.num_updates, plan.num_blocks
    if layer.fam_recurrence == "stack":
        return _write_with_stack(layer, state, keys, values, completed, plan, hooks, rider)
    S, P = layer.block_size, layer.num_visible_memories
    start = ops.cast(position.block_index, layer.memory_dtype) * S + ops.cast(
        position.position_offset, layer.memory_dtype
    )
    first, static = _first_memory(layer, state, position, rider, norm, start)
    if isinstance(num_updates, int) and num_updates == 0:
        key, value = (ops.expand_dims(x, 1) for x in (first[1], first[2]))
        return Written(key, value, state, rider)

    xs = {
        "key": ops.moveaxis(keys[:, :num_updates], 1, 0),
        "value": ops.moveaxis(values[:, :num_updates], 1, 0),
    }
    step_index = ops.arange(num_updates, dtype="int32")
    if not every_row:
        xs["active"] = ops.expand_dims(step_index, 1) < completed
    if P > 1:
        count = ops.maximum(ops.expand_dims(position.visible_memories, 1) + step_index, 1)
        xs["visible"] = ops.moveaxis(masks.visible_memories(count, layer.fam_length, P), 1, 0)
    if layer.fam_position == "zero":
        xs["start"] = start + S * ops.cast(ops.expand_dims(step_index, 1) + 1, layer.memory_dtype)
    if seed is not None:
        xs["seed"] = fold_in(seed, 4 * step_index + 2)

    def initial():
        fam, key, value = first
        query = layer.memory_query(norm(fam if static is None else static), start)
        residual = fam if static is None else static
        if layer.initial_fam != "summary":  # the first update after a fresh start has no residual
            residual = residual * ops.cast(ops.logical_not(position.fresh), residual.dtype)[:, None, None]
        return Memory(fam, residual, query, key, value)

    def step(memory, x, project):
        new = _update(layer, memory, x, static, norm, write, project)
        if "active" in x:
            new = where_rows(x["active"], new, memory)
        read = (memory.key, memory.value)
        return new, read + ((new.fam,) if layer.initial_fam == "summary" else ())

    if isinstance(num_updates, int) and num_updates == 1 and not every_row:
        # Decoding: most calls fill no block, and then nothing of this is computed.
        x = {name: part[0] for name, part in xs.items()}

        def fill():
            new, _ = step(initial(), x, MemoryRows(layer, with_query=static is None))
            return new.fam, new.key, new.value

        fam, key, value = branch(ops.any(completed > 0), fill, lambda: first)
        reads = [ops.expand_dims(part, 1) for part in first[1:]]
        if num_blocks > 1:
            reads = [ops.stack([a, b], axis=1) for a, b in zip(first[1:], (key, value), strict=True)]
        rider = fam if layer.initial_fam == "summary" else None
    else:
        memory, project = initial(), MemoryRows(layer, with_query=static is None)
        like = (memory.key, memory.value) + ((memory.fam,) if layer.initial_fam == "summary" else ())
        memory, ys = scan(lambda memory, x: step(memory, x, project), memory, xs, like, unroll=True)
        reads, fams = ys[:2], ys[2:]
        fam, key, value = memory.fam, memory.key, memory.value
        if not isinstance(num_updates, int) or num_blocks > num_updates:
            last = (ops.expand_dims(part, 0) for part in (key, value))
            reads = [ops.concatenate(parts, axis=0)[:num_blocks] for parts in zip(reads, last, strict=True)]
        reads = [ops.moveaxis(part, 0, 1) for part in reads]
        if fams:
            fams = ops.concatenate([ops.expand_dims(first[0], 0), fams[0]], axis=0)
            rider = fams[1] if isinstance(num_updates, int) else fams[ops.minimum(num_updates, 1)]
    after = (fam, key, value)
    if layer.initial_fam == "summary":
        filled = completed > 0
        after = where_rows(filled, after, (state.fam, state.fam_key, state.fam_value))
        if static is not None:
            static = where_rows(filled, static, state.static_fam)
    fam, key, value = after
    state = state._replace(fam=fam, fam_key=key, fam_value=value, static_fam=() if static is None else static)
    return Written(*reads, state, rider)


def _write_with_stack(layer, state, keys, values, completed, plan, hooks, rider):
    """`write_memories` where the memory belongs to the whole stack: the backbone reads block by block, so the first
    block is the only one that the call can fill."""

    def ride():
        return ride_up(layer, state, keys[:, 0], values[:, 0], hooks, rider)

    read = (ops.repeat(ops.expand_dims(part, 1), plan.num_blocks, axis=1) for part in (state.fam_key, state.fam_value))
    if plan.num_updates:
        decoding = plan.in_slots and plan.num_blocks == 1  # mostly, no block is filled
        rider = branch(ops.any(completed > 0), ride, lambda: rider) if decoding else ride()
    return Written(*read, state, rider)


def _first_memory(layer, state, position, rider, norm, start):
    """`((fam, key, value), static)` at the start of the call: the state's, or the rider's for rows that start anew."""
    memory = (state.fam, state.fam_key, state.fam_value)
    static = state.static_fam if layer.fam_query == "static" else None
    if layer.initial_fam != "summary":
        return memory, static
    rider = ops.broadcast_to(ops.cast(rider, layer.memory_dtype), ops.shape(state.fam))
    key, value = layer.memory_key_value(norm(rider), start)
    older = state.fam_key[:, layer.fam_length :]
    key, value = (ops.concatenate([x, ops.zeros_like(older)], axis=1) for x in (key, value))
    memory = where_rows(position.fresh, (rider, key, value), memory)
    return memory, None if static is None else where_rows(position.fresh, rider, static)


def _update(layer, memory, x, static, norm, write, project):
    """F_τ from F_{τ−1} and one block: attend to the memories and the whole block, then write."""
    mask = None
    if "visible" in x:
        block = ops.ones((1, layer.block_size), "bool")
        visible = x["visible"]
        mask = ops.concatenate([visible, ops.broadcast_to(block, (ops.shape(visible)[0], layer.block_size))], axis=1)
        mask = ops.expand_dims(mask, 1)
    key = ops.concatenate([memory.key, x["key"]], axis=1)
    value = ops.concatenate([memory.value, x["value"]], axis=1)
    attended = layer.project_output(attend(memory.query, key, value, mask, layer.attention_softcap))
    seed = x.get("seed")
    fam = fed_back(layer, write(attended, memory.residual, seed), fold_in(seed, 3))
    return _read_for_next_block(layer, memory, fam, static, norm, project, x.get("start"))


def fed_back(layer, fam, seed=None):
    """What the next block gets of a memory `[B, F, D]` that was written: normalised and disturbed if settings say so.

    Args:
        layer: the `FeedbackAttention`.
        fam: the memory.
        seed: None, or an integer tensor `[2]` for noise.
    """
    if layer.fam_feedback == "normalized":
        fam = fam * ops.rsqrt(ops.mean(ops.square(fam), axis=-1, keepdims=True) + RMS_EPSILON)
    if layer.fam_feedback == "binary":
        fam = _signs(fam)
    if not layer.fam_noise or seed is None:
        return fam
    drawn = layer.fam_noise * ops.cast(layer.noise_scale, fam.dtype) * noise(ops.shape(fam), fam.dtype, seed)
    if layer.fam_feedback == "binary":  # a number is turned round where noise outweighs it: no size protects it
        return fam * ops.where(1.0 + drawn > 0, ops.ones_like(fam), -ops.ones_like(fam))
    return fam + drawn * ops.sqrt(ops.mean(ops.square(fam), axis=-1, keepdims=True))


def ride_up(layer, state, key, value, hooks, rider):
    """One layer's part of writing the memory of a whole stack (`fam_recurrence="stack"`, RMT).

    The rows that the layer below wrote attend to the rows that this block's tokens read, to one another and to the
    whole block, never to the memory segments. They stand at the last F places of the block.

    Args:
        layer: the `FeedbackAttention`.
        state: `LayerState` of B rows.
        key: `[B, S, K, H]`, keys of a complete block, rotated by place in block.
        value: `[B, S, K, H]`.
        hooks: `Hooks`.
        rider: `[B, F, D]`, the rows from the layer below; for the bottom layer, the memory that was fed back.

    Returns:
        `[B, F, D]`, the rows for the layer above.
    """
    table = layer.positions.tokens(ops.arange(layer.block_size - layer.fam_length, layer.block_size, dtype="int32"))
    normed = hooks.norm(rider)
    query = rotate(layer.project_query(normed), table)
    own_key, own_value = layer.project_key_value(normed)
    key = ops.concatenate([state.fam_key, rotate(own_key, table), key], axis=1)
    value = ops.concatenate([state.fam_value, own_value, value], axis=1)
    attended = layer.project_output(attend(query, key, value, None, layer.attention_softcap))
    return hooks.write(attended, rider, fold_in(hooks.seed, 2))


def _signs(fam):
    """1 or −1 for every number. Gradients pass as if nothing had been done, where |fam| ≤ 2: that is as far as an
    update has to go to turn a number round, and a little further."""
    clipped = ops.clip(fam, -2.0, 2.0)
    signs = ops.cast(ops.where(fam >= 0, 1.0, -1.0), fam.dtype)
    return clipped + ops.stop_gradient(signs - clipped)


def _read_for_next_block(layer, memory, fam, static, norm, project, start):
    """Projects a new memory once, for all tokens and rows of the next block; older memories move one block back."""
    query, key, value = project(norm(fam), start)
    if layer.num_visible_memories > 1:
        kept = (layer.num_visible_memories - 1) * layer.fam_length
        key = ops.concatenate([key, rotate(memory.key[:, :kept], layer.positions.back(1))], axis=1)
        value = ops.concatenate([value, memory.value[:, :kept]], axis=1)
    if static is None:
        return Memory(fam, fam, query, key, value)
    if layer.fam_position == "zero":  # the one case in which the query's place moves
        return Memory(fam, static, layer.memory_query(norm(static), start), key, value)
    return Memory(fam, static, memory.query, key, value)
