"""RMT: one memory for the whole stack of layers (Fig. 7; Bulatov et al., 2022).

One memory M_τ `[F, D]` at the level of token embeddings. In block τ+1 it takes part twice, so that no token sees a
later one: as *read rows*, which pass up the layers alone, seeing one another, and which the block's tokens attend to;
and, once the block is full, as *write rows*, which pass up from M_τ again and attend in each layer to the read rows, to
one another and to the whole block. What the write rows are above the top layer is M_{τ+1}. `LayerState.fam` holds the
read rows below each layer, so the bottom layer's is M_τ itself. M_0 is the memory prompt, and its read rows are F_0 of
App. B.1.

Blocks follow one another here, all layers of one before the next begins.
"""

import keras
from keras import ops

from keras_fam.distribution.state_sharding import shard_state
from keras_fam.layers.chunk import make_chunk
from keras_fam.layers.transformer_fam_block import TransformerFAMBlock
from keras_fam.layers.validation import require_feedback
from keras_fam.models.scan_layers import SEEDS_PER_LAYER
from keras_fam.models.scan_steps import scan_steps
from keras_fam.models.transformer_fam_backbone import TransformerFAMBackbone
from keras_fam.ops import block_layout
from keras_fam.ops.attention import attend
from keras_fam.ops.backend import indices
from keras_fam.ops.ragged import gather
from keras_fam.ops.random import fold_in
from keras_fam.ops.rope import rotate
from keras_fam.ops.scan import scan
from keras_fam.state import StreamState, advance_position, broadcast_position, where_rows

TOP_SEED = 7  # behind the seeds that the bottom layer uses for its memory rows


@keras.saving.register_keras_serializable(package="keras_fam")
class RMTBlock(TransformerFAMBlock):
    """One layer of an `RMTBackbone`. It reads the memory and hands the write rows to the layer above."""

    def scan_memory(self, state, position, keys, values, chunk, *, seed=None, rows_below=None):
        """The chunk lies in one block. `rows_below` are the write rows from the layer below; for the bottom layer,
        the memory that was fed back."""
        write_rows, m = rows_below, self.attention.memory_segments

        def write():
            return self._write(state, keys[:, m], values[:, m], write_rows, seed)

        parts = (state.fam_key, state.fam_value)
        memory = tuple(ops.repeat(ops.expand_dims(part, 1), chunk.num_blocks, axis=1) for part in parts)
        if not chunk.num_updates:
            return memory, state, write_rows
        if chunk.one_block:  # decoding: mostly, no block is completed
            return memory, state, chunk.on_completion(write, lambda: write_rows)
        return memory, state, write()

    def _write(self, state, key, value, write_rows, seed):
        """Write rows `[B, F, D]` attend to the read rows, to one another and to the block `[B, S, K, H]`, never to the
        memory segments. They stand at the last F positions of the block."""
        attention = self.attention
        places = ops.arange(attention.block_size - attention.fam_length, attention.block_size, dtype="int32")
        table = attention.positions.tokens(places)
        normed = self.pre_norm(write_rows)
        query = rotate(attention.project_query(normed), table)
        own_key, own_value = attention.project_key_value(normed)
        key = ops.concatenate([state.fam_key, rotate(own_key, table), key], axis=1)
        value = ops.concatenate([state.fam_value, own_value, value], axis=1)
        attended = attend(query, key, value, None, **attention.softmax_settings)
        return self.memory_output(attended, write_rows, fold_in(seed, 2))


