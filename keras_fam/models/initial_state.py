"""The state that rows of a model start from: learned, or handed over by an earlier training step."""

from keras import ops

from keras_fam.distribution.state_sharding import shard_state
from keras_fam.state import StreamState, broadcast_position, initial_position


def make_initial_state(backbone, batch_size, *, shared_position=False, position_offset=None, passed=None):
    """Empty keys, and every layer's first memory.

    Args:
        backbone: a built `TransformerFAMBackbone`.
        batch_size: B.
        shared_position: whether one row of position may stand for all B (they then have to take equal steps).
        position_offset: None, or float32 `[B]`, Random Position Offset (App. B.2.2).
        passed: None, or `(rows, memory)` of Random State Passing: bool `[B]` and float32 `[L, F, D]`. A memory that
            is passed on is not fresh: its first update keeps the residual.

    Returns:
        `StreamState`.
    """
    first = backbone.first_memories()
    exists = 0 if first[0] is None else 1
    per_row = position_offset is not None or passed is not None
    position = initial_position(batch_size if per_row or not shared_position else 1, exists)
    start = None
    if position_offset is not None:
        position = position._replace(position_offset=position_offset)
        start = position_offset
    rows = None
    if passed is not None:
        rows, memory = passed
        position = position._replace(
            fresh=ops.logical_not(rows), visible_memories=ops.where(rows, 1, position.visible_memories)
        )
    layers = []
    for i, (block, fam) in enumerate(zip(backbone.blocks, first, strict=True)):
        static = fam
        if rows is not None:
            learned = ops.zeros((1, 1, 1), memory.dtype) if fam is None else fam
            fam = ops.where(rows[:, None, None], ops.cast(memory[i : i + 1], learned.dtype), learned)
        layers.append(block.initial_layer_state(batch_size, fam, start=start, static=static))
    position = position if shared_position else broadcast_position(position, batch_size)
    return shard_state(StreamState(position, tuple(layers)))
