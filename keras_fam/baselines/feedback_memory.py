"""FM: memory segments that hold a layer's outputs (App. C.2).

The tokens of a block attend to keys and values projected from this layer's *outputs* in the m previous blocks, by the
layer's own norm and projections; in their own block they attend to projected inputs, as ever. An output exists once
its block is computed, so blocks are read one after the other. Outputs are projected once, when they are computed: the
weights do not change within a call, so projecting them afresh in every later block would give the same numbers.

A segment is a whole past block: outputs of the unfinished block wait in `FeedbackMemoryState.output_key` until it is
full.
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_fam.layers.chunk_attention import attend_tokens, project_tokens, rows_to_read
from keras_fam.layers.transformer_fam_block import TransformerFAMBlock
from keras_fam.layers.validation import require_feedback
from keras_fam.models.transformer_fam_backbone import TransformerFAMBackbone
from keras_fam.ops import block_layout, ragged
from keras_fam.ops.backend import indices
from keras_fam.ops.random import fold_in
from keras_fam.ops.rope import rotate
from keras_fam.ops.scan import scan
from keras_fam.state import Spec

SEEDS = 2048  # numbers of the seeds of tokens; smaller ones are those of memory rows


class FeedbackMemoryState(NamedTuple):
    """`LayerState`, and the projected outputs of the unfinished block.

    Attributes:
        key, value: as in `LayerState`, but the first m·S slots hold keys and values of outputs.
        fam, fam_key, fam_value, sink_key, sink_value: as in `LayerState`; there are no sinks here.
        output_key: `[B, S, K, H]`, keys of the outputs in the unfinished block.
        output_value: `[B, S, K, H]`, their values.
    """

    key: Any
    value: Any
    fam: Any = ()
    fam_key: Any = ()
    fam_value: Any = ()
    sink_key: Any = ()
    sink_value: Any = ()
    output_key: Any = ()
    output_value: Any = ()


@keras.saving.register_keras_serializable(package="keras_fam")
class FeedbackMemoryBlock(TransformerFAMBlock):
    """A `TransformerFAMBlock` whose memory segments hold outputs (FM); `fam_length=0` is the paper's form.

    Args: those of `TransformerFAMBlock`; `memory_segments` must be at least 1.
    """

    keeps_tokens_apart = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.attention.memory_segments:
            raise ValueError(
                "The memory segments of FM hold outputs, so `memory_segments` must be at least 1; received 0."
            )
        if self.attention.attention_sinks:
            raise ValueError("FM has no attention sinks; leave `attention_sinks` out.")
        require_feedback("FM", self.attention)

    def layer_state_spec(self, batch_size=None):
        state = super().layer_state_spec(batch_size)
        own = Spec((batch_size, self.block_size, *state.key.shape[2:]), state.key.dtype)
        return FeedbackMemoryState(*state, output_key=own, output_value=own)

    def initial_layer_state(self, batch_size, fam, learned=None):
        state = super().initial_layer_state(batch_size, fam)
        shape = (batch_size, self.block_size, *state.key.shape[2:])
        own = [ops.zeros(shape, state.key.dtype) for _ in range(2)]
        return FeedbackMemoryState(*state, output_key=own[0], output_value=own[1])

    def forward_chunk(self, x, state, position, chunk, *, seed=None, rows_below=None):
        if chunk.positional and not chunk.one_block:  # a block needs the outputs of the one before
            chunk = chunk._replace(positional=False)
        x = chunk.zero_padding(x)
        tokens = project_tokens(self, x, state, position, chunk)
        memory = None
        if self.fam_length:
            memory, state, rows_below = self.scan_memory(
                state, position, *tokens[1:], chunk, seed=seed, rows_below=rows_below
            )
        if chunk.one_block:
            rows = rows_to_read(self.attention, state, memory, position, chunk)
            attended = attend_tokens(self.attention, *tokens, rows, position, chunk)
            y = self.token_output(attended, x, seed)
            outputs = self._lay_out_outputs(y, state, position, chunk) if chunk.keep_state else None
        else:
            y, *outputs = self._read_in_turn(x, tokens, memory, state, position, chunk, seed)
        state = self._keep_outputs(state, *tokens[1:], outputs, chunk) if chunk.keep_state else None
        return y, state, rows_below

    def _project_outputs(self, y, table):
        """Keys, rotated by place in block, and values of outputs `[B, *, D]`."""
        key, value = self.attention.project_key_value(self.pre_norm(y))
        return rotate(key, table), value

    def _read_in_turn(self, x, tokens, memory, state, position, chunk, seed):
        """Attention and everything after it, block after block.

        Returns:
            `(y, output_keys, output_values)`: `[B, T, D]` and `[B, n, S, K, H]`.
        """
        query, keys, values = tokens
        S, m, num_blocks = self.block_size, self.attention.memory_segments, chunk.num_blocks
        if chunk.aligned:
            begin, placed = 0, [block_layout.to_blocks(part, S, num_blocks) for part in (x, query)]
        else:
            begin = ops.expand_dims(position.offset, 1)
            placed = [block_layout.place_queries(part, position.offset, S, num_blocks) for part in (x, query)]
        taken = chunk.taken
        end = begin + (ops.expand_dims(taken, 1) if len(getattr(taken, "shape", ())) else taken)
        table = self.attention.positions.tokens(indices(S))
        xs = dict(zip(("x", "query"), placed, strict=True), key=keys[:, m:], value=values[:, m:])
        if memory is not None:
            xs.update(memory_key=memory[0], memory_value=memory[1])
        xs = {name: ops.moveaxis(part, 1, 0) for name, part in xs.items()}
        xs["index"] = chunk.block_offsets
        if seed is not None:
            xs["seed"] = fold_in(seed, SEEDS + 4 * chunk.block_offsets)
        one = chunk._replace(alignment="block", positional=False, num_blocks=1, length=S)

        def step(segments, given):
            window = [
                ops.concatenate([held, ops.expand_dims(given[name], 1)], axis=1)
                for held, name in zip(segments, ("key", "value"), strict=True)
            ]
            here = position._replace(
                block_index=position.block_index + given["index"],
                visible_memories=position.visible_memories + given["index"],
            )
            read = None
            if memory is not None:
                read = tuple(ops.expand_dims(given[name], 1) for name in ("memory_key", "memory_value"))
            rows = rows_to_read(self.attention, state, read, here, one)
            attended = attend_tokens(self.attention, given["query"], *window, rows, here, one)
            y = self.token_output(attended, given["x"], given.get("seed"))
            place = ops.expand_dims(given["index"] * S + indices(S), 0)
            real = ops.broadcast_to(ops.logical_and(place >= begin, place < end), ops.shape(y)[:2])
            outputs = [ragged.zero_rows(part, real) for part in self._project_outputs(y, table)]
            if not chunk.aligned:  # the first block may hold outputs of earlier calls; zeros stand behind them
                first = ops.cast(given["index"] == 0, outputs[0].dtype)
                held = (state.output_key, state.output_value)
                outputs = [part + first * own for part, own in zip(outputs, held, strict=True)]
            segments = tuple(
                ops.concatenate([held[:, 1:], ops.expand_dims(part, 1)], axis=1)
                for held, part in zip(segments, outputs, strict=True)
            )
            return segments, (y, *outputs)

        like = (xs["x"][0], xs["key"][0], xs["value"][0])
        _, ys = scan(step, (keys[:, :m], values[:, :m]), xs, like)
        y, output_keys, output_values = (ops.moveaxis(part, 0, 1) for part in ys)
        if chunk.aligned:
            return block_layout.to_slots(y)[:, : chunk.length], output_keys, output_values
        return block_layout.read_back(y, position.offset, chunk.length), output_keys, output_values

    def _lay_out_outputs(self, y, state, position, chunk):
        """Projected outputs of one token a row, `[B, 1, S, K, H]` each, with those of earlier calls before them."""
        table = self.attention.positions.tokens(ops.mod(chunk.position, self.block_size))
        new = self._project_outputs(y, table)
        real = ops.broadcast_to(ops.reshape(ops.convert_to_tensor(chunk.taken) > 0, (-1, 1)), ops.shape(y)[:2])
        return [
            block_layout.lay_out(held, ragged.zero_rows(part, real), position.offset, chunk.taken, self.block_size, 1)
            for held, part in zip((state.output_key, state.output_value), new, strict=True)
        ]

    def _keep_outputs(self, state, keys, values, outputs, chunk):
        """The state after a call: segments of outputs, and inputs and outputs of the unfinished block."""
        m, S, completed = self.attention.memory_segments, self.block_size, chunk.completed
        if chunk.uniform and isinstance(chunk.length, int):
            completed = chunk.length // S
        slots, waiting = [], []
        for inputs, part in zip((keys, values), outputs, strict=True):
            kept = block_layout.keep_last(ops.concatenate([inputs[:, :m], part], axis=1), completed, m)
            own = block_layout.keep_last(inputs[:, m:], completed, 0)
            slots.append(ops.concatenate([kept[:, : m * S], own], axis=1))
            waiting.append(kept[:, m * S :])
        return state._replace(key=slots[0], value=slots[1], output_key=waiting[0], output_value=waiting[1])


@keras.saving.register_keras_serializable(package="keras_fam")
class FeedbackMemoryBackbone(TransformerFAMBackbone):
    """A `TransformerFAMBackbone` of `FeedbackMemoryBlock`s (FM, App. C.2), with the same arguments.

    ```python
    fm_2 = keras_fam.baselines.FeedbackMemoryBackbone(
        1000, 2, 64, 4, 128, block_size=32, memory_segments=2, fam_length=0
    )
    ```

    Reading is sequential over blocks.
    """

    block_class = FeedbackMemoryBlock
