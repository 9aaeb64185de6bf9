"""SUM FAM: static summary tokens (App. C.3). The same learned rows ask in every block, where FAM copies its memory.

What the rows write is read as a memory by the next block, but it is not fed back into the query or the residual.
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_fam.layers.memory_scan import WritingRows
from keras_fam.layers.transformer_fam_block import TransformerFAMBlock
from keras_fam.layers.validation import require_feedback
from keras_fam.models.transformer_fam_backbone import TransformerFAMBackbone
from keras_fam.state import where_rows


class SummaryLayerState(NamedTuple):
    """`LayerState`, and the rows that write every block.

    Attributes:
        key, value, fam, fam_key, fam_value, sink_key, sink_value: as in `LayerState`.
        static_fam: float32 `[B, F, D]`, F_0 of the row's stream.
    """

    key: Any
    value: Any
    fam: Any = ()
    fam_key: Any = ()
    fam_value: Any = ()
    sink_key: Any = ()
    sink_value: Any = ()
    static_fam: Any = ()


@keras.saving.register_keras_serializable(package="keras_fam")
class SummaryFAMBlock(TransformerFAMBlock):
    """A `TransformerFAMBlock` whose memory is written by static rows (SUM FAM).

    Args: those of `TransformerFAMBlock`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        require_feedback("SUM FAM", self.attention)

    def layer_state_spec(self, batch_size=None):
        state = super().layer_state_spec(batch_size)
        return SummaryLayerState(*state, static_fam=state.fam)

    def initial_layer_state(self, batch_size, fam, learned=None):
        state = super().initial_layer_state(batch_size, fam)
        if not self.fam_length:
            return SummaryLayerState(*state)
        static = ops.copy(state.fam) if learned is None else ops.cast(learned, state.fam.dtype)
        return SummaryLayerState(*state, static_fam=ops.broadcast_to(static, ops.shape(state.fam)))

    def writing_rows(self, state, position, chunk, rows_below):
        static = self._static_rows(state, position, rows_below)
        query = self.attention.memory_query(self.pre_norm(static))
        residual = ops.expand_dims(static, 1)
        if self.initial_fam != "summary":  # the first update after a reset has no residual
            first = ops.logical_and(ops.expand_dims(position.fresh, 1), ops.expand_dims(chunk.block_offsets == 0, 0))
            residual = ops.where(first[:, :, None, None], ops.zeros((), residual.dtype), residual)
        shape = (ops.shape(static)[0], chunk.num_blocks)
        return WritingRows(
            ops.broadcast_to(ops.expand_dims(query, 1), (*shape, *query.shape[1:])),
            ops.broadcast_to(residual, (*shape, *static.shape[1:])),
        )

    def scan_memory(self, state, position, keys, values, chunk, *, seed=None, rows_below=None):
        before, static = state.static_fam, self._static_rows(state, position, rows_below)
        memory, state, rows = super().scan_memory(
            state, position, keys, values, chunk, seed=seed, rows_below=rows_below
        )
        if self.initial_fam == "summary":  # the rows that wrote the first block write all that follow
            state = state._replace(static_fam=where_rows(chunk.completed > 0, static, before))
        return memory, state, rows

    def _static_rows(self, state, position, rows_below):
        if self.initial_fam != "summary":
            return state.static_fam
        rows = ops.broadcast_to(ops.cast(rows_below, state.static_fam.dtype), ops.shape(state.static_fam))
        return where_rows(position.fresh, rows, state.static_fam)


@keras.saving.register_keras_serializable(package="keras_fam")
class SummaryFAMBackbone(TransformerFAMBackbone):
    """A `TransformerFAMBackbone` of `SummaryFAMBlock`s (App. C.3), with the same arguments.

    ```python
    lm = keras_fam.TransformerFAMCausalLM(
        keras_fam.baselines.SummaryFAMBackbone(1000, 2, 64, 4, 128, block_size=32, memory_segments=0, fam_length=8)
    )
    ```
    """

    block_class = SummaryFAMBlock
