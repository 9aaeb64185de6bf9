"""`RecurrentLayer`: base of the Keras layers that read a stream `[B, T, D]`, with `stateful=True`."""

import keras
import numpy as np
from keras import ops

from keras_fam.distribution.state_sharding import shard_state, state_variables
from keras_fam.layers.chunk_attention import forward_chunk
from keras_fam.layers.memory_scan import anchored_rows, rows_for_lowest, scan_memory
from keras_fam.layers.quantization import require_exact_kernels
from keras_fam.layers.recurrent import Recurrent
from keras_fam.ops.random import next_seed
from keras_fam.state import StreamState, advance_position, initial_position, map_specs, position_spec, where_rows


class RecurrentLayer(Recurrent, keras.layers.Layer):
    """One layer with a state of its own.

    A subclass has `attention_layer`, and the functions around the attention: `pre_norm`, `token_output` and
    `memory_output`.
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

    # Around the attention ---------------------------------------------------------------------------------------

    def attention_layer(self):
        """The `FeedbackAttention` whose projections the layer uses; perhaps the layer itself."""
        raise NotImplementedError

    def pre_norm(self, x):
        """What is applied to tokens and memory rows before they are projected: `[B, *, D]` to `[B, *, D]`."""
        return x

    def token_output(self, attended, x, seed=None):
        """Outputs of tokens: `[B, T, N, H]` attention and the tokens `[B, T, D]`, to `[B, T, D]`."""
        raise NotImplementedError

    def memory_output(self, attended, residual, seed=None):
        """What the layer writes: `[B, F, N, H]` attention and the residual `[B, F, D]`, to `[B, F, D]`."""
        raise NotImplementedError

    # Reading ----------------------------------------------------------------------------------------------------

    def read(self, x, state, chunk, *, training=False):
        seed = next_seed(self.seed_generator, x) if training else None
        rows = rows_for_lowest(self.attention_layer(), self.attention_layer().initial_rows)
        y, layer, _ = self.forward_chunk(x, state.layers[0], state.position, chunk, seed=seed, rows_below=rows)
        if not chunk.keep_state:
            return y, None
        return y, shard_state(StreamState(advance_position(state.position, chunk, self.max_memories), (layer,)))

    def forward_chunk(self, x, state, position, chunk, *, seed=None, rows_below=None):
        """One layer's part of `read`; see `keras_fam.layers.chunk_attention.forward_chunk`."""
        return forward_chunk(self, x, state, position, chunk, seed=seed, rows_below=rows_below)

    def scan_memory(self, state, position, keys, values, chunk, *, seed=None, rows_below=None):
        """Writing the memory; see `keras_fam.layers.memory_scan.scan_memory`."""
        return scan_memory(self, state, position, keys, values, chunk, seed=seed, rows_below=rows_below)

    def writing_rows(self, state, position, chunk, rows_below):
        """None where the memory itself is copied into the query (Alg. 2), else `WritingRows`."""
        if not self.attention_layer().rows_come_from_below:
            return None
        return anchored_rows(self, state, chunk, rows_below)

    def check_inputs(self, inputs, padding_mask=None):
        if len(inputs.shape) != 3:
            raise ValueError(
                f"{self.name} reads [batch, tokens, width]; received shape {tuple(inputs.shape)}. Add or remove axes."
            )
        if inputs.shape[1] == 0:
            raise ValueError(
                f"{self.name} reads at least one token (T ≥ 1); received shape {tuple(inputs.shape)}. Skip empty "
                "chunks."
            )
        width = getattr(self, "hidden_dim", None)
        if self.built and width is not None and inputs.shape[-1] != width:
            raise ValueError(
                f"{self.name} was built for width {width}; received shape {tuple(inputs.shape)}. Project the input to "
                f"{width} features, or build another layer."
            )
        return ops.cast(inputs, self.compute_dtype), padding_mask

    @property
    def output_width(self):
        """D, the width of the outputs."""
        return self.hidden_dim

    def compute_output_spec(self, inputs, *args, **kwargs):
        if not self.built:
            self.hidden_dim = inputs.shape[-1]
        return super().compute_output_spec(inputs, *args, **kwargs)

    def compute_output_shape(self, input_shape, *args, **kwargs):
        return tuple(input_shape)

    # What the attention decides ---------------------------------------------------------------------------------

    @property
    def block_size(self):
        """S, tokens in a block."""
        return self.attention_layer().block_size

    @property
    def fam_length(self):
        """F, rows of memory; 0 without."""
        return self.attention_layer().fam_length

    @property
    def initial_fam(self):
        """`"prompt"`, `"prefix"` or `"summary"`."""
        return self.attention_layer().initial_fam

    @property
    def max_memories(self):
        """How many memories a token can ever see: P, or 0 without memory."""
        return self.attention_layer().num_visible_memories if self.attention_layer().fam_length else 0

    # State ------------------------------------------------------------------------------------------------------

    def layer_state_spec(self, batch_size=None):
        """`LayerState` of `Spec`s for this layer."""
        return self.attention_layer().layer_state_spec(batch_size)

    def initial_layer_state(self, batch_size, fam, learned=None):
        """A `LayerState` with empty keys.

        Args:
            batch_size: B.
            fam: the memory: None (nothing to read yet) or `[1 or B, F, D]`.
            learned: the learned first memory, where `fam` was passed on from elsewhere; for layers that keep it.
        """
        return self.attention_layer().initial_layer_state(batch_size, fam, self.pre_norm)

    def state_spec(self, batch_size=None):
        """`StreamState` of `Spec`s (shape and dtype), for `batch_size` rows."""
        return StreamState(position_spec(batch_size), (self.layer_state_spec(batch_size),))

    def get_initial_state(self, batch_size):
        """The `StreamState` of `batch_size` rows before their first token."""
        fam = self.attention_layer().initial_rows() if self.fam_length and self.initial_fam != "summary" else None
        position = initial_position(batch_size, 0 if fam is None else 1)
        return shard_state(StreamState(position, (self.initial_layer_state(batch_size, fam),)))

    # stateful=True ----------------------------------------------------------------------------------------------

    def reset_state(self, rows=None):
        """Resets rows of a stateful layer before the next call.

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
                    f"Rows to reset must be numbers from 0 to {len(flags) - 1}, the rows of {self.name}; received "
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

    def held_state(self, x):
        return self._read_state(x) if self.stateful else None

    def finish_call(self, before, state, held, training):
        if held is not None:
            self._write_state(state)

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