@keras.saving.register_keras_serializable(package="keras_fam")
class RMTBackbone(TransformerFAMBackbone):
    """A `TransformerFAMBackbone` whose top layer's memory feeds the bottom layer one block later, with the same
    arguments.

    ```python
    rmt = keras_fam.baselines.RMTBackbone(1000, 2, 64, 4, 128, block_size=32, memory_segments=0, fam_length=8)
    ```

    Reading is sequential over blocks.

    Raises:
        ValueError: for settings that RMT does not have: `initial_fam` other than `"prompt"`, several visible memories,
            `fam_position="float"`, attention sinks, `fam_query="anchored"`, or `scan_layers=True`.
    """

    block_class = RMTBlock

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        require_feedback("RMT", self.blocks[0].attention)
        needed = {"initial_fam": "prompt", "fam_position": "last", "num_visible_memories": 1, "attention_sinks": 0}
        for name, value in needed.items():
            found = getattr(self.blocks[0].attention, name)
            if self.fam_length and found != value:
                raise ValueError(f"RMT has `{name}={value!r}`; received {found!r}. Leave the setting out.")
        if self.scan_layers:
            raise ValueError(
                "RMT hands the top layer's memory to the bottom one, which the loop of `scan_layers=True` does not; "
                "leave `scan_layers` out."
            )

    def forward_embedded(self, x, state, chunk, *, seed=None, training=False):
        if not self.fam_length:
            return super().forward_embedded(x, state, chunk, seed=seed, training=training)
        length = x.shape[1]
        if not isinstance(length, int) or (not chunk.aligned and length > 1):
            return scan_blocks(self, x, state, chunk, seed=seed, training=training)
        if not chunk.aligned or length <= self.block_size:
            return self.forward_layers(x, state, chunk, seed=seed, training=training)
        return scan_steps(self, x, state, chunk, self.block_size, seed=seed, training=training)

    def forward_layers(self, x, state, chunk, *, seed=None, training=False):
        if not self.fam_length:
            return super().forward_layers(x, state, chunk, seed=seed, training=training)
        memory = state.layers[0].fam
        x, layers, written = self.run_layers(x, state, chunk, seed=seed, training=training, rows_below=memory)
        if not chunk.keep_state:
            return x, None
        layers = self._feed_to_bottom(layers, written, chunk, state.position.fresh, seed)
        return x, shard_state(StreamState(advance_position(state.position, chunk, 1), tuple(layers)))

    def _feed_to_bottom(self, layers, written, chunk, fresh, seed):
        """The layers' states with the read rows of a new memory, in the rows whose block was filled.

        Args:
            layers: a list of `LayerState` after the tokens.
            written: `[B, F, D]`, what the top layer wrote.
            chunk: the `Chunk`, within one block.
            fresh: bool `[B]` (or `[1]`), rows that have written no memory before.
            seed: None, or an integer tensor `[2]` for noise.
        """
        held = [(layer.fam, layer.fam_key, layer.fam_value) for layer in layers]

        def read_rows():
            update = self.blocks[0].attention.memory_update
            rows, new = update.call(written, layers[0].fam, seed=fold_in(seed, TOP_SEED), fresh=fresh), []
            for block in self.blocks:
                new.append((rows, *block.attention.memory_key_value(block.pre_norm(rows))))
                rows = block.forward_rows(rows)
            return where_rows(chunk.completed > 0, new, held)

        rows = chunk.on_completion(read_rows, lambda: held)
        return [
            layer._replace(fam=fam, fam_key=key, fam_value=value)
            for layer, (fam, key, value) in zip(layers, rows, strict=True)
        ]


def scan_blocks(backbone, x, state, chunk, *, seed=None, training=False):
    """Tokens at any position of their blocks, one block of each row after the other.

    Args:
        backbone: an `RMTBackbone`.
        x: `[B, T, D]`, embedded tokens; T may be known at run time only (TensorFlow).
        state: `StreamState`.
        chunk: `Chunk` of the T tokens.
        seed: None, or an integer tensor `[2]`.
        training: whether dropout and noise are applied.

    Returns:
        `(y, state)`.
    """
    S, length, num_blocks = backbone.block_size, chunk.length, chunk.num_blocks
    last = ops.maximum(length - 1, 0)
    block = ops.expand_dims(indices(num_blocks) * S, 1)  # [n, 1], first place of each
    offset = ops.broadcast_to(state.position.offset, ops.shape(x)[:1])
    # Row b reads tokens first … first + count − 1 in block j; the first block continues where the row is.
    first = ops.maximum(block - offset, 0)
    count = ops.clip(offset + chunk.taken - block, 0, S) - ops.clip(offset - block, 0, S)
    source = ops.expand_dims(first, 2) + indices(S)
    inside = indices(S) < ops.expand_dims(count, 2)
    tokens = gather(x, ops.reshape(ops.transpose(ops.minimum(source, last), (1, 0, 2)), (-1, num_blocks * S)))
    tokens = ops.transpose(block_layout.to_blocks(tokens, S, num_blocks), (1, 0, 2, 3))
    tokens = ops.where(ops.expand_dims(inside, -1), tokens, ops.zeros((), tokens.dtype))
    xs = {"x": tokens, "lengths": ops.cast(count, "int32")}
    if seed is not None:
        xs["seed"] = fold_in(seed, 1 + SEEDS_PER_LAYER * backbone.num_layers * indices(num_blocks))

    def step(state, given):
        part = make_chunk(given["x"], state.position, S, "unaligned", lengths=given["lengths"])
        y, state = backbone.forward_layers(given["x"], state, part, seed=given.get("seed"), training=training)
        return state, (y,)

    state = state._replace(position=broadcast_position(state.position, ops.shape(x)[0]))
    state, (ys,) = scan(step, state, xs, (xs["x"][0],))
    place = ops.expand_dims(offset, 1) + indices(length)  # [B, T]
    within = ops.floor_divide(place, S)
    index = within * S + indices(length) - ops.maximum(within * S - ops.expand_dims(offset, 1), 0)
    return gather(block_layout.to_slots(ops.moveaxis(ys, 0, 1)), index), state
