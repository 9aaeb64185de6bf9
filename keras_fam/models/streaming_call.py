"""What backbone and language model share: Keras calls around the pure `advance`."""

import keras
from keras import ops

from keras_fam.layers.quantization import QuantizedSublayersMixin, check_training
from keras_fam.layers.recurrent import check_padding_mask
from keras_fam.ops import ragged as row_ops
from keras_fam.ops.backend import wait_for
from keras_fam.ops.token_ids import check_ids_of
from keras_fam.state import broadcast_position, check_finite, check_structure, map_specs, where_rows


class StreamingModelMixin(QuantizedSublayersMixin):
    """Calls, padding and checks of models that read token ids.

    A model provides `build`, `state_spec`, `get_initial_state`, `_starting_state`, `_keep_memory` and `_advance`.
    """

    def call(self, inputs, padding_mask=None, initial_state=None, return_state=False, training=None):
        """Reads whole sequences, or the next part of them.

        Args:
            inputs: int `[B, T]` token ids, or a dict with `"token_ids"` and perhaps `"padding_mask"`.
            padding_mask: None, or bool `[B, T]`, True at real tokens; padding does not exist for the stream.
            initial_state: None (rows start anew) or a `StreamState`.
            return_state: whether to return `(outputs, state)`.
            training: whether dropout, Random State Passing and Random Position Offset apply.

        Returns:
            Outputs `[B, T, …]`, zeros at padding; or `(outputs, state)`.

        Raises:
            ValueError: for T = 0, ids that are no `[B, T]`, or a state that does not fit or holds NaN.
        """
        token_ids, padding_mask = self._unpack(inputs, padding_mask)
        check_ids_of(self, token_ids, padding_mask=padding_mask)
        check_training(self, training)
        batch_size = ops.shape(token_ids)[0]
        lengths = None
        if padding_mask is not None:
            check_padding_mask(padding_mask, token_ids)
            token_ids, lengths = row_ops.pack_left(token_ids, padding_mask)
        training = bool(training)
        if initial_state is not None:
            check_structure(initial_state, self.state_spec(token_ids.shape[0]), self.name)
            check_finite(initial_state, self.name)
            state, start = initial_state, "anywhere"
        else:
            with wait_for(token_ids):
                state, start = self._starting_state(batch_size, training), "fresh"
            if lengths is not None:
                state = state._replace(position=broadcast_position(state.position, batch_size))
        passing = training and initial_state is None and self.passes_state
        before = state
        outputs, state = self._advance(
            token_ids, state, start=start, lengths=lengths, training=training, keep_state=return_state or passing
        )
        if passing:
            with wait_for(token_ids):
                self._keep_memory(before, state)
        if padding_mask is not None:
            outputs = row_ops.unpack_left(outputs, padding_mask)
        if not return_state:
            return outputs
        return outputs, state._replace(position=broadcast_position(state.position, batch_size))

    def advance(self, token_ids, state, *, lengths=None, reset=None, aligned=False, training=False):
        """The pure function behind every call: the next tokens in, outputs and the next state out.

        Args:
            token_ids: int `[B, T]`, T ≥ 1.
            state: `StreamState` of B rows.
            lengths: None, or int32 `[B]`: how many of the T tokens exist in each row (the first ones).
            reset: None, or bool `[B]`: rows that start anew before these tokens.
            aligned: a promise that every row with tokens stands at the start of a block; saves work.
            training: whether dropout applies.

        Returns:
            `(outputs, state)`: `[B, T, …]`, zeros behind a row's length; and the state after the tokens.

        Raises:
            ValueError: as a call.
        """
        token_ids, _ = self._unpack(token_ids, None)
        check_ids_of(self, token_ids, lengths)
        check_training(self, training)
        if not self.built:
            self.build()
        check_structure(state, self.state_spec(token_ids.shape[0]), self.name)
        batch_size = ops.shape(token_ids)[0]
        if reset is not None:
            state = where_rows(ops.cast(reset, "bool"), self.get_initial_state(batch_size), state)
        if lengths is not None:
            lengths = ops.clip(ops.cast(lengths, "int32"), 0, ops.shape(token_ids)[1])
        start = "boundary" if aligned else "anywhere"
        outputs, state = self._advance(token_ids, state, start=start, lengths=lengths, training=training)
        if lengths is not None:
            places = ops.arange(ops.shape(outputs)[1], dtype="int32")
            outputs = row_ops.zero_rows(outputs, places < ops.expand_dims(lengths, 1))
        return outputs, state

    def compute_output_spec(self, inputs, padding_mask=None, initial_state=None, return_state=False, training=None):
        token_ids, _ = self._unpack(inputs, padding_mask)
        outputs = keras.KerasTensor((*token_ids.shape, self.output_width), self.compute_dtype)
        if not return_state:
            return outputs
        spec = self.state_spec(token_ids.shape[0])
        return outputs, map_specs(lambda s: keras.KerasTensor(s.shape, s.dtype), spec)

    def compute_output_shape(self, input_shape, *args, **kwargs):
        shape = input_shape["token_ids"] if isinstance(input_shape, dict) else input_shape
        return (*shape, self.output_width)

    def _unpack(self, inputs, padding_mask):
        if isinstance(inputs, dict):
            unknown = sorted(set(inputs) - {"token_ids", "padding_mask"})
            if unknown or "token_ids" not in inputs:
                raise ValueError(
                    f"Inputs of {self.name} are token ids, or a dict of 'token_ids' and 'padding_mask'; received the "
                    f"keys {sorted(inputs)}."
                )
            padding_mask = inputs.get("padding_mask") if padding_mask is None else padding_mask
            inputs = inputs["token_ids"]
        if len(inputs.shape) != 2:
            raise ValueError(
                f"{self.name} reads token ids [batch, tokens]; received shape {tuple(inputs.shape)}. Add or drop axes."
            )
        if inputs.shape[1] == 0:
            raise ValueError(
                f"{self.name} reads at least one token (T ≥ 1); received shape {tuple(inputs.shape)}. Skip empty ones."
            )
        return inputs, padding_mask
