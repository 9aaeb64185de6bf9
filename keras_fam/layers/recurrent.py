"""`Recurrent`: what layers and models with a state share, Keras' RNN convention around one pure function."""

import keras
from keras import ops

from keras_fam.layers.chunk import make_chunk
from keras_fam.layers.quantization import QuantizedSublayersMixin, check_training
from keras_fam.ops import ragged
from keras_fam.ops.backend import indices, wait_for
from keras_fam.ops.scan import branch, branches_are_large
from keras_fam.state import broadcast_position, check_finite, check_structure, map_specs, where_rows


class Recurrent(QuantizedSublayersMixin):
    """Calls, padding and checks of a layer or model that reads a stream block by block.

    A subclass has `block_size`, `state_spec`, `get_initial_state` and `read`, and may change what stands under
    "What a subclass provides".
    """

    # What a subclass provides -----------------------------------------------------------------------------------

    def state_spec(self, batch_size=None):
        """`StreamState` of `Spec`s (shape and dtype), for `batch_size` rows."""
        raise NotImplementedError

    def get_initial_state(self, batch_size):
        """The `StreamState` of `batch_size` rows before their first token."""
        raise NotImplementedError

    def read(self, x, state, chunk, *, training=False):
        """Reads a chunk.

        Args:
            x: the tokens, as `check_inputs` returns them.
            state: `StreamState`.
            chunk: `Chunk`, how the tokens lie in blocks.
            training: whether dropout and noise are applied.

        Returns:
            `(outputs, state)`; the state may be None unless `chunk.keep_state`.
        """
        raise NotImplementedError

    def check_inputs(self, inputs, padding_mask=None):
        """`(x, padding_mask)` of the inputs of a call; raises ValueError if they cannot be read."""
        raise NotImplementedError

    def check_values(self, x, lengths=None, padding_mask=None):
        """Raises ValueError if values that can be read now cannot be right."""

    def sequence_state(self, batch_size, training):
        """The state that whole sequences start from."""
        return self.get_initial_state(batch_size)

    def held_state(self, x):
        """The `StreamState` that the layer holds between calls (`stateful=True`), else None."""
        return None

    def needs_state(self, training):
        """Whether the state after a whole sequence is of use even if it is not returned."""
        return False

    def finish_call(self, before, state, held, training):
        """Called with the state after a call that was not given `initial_state`."""

    # The public calls -------------------------------------------------------------------------------------------

    def call(self, inputs, padding_mask=None, initial_state=None, return_state=False, training=None, mask=None):
        """Reads whole sequences, or the next part of them.

        Args:
            inputs: `[B, T, D]` for a layer; int `[B, T]` token ids for a model, or a dict of `"token_ids"` and
                `"padding_mask"`. T ≥ 1.
            padding_mask: None, or bool `[B, T]`, True at real tokens. Padding is ignored and never enters the state;
                its outputs are 0.
            initial_state: None or a `StreamState` to continue from. None starts every row from the beginning, or from
                where it is if the layer has `stateful=True`.
            return_state: whether to return `(outputs, state)` instead of `outputs`, as Keras' RNN layers do.
            training: whether dropout, noise and Random State Passing are applied.
            mask: Keras' implicit mask, used if `padding_mask` is None.

        Returns:
            `outputs` `[B, T, …]` in the compute dtype, or `(outputs, state)`.

        Raises:
            ValueError: for T = 0, inputs of another shape, or a state of other rows, another layer, or with NaN in it.
        """
        if padding_mask is None and not isinstance(mask, dict):  # Keras hands in one mask per entry of a dict
            padding_mask = mask
        x, padding_mask = self.check_inputs(inputs, padding_mask)
        self.check_values(x, padding_mask=padding_mask)
        check_training(self, training)
        lengths, training = None, bool(training)
        if padding_mask is not None:
            check_padding_mask(padding_mask, x)
            x, lengths = ragged.pack_left(x, padding_mask)
        batch_size, held = ops.shape(x)[0], None
        if initial_state is not None:
            check_structure(initial_state, self.state_spec(x.shape[0]), self.name)
            check_finite(initial_state, self.name)
            state, alignment = initial_state, "unaligned"
        elif (held := self.held_state(x)) is not None:
            state, alignment = held, "unaligned"
        else:
            with wait_for(x):
                state, alignment = self.sequence_state(batch_size, training), "initial"
            if lengths is not None:
                state = state._replace(position=broadcast_position(state.position, batch_size))
        wanted = initial_state is None and (held is not None or self.needs_state(training))
        before = state
        outputs, state = self._forward(x, state, alignment, lengths, training, keep_state=return_state or wanted)
        if wanted:
            with wait_for(x):
                self.finish_call(before, state, held, training)
        if padding_mask is not None:
            outputs = ragged.unpack_left(outputs, padding_mask)
        if not return_state:
            return outputs
        return outputs, state._replace(position=broadcast_position(state.position, batch_size))

    def advance(self, inputs, state, *, lengths=None, reset=None, aligned=False, completes=None, training=False):
        """The pure function behind every call: the next tokens in, outputs and the next state out.

        Args:
            inputs: `[B, T, D]` for a layer, int `[B, T]` token ids for a model; T ≥ 1.
            state: `StreamState` of B rows.
            lengths: None, or int32 `[B]`: how many of the T tokens exist in each row (the first ones).
            reset: None, or bool `[B]`: rows that are reset before these tokens.
            aligned: a promise that every row with tokens stands at the start of a block; saves work.
            completes: of one token alone: None, or a promise to a compiled loop that decodes. False: no row completes
                its block with this token, so that nothing of that is in the program. True: some row may.
            training: whether dropout and noise are applied.

        Returns:
            `(outputs, state)`: `[B, T, …]`, zeros behind a row's length; and the state after the tokens.

        Raises:
            ValueError: as a call.
        """
        x, _ = self.check_inputs(inputs)
        self.check_values(x, lengths)
        check_training(self, training)
        if not self.built:
            self.build(x.shape)
        check_structure(state, self.state_spec(x.shape[0]), self.name)
        if reset is not None:
            state = where_rows(ops.cast(reset, "bool"), self.get_initial_state(ops.shape(x)[0]), state)
        if lengths is not None:
            lengths = ops.clip(ops.cast(lengths, "int32"), 0, ops.shape(x)[1])
        alignment, before = "block" if aligned else "unaligned", state
        outputs, state = self._forward(x, state, alignment, lengths, training, completes=completes)
        if lengths is not None and aligned:  # a row without tokens may stand within a block
            state = where_rows(lengths > 0, state, before)
        if lengths is not None:
            real = indices(ops.shape(outputs)[1]) < ops.expand_dims(lengths, 1)
            outputs = ragged.zero_rows(outputs, real)
        return outputs, state

    def _forward(self, x, state, alignment, lengths, training, keep_state=True, completes=None):
        chunk = make_chunk(x, state.position, self.block_size, alignment, lengths=lengths, keep_state=keep_state)
        if not chunk.one_block:
            return self.read(x, state, chunk, training=bool(training))
        if completes is not None:
            return self.read(x, state, chunk.known(completes), training=bool(training))
        if training or not branches_are_large():  # in training, a seed is taken within `read`
            return self.read(x, state, chunk, training=bool(training))
        # One branch around all layers in place of two in each of them: on a GPU each waits for the device.
        sides = [lambda known=known: self.read(x, state, chunk.known(known)) for known in (True, False)]
        return branch(chunk.some_row_completes, *sides)

    def compute_output_spec(self, inputs, padding_mask=None, initial_state=None, return_state=False, **kwargs):
        x, _ = self.check_inputs(inputs)
        outputs = keras.KerasTensor((*x.shape[:2], self.output_width), self.compute_dtype)
        if not return_state:
            return outputs
        spec = self.state_spec(x.shape[0])
        return outputs, map_specs(lambda s: keras.KerasTensor(s.shape, s.dtype), spec)


def check_padding_mask(padding_mask, x):
    """Raises ValueError unless `padding_mask` is `[B, T]` for `x` `[B, T, ...]`."""
    shape, wanted = tuple(padding_mask.shape), tuple(x.shape[:2])
    fits = len(shape) == 2 and all(a is None or b is None or a == b for a, b in zip(shape, wanted, strict=True))
    if not fits:
        raise ValueError(
            f"`padding_mask` must have one entry per token, shape {wanted} (True at real tokens); received shape "
            f"{shape}."
        )
