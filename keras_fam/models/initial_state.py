"""The state that rows of a model start from: learned, or passed on by an earlier training step."""

from keras import ops

from keras_fam.distribution.state_sharding import shard_state
from keras_fam.state import StreamState, broadcast_position, initial_position


def make_initial_state(backbone, batch_size, *, shared_position=False, passed=None):
    """Empty keys, and every layer's first memory.

    Args:
        backbone: a built `TransformerFAMBackbone`.
        batch_size: B.
        shared_position: whether one row of position may stand for all B, which then have to take equal steps.
        passed: None, or `(rows, memory)` of Random State Passing: bool `[B]` and float32 `[L, F, D]`. A memory that
            is passed on is not fresh: its first update keeps the residual.

    Returns:
        `StreamState`.
    """
    first = backbone.first_memories()
    exists = 0 if first[0] is None else 1
    position = initial_position(1 if shared_position and passed is None else batch_size, exists)
    if passed is not None:
        rows, memory = passed
        position = position._replace(
            fresh=ops.logical_not(rows), visible_memories=ops.where(rows, 1, position.visible_memories)
        )
    layers = []
    for i, (block, fam) in enumerate(zip(backbone.blocks, first, strict=True)):
        learned = fam
        if passed is not None:
            fam = ops.zeros((1, 1, 1), memory.dtype) if fam is None else fam
            fam = ops.where(rows[:, None, None], ops.cast(memory[i : i + 1], fam.dtype), fam)
        layers.append(block.initial_layer_state(batch_size, fam, learned))
    position = position if shared_position else broadcast_position(position, batch_size)
    return shard_state(StreamState(position, tuple(layers)))
