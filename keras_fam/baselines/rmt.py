"""RMT: the memory of a whole stack (Fig. 7; Bulatov et al., 2022), `fam_recurrence="stack"`.

One memory M_τ `[F, D]` at the level of token embeddings. In block τ+1 it takes part twice, so that no token sees a
later one: as *read rows*, which go up the layers alone, seeing one another, and which the block's tokens attend to;
and, once the block is full, as *write rows*, which go up from M_τ again and attend in each layer to the read rows, to
one another and to the whole block. What the write rows are above the top layer is M_{τ+1}. `LayerState.fam` holds the
read rows below each layer, so the bottom layer's is M_τ itself. M_0 is the memory prompt, and its read rows are F_0 of
App. B.1.

Blocks follow one another here, all layers of one before the next begins.
"""

from keras import ops

from keras_fam.layers.memory_scan import fed_back
from keras_fam.ops import block_layout as block_ops
from keras_fam.ops.ragged import gather
from keras_fam.ops.random import fold_in
from keras_fam.ops.scan import branch, scan
from keras_fam.state import broadcast_position, where_rows

TOP_SEED = 7  # behind the seeds that the bottom layer uses for its memory rows


def feed_to_bottom(backbone, layers, rider, completed, seed=None):
    """The layers' states with the read rows of a new memory, in the rows whose block was filled.

    Args:
        backbone: a `TransformerFAMBackbone` whose memory is that of the stack.
        layers: a list of `LayerState` after the tokens.
        rider: `[B, F, D]`, what the top layer wrote.
        completed: int32 `[B]` (or `[1]`), 0 or 1.
        seed: None, or an integer tensor `[2]` for noise.
    """
    held = [(layer.fam, layer.fam_key, layer.fam_value) for layer in layers]

    def read_rows():
        rows, new = fed_back(backbone.blocks[0].attention, rider, fold_in(seed, TOP_SEED)), []
        for block in backbone.blocks:
            start = ops.zeros((1,), block.attention.memory_dtype)
            new.append((rows, *block.attention.memory_key_value(block.norm_input(rows), start)))
            rows = block.forward_prompt(rows)
        return where_rows(completed > 0, new, held)

    rows = branch(ops.any(completed > 0), read_rows, lambda: held)
    return [
        layer._replace(fam=fam, fam_key=key, fam_value=value)
        for layer, (fam, key, value) in zip(layers, rows, strict=True)
    ]


def scan_blocks(backbone, x, state, *, start, lengths=None, seed=None):
    """Tokens that may lie anywhere in their blocks, one block of each row after the other.

    Args:
        backbone: a `TransformerFAMBackbone`.
        x: `[B, T, D]`, embedded tokens; T may be known at run time only (TensorFlow).
        state: `StreamState`.
        start: see `advance_layer`.
        lengths: None, or int32 `[B]`.
        seed: None, or an integer tensor `[2]`.

    Returns:
        `(y, state)`.
    """
    S, length = backbone.block_size, ops.shape(x)[1]
    last = ops.maximum(length - 1, 0)
    taken = length if lengths is None else lengths
    num_blocks = (length + 2 * S - 2) // S if start == "anywhere" else (length + S - 1) // S
    block = ops.expand_dims(ops.arange(num_blocks, dtype="int32") * S, 1)  # [n, 1], first place of each
    offset = ops.broadcast_to(state.position.offset, ops.shape(x)[:1])
    # Row b reads tokens first … first + count − 1 in block j; the first block goes on where the row stands.
    first = ops.maximum(block - offset, 0)
    count = ops.clip(offset + taken - block, 0, S) - ops.clip(offset - block, 0, S)
    source = ops.expand_dims(first, 2) + ops.arange(S, dtype="int32")
    inside = ops.arange(S, dtype="int32") < ops.expand_dims(count, 2)
    tokens = gather(x, ops.reshape(ops.transpose(ops.minimum(source, last), (1, 0, 2)), (-1, num_blocks * S)))
    tokens = ops.transpose(block_ops.to_blocks(tokens, S, num_blocks), (1, 0, 2, 3))
    tokens = ops.where(ops.expand_dims(inside, -1), tokens, ops.zeros((), tokens.dtype))
    xs = {"x": tokens, "lengths": ops.cast(count, "int32")}
    if seed is not None:
        xs["seed"] = fold_in(seed, 1 + 4096 * backbone.num_layers * ops.arange(num_blocks, dtype="int32"))

    def body(state, given):
        y, state = backbone._advance_layers(
            given["x"], state, start="anywhere", lengths=given["lengths"], seed=given.get("seed")
        )
        return state, (y,)

    state = state._replace(position=broadcast_position(state.position, ops.shape(x)[0]))
    state, (ys,) = scan(body, state, xs, (xs["x"][0],))
    place = ops.expand_dims(offset, 1) + ops.arange(length, dtype="int32")  # [B, T]
    within = ops.floor_divide(place, S)
    index = within * S + ops.arange(length, dtype="int32") - ops.maximum(within * S - ops.expand_dims(offset, 1), 0)
    return gather(block_ops.to_slots(ops.moveaxis(ys, 0, 1)), index), state
