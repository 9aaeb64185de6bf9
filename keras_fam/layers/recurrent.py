"""What every layer that carries a state shares: Keras' RNN convention around one pure function."""

import keras
import numpy as np
from keras import ops

from keras_fam.distribution.state_sharding import state_variables
from keras_fam.layers.quantization import QuantizedSublayersMixin, check_training, require_exact_kernels
from keras_fam.ops import ragged as row_ops
from keras_fam.ops.backend import wait_for
from keras_fam.state import check_finite, check_structure, map_specs, where_rows


class StreamingLayer(QuantizedSublayersMixin, keras.layers.Layer):
    """Base of the layers that read a stream `[B, T, D]` block by block.

    A subclass implements `state_spec`, `get_initial_state` and `_advance`; calls, padding, checks and `stateful=True`
    are here.
    """

    def __init__(self, *, stateful=False, **kwargs):
        # A state holds float32 memory whatever the compute dtype: Keras must not cast nested arguments.
        super().__init__(autocast=False, **kwargs)
        self.stateful = stateful
        self.supports_masking = True
        self._state_variables = None
        self._needs_reset = None

    @classmethod
    def from_config(cls, config):
        if "go_backwards" in config:  # `keras.layers.Bidirectional` asks for it
            raise ValueError(
                f"{cls.__name__} reads a stream forwards only, so `keras.layers.Bidirectional` cannot wrap it. Use two "
                "layers, the second on `keras.ops.flip(x, axis=1)`, and add or concatenate their outputs."
            )
        return super().from_config(config)

    # What a subclass provides -----------------------------------------------------------------------------------

    def state_spec(self, batch_size=None):
        raise NotImplementedError

    def get_initial_state(self, batch_size):
        raise NotImplementedError

    def _advance(self, x, state, *, start, lengths=None, training=False, keep_state=True):
        raise NotImplementedError

    # The public calls -------------------------------------------------------------------------------------------

    def call(self, x, padding_mask=None, initial_state=None, return_state=False, training=None, mask=None):
        """Reads a whole sequence, or the next part of one.

        Args:
            x: `[B, T, D]`, T ≥ 1.
            padding_mask: None, or bool `[B, T]`, True at real tokens. Padding does not exist for the stream: it fills
                no block, reaches no key and no memory, and its outputs are 0.
            initial_state: None (each row starts anew, or goes on where it was if `stateful=True`) or a `StreamState`.
            return_state: whether to return `(y, state)` instead of `y`, as Keras' RNN layers do.
            training: whether dropout is applied.
            mask: Keras' implicit mask, used if `padding_mask` is None.

        Returns:
            `y` `[B, T, D]` in the compute dtype, or `(y, state)`.

        Raises:
            ValueError: for T = 0, a wrong width, or a state of other rows, another layer, or with NaN in it.
        """
        padding_mask = mask if padding_mask is None else padding_mask
        self._check_input(x)
        check_training(self, training)
        x = ops.cast(x, self.compute_dtype)
        lengths = None
        if padding_mask is not None:
            check_padding_mask(padding_mask, x)
            x, lengths = row_ops.pack_left(x, padding_mask)
        batch_size = ops.shape(x)[0]
        remember = self.stateful and initial_state is None
        if initial_state is not None:
            check_structure(initial_state, self.state_spec(x.shape[0]), self.name)
            check_finite(initial_state, self.name)
            state, start = initial_state, "anywhere"
        elif self.stateful:
            state, start = self._read_state(x), "anywhere"
        else:
            state, start = self.get_initial_state(batch_size), "fresh"
        y, state = self._advance(
            x, state, start=start, lengths=lengths, training=bool(training), keep_state=return_state or remember
        )
        if padding_mask is not None:
            y = row_ops.unpack_left(y, padding_mask)
        if remember:
            with wait_for(x):
                self._write_state(state)
        return (y, state) if return_state else y

    def advance(self, x, state, *, lengths=None, reset=None, aligned=False, training=False):
        """The pure function behind every call: the next tokens in, outputs and the next state out.

        Args:
            x: `[B, T, D]`, T ≥ 1.
            state: `StreamState` of B rows.
            lengths: None, or int32 `[B]`: how many of the T tokens exist in each row (the first ones).
            reset: None, or bool `[B]`: rows that start anew before these tokens.
            aligned: a promise that every row with tokens stands at the start of a block; saves work.
            training: whether dropout is applied.

        Returns:
            `(y, state)`: `[B, T, D]`, zeros behind a row's length; and the state after the tokens.

        Raises:
            ValueError: as `call`.
        """
        self._check_input(x)
        check_training(self, training)
        check_structure(state, self.state_spec(x.shape[0]), self.name)
        x = ops.cast(x, self.compute_dtype)
        if reset is not None:
            state = where_rows(ops.cast(reset, "bool"), self.get_initial_state(ops.shape(x)[0]), state)
        if lengths is not None:
            lengths = ops.clip(ops.cast(lengths, "int32"), 0, ops.shape(x)[1])
        start = "boundary" if aligned else "anywhere"
        y, state = self._advance(x, state, start=start, lengths=lengths, training=training)
        if lengths is not None:
            y = row_ops.zero_rows(y, ops.arange(ops.shape(y)[1], dtype="int32") < ops.expand_dims(lengths, 1))
        return y, state

    def compute_output_spec(self, x, padding_mask=None, initial_state=None, return_state=False, **kwargs):
        self._check_input(x)
        y = keras.KerasTensor((*x.shape[:-1], self._width(x)), self.compute_dtype)
        if not return_state:
            return y
        spec = self.state_spec(x.shape[0])
        return y, map_specs(lambda s: keras.KerasTensor(s.shape, s.dtype), spec)

    def compute_output_shape(self, input_shape, *args, **kwargs):
        return tuple(input_shape)

    def _width(self, x):
        return x.shape[-1]

    # stateful=True ----------------------------------------------------------------------------------------------

    def reset_state(self, rows=None):
        """Lets rows of a stateful layer start anew at the next call.

        Args:
            rows: None (all rows) or a sequence of row numbers.

        Raises:
            ValueError: if the layer is not stateful, or a row does not exist.
        """
        if not self.stateful:
            raise ValueError(
                f"Only a layer with `stateful=True` holds a state to reset; {self.name} has stateful=False. "
                "Build it with `stateful=True`, or drop the state that you carry yourself."
            )
        if self._needs_reset is None:
            return
        flags = np.array(ops.convert_to_numpy(self._needs_reset.value))
        if rows is None:
            flags[:] = True
        else:
            rows = np.asarray(rows).reshape(-1)
            if not rows.size:
                return
            if rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= len(flags):
                raise ValueError(
                    f"Rows to reset are numbers from 0 to {len(flags) - 1}, the rows of {self.name}; received "
                    f"{rows.tolist()}."
                )
            flags[rows] = True
        self._needs_reset.assign(flags)

    @property
    def state(self):
        """The `StreamState` that a stateful layer holds (a copy); rows waiting for a reset are shown as fresh."""
        if self._state_variables is None:
            raise ValueError(f"{self.name} holds no state: it has stateful={self.stateful}, built={self.built}.")
        return self._read_state(None)

    def _build_state(self, batch_size):
        if not self.stateful:
            return
        if batch_size is None:
            raise ValueError(
                f"stateful=True holds the state of a fixed number of rows; {self.name} was built with batch size "
                "None. Give the input a batch shape, for example keras.Input(batch_shape=(4, None, 256))."
            )

        self._state_spec = self.state_spec(batch_size)
        self._state_variables = state_variables(self._state_spec, self.add_weight)
        self._needs_reset = self.add_weight(
            shape=(batch_size,), dtype="bool", initializer="ones", trainable=False, name="needs_reset"
        )

    def _read_state(self, x):
        batch_size = self._needs_reset.shape[0]
        if x is not None and x.shape[0] is not None and x.shape[0] != batch_size:
            raise ValueError(
                f"A stateful layer is called with the number of rows that it was built for; {self.name} holds "
                f"{batch_size} rows, received {x.shape[0]}. Pad the batch, or build the layer for {x.shape[0]} rows."
            )
        # Torch writes variables in place: what autograd still needs has to be a copy.
        values = iter([ops.copy(v.value) for v in self._state_variables])
        state = map_specs(lambda spec: next(values), self._state_spec)
        return where_rows(ops.copy(self._needs_reset.value), self.get_initial_state(batch_size), state)

    def _write_state(self, state):
        for variable, value in zip(self._state_variables, keras.tree.flatten(state), strict=True):
            variable.assign(ops.stop_gradient(value) if keras.backend.is_float_dtype(variable.dtype) else value)
        self._needs_reset.assign(ops.zeros(self._needs_reset.shape, "bool"))

    def save_own_variables(self, store):
        """Saves the layer's weights. The state of a stream is no weight: it has files of its own."""
        require_exact_kernels(self)
        for i, variable in enumerate(self._own_weights()):
            store[str(i)] = variable.numpy()

    def load_own_variables(self, store):
        own = self._own_weights()
        if len(store.keys()) != len(own):
            raise ValueError(
                f"{self.name} has {len(own)} weights of its own ({[v.name for v in own]}); the file has "
                f"{len(store.keys())}. Build the layer with the settings that it was saved with."
            )
        for i, variable in enumerate(own):
            variable.assign(store[str(i)])

    def _own_weights(self):
        held = {id(v) for v in self._state_variables or []} | {id(self._needs_reset)}
        return [v for v in self._trainable_variables + self._non_trainable_variables if id(v) not in held]

    # Checks -----------------------------------------------------------------------------------------------------

    def _check_input(self, x):
        if len(x.shape) != 3:
            raise ValueError(
                f"{self.name} reads [batch, tokens, width]; received shape {tuple(x.shape)}. Add or remove axes."
            )
        if x.shape[1] == 0:
            raise ValueError(
                f"{self.name} reads at least one token (T ≥ 1); received shape {tuple(x.shape)}. Skip empty chunks."
            )
        width = getattr(self, "hidden_dim", None)
        if self.built and width is not None and x.shape[-1] != width:
            raise ValueError(
                f"{self.name} was built for width {width}; received shape {tuple(x.shape)}. Project the input to "
                f"{width} features, or build another layer."
            )


def check_padding_mask(padding_mask, x):
    """Raises ValueError unless `padding_mask` is `[B, T]` for `x` `[B, T, ...]`."""
    shape, wanted = tuple(padding_mask.shape), tuple(x.shape[:2])
    fits = len(shape) == 2 and all(a is None or b is None or a == b for a, b in zip(shape, wanted, strict=True))
    if not fits:
        raise ValueError(
            f"`padding_mask` has one entry per token, shape {wanted} (True at real tokens); received shape {shape}."
        )
