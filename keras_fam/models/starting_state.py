"""The state that rows of a model start from: learned, or handed over by an earlier training step."""

from keras import ops

from keras_fam.sharding import shard_state
from keras_fam.state import StreamState, broadcast_cursor, initial_cursor


def starting_state(backbone, batch_size, *, shared_cursor=False, position_offset=None, passed=None):
    """Empty keys, and every layer's first memory.

    Args:
        backbone: a built `TransformerFAMBackbone`.
        batch_size: B.
        shared_cursor: whether one row of cursor may stand for all B (they then have to take equal steps).
        position_offset: None, or float32 `[B]`, Random Position Offset (App. B.2.2).
        passed: None, or `(rows, memory)` of Random State Passing: bool `[B]` and float32 `[L, F, D]`. A memory that
            is passed on is not fresh: its first update keeps the residual.

    Returns:
        `StreamState`.
    """
    first = backbone.first_memories()
    exists = 0 if first[0] is None else 1
    per_row = position_offset is not None or passed is not None
    cursor = initial_cursor(batch_size if per_row or not shared_cursor else 1, exists)
    start = None
    if position_offset is not None:
        cursor = cursor._replace(position_offset=position_offset)
        start = position_offset
    rows = None
    if passed is not None:
        rows, memory = passed
        cursor = cursor._replace(
            fresh=ops.logical_not(rows), visible_memories=ops.where(rows, 1, cursor.visible_memories)
        )
    layers = []
    for i, (block, fam) in enumerate(zip(backbone.blocks, first, strict=True)):
        static = fam
        if rows is not None:
            learned = ops.zeros((1, 1, 1), memory.dtype) if fam is None else fam
            fam = ops.where(rows[:, None, None], ops.cast(memory[i : i + 1], learned.dtype), learned)
        layers.append(block.initial_layer_state(batch_size, fam, start=start, static=static))
    cursor = cursor if shared_cursor else broadcast_cursor(cursor, batch_size)
    return shard_state(StreamState(cursor, tuple(layers)))
