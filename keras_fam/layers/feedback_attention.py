"""FeedbackAttention: projections, reading the memory, writing the memory (Alg. 1 and 2).

Axes: B rows, T tokens, S block, n blocks in the call, m segments, F memory rows, P visible memories,
N query heads, K key/value heads, H head width, D model width.
"""

import keras
from keras import ops

from keras_fam.distribution.state_sharding import shard_state
from keras_fam.layers.chunk_attention import Hooks, advance_layer, no_norm
from keras_fam.layers.fast_call import call_dense, run
from keras_fam.layers.normalization import NORMS
from keras_fam.layers.recurrent import StreamingLayer
from keras_fam.layers.validation import check_attention_settings
from keras_fam.ops.attention import attend
from keras_fam.ops.random import next_seed
from keras_fam.ops.rope import BlockPositions, rotate
from keras_fam.state import LayerState, Spec, StreamState, advance_position, initial_position, position_spec


def _clone(initializer):
    return initializer.clone() if hasattr(initializer, "clone") else initializer


@keras.saving.register_keras_serializable(package="keras_fam")
class FeedbackAttention(StreamingLayer):
    """Attention over blocks, memory segments and a memory that feeds back (TransformerFAM, Alg. 2).

    Used by itself, the layer returns the attention output (no residual is added) and its memory is
    `F_τ = attention(F_{τ−1}) + F_{τ−1}`. Inside `TransformerFAMBlock` the memory also passes norms and feed-forward.

    Args:
        num_query_heads: N.
        head_dim: H, even if positions are rotated.
        num_key_value_heads: K, a divisor of N; None means N (multi-head), 1 is multi-query.
        block_size: S, tokens in a block.
        memory_segments: m, past blocks whose keys and values stay visible (BSWA, Alg. 1).
        fam_length: F, rows of memory; 0 is TransformerBSWA.
        attention_window: None (the window breathes between m·S+1 and (m+1)·S keys), or how many keys a token sees
            at most, itself included: m·S is Transformer-XL's mask, any w ≤ m·S+1 is plain sliding window attention,
            and with a larger w a token early in its block sees no more than the blocks hold.
        num_visible_memories: P, how many of the last memories tokens and memory rows may read (Table 6).
        initial_fam: `"prompt"` or `"prefix"`: the first memory F_0 is given (App. B.1; one learned set of rows where
            the layer stands alone); `"summary"`: the rows ride up with block 1 and its tokens read no memory.
        own_initial_fam: whether the layer owns the F·D numbers of F_0; a model that hands them in says False.
        fam_position: where memory rows stand: `"last"`, `"float"` or `"zero"` (App. B.2).
        fam_query_position: `"previous"` (as its key) or `"current"` (the tail of the block being compressed).
        fam_query: `"feedback"` copies the memory into the query; `"static"` asks with F_0 every time (SUM FAM, C.3).
        fam_feedback: `"residual"` feeds F_τ back as it comes (the paper); `"normalized"` divides each row by its RMS;
            `"binary"` keeps the sign of every number alone, so that an update below 1 leaves no trace and nothing
            adds up (gradients pass straight through). The last two are additions of this project; `"binary"` is an
            experiment, and where a number is within rounding of 0 its sign, and all that follows, may depend on how a
            text is cut into chunks.
        fam_noise: standard deviation of Gaussian noise on every new memory in training, relative to each row's RMS (an
            addition of this project: a memory that survives noise keeps what it holds for longer). With `"binary"` a
            number is turned round where the noise outweighs it: 4.8 % of them at 0.6, 16 % at 1. `NoiseRamp` and
            `NoiseScale` let it grow during training.
        fam_recurrence: `"layer"`: a layer's memory feeds back into the same layer (Alg. 2); `"stack"`: the rows ride
            up the whole stack with their block, and what the top layer writes is the bottom layer's input one block
            later (RMT, Fig. 7). `"stack"` needs a `TransformerFAMBackbone`.
        segment_source: what the memory segments hold: keys and values of the layer's `"inputs"` (BSWA), or of its
            `"outputs"` (FM, feedback memory segments, App. C.2). `"outputs"` reads one block after the other.
        stop_memory_gradient: whether gradients stop at the memory segments (the ablation M1_SG).
        rope_wavelength: base of RoPE; None for no rotation.
        rope_scaling: None or a dict, see `keras_fam.ops.rope.inverse_wavelengths`.
        attention_scale: factor of the logits; None means H^-0.5.
        attention_softcap: None or the soft cap of the logits.
        use_attention_bias: biases of query, key and value.
        use_output_bias: bias of the output projection.
        use_query_key_norm: RMS norms over H on queries and keys, before the rotation (Qwen3, Gemma 3).
        query_key_norm: `"rms_norm"`, or `"offset_rms_norm"`, which multiplies by 1 + scale (Gemma 3).
        query_key_norm_epsilon: epsilon of these norms.
        kernel_initializer: initializer of all kernels.
        stateful: whether calls go on where the last one stopped, for a fixed number of rows.

    Raises:
        ValueError: if settings contradict each other (heads that do not divide, F > S, …).

    Reference: Hwang et al., 2024, arXiv 2404.09173.
    """

    SETTINGS = (
        "num_query_heads", "head_dim", "num_key_value_heads", "block_size", "memory_segments", "fam_length",
        "attention_window", "num_visible_memories", "initial_fam", "own_initial_fam", "fam_position",
        "fam_query_position", "fam_query", "fam_feedback", "fam_noise", "fam_recurrence", "segment_source",
        "stop_memory_gradient", "rope_wavelength", "rope_scaling",
        "attention_scale", "attention_softcap", "use_attention_bias", "use_output_bias", "use_query_key_norm",
        "query_key_norm", "query_key_norm_epsilon",
    )  # fmt: skip

    def __init__(
        self,
        num_query_heads: int,
        head_dim: int,
        *,
        num_key_value_heads: int | None = None,
        block_size: int = 1024,
        memory_segments: int = 3,
        fam_length: int = 64,
        attention_window: int | None = None,
        num_visible_memories: int = 1,
        initial_fam: str = "prompt",
        own_initial_fam: bool = True,
        fam_position: str = "last",
        fam_query_position: str = "previous",
        fam_query: str = "feedback",
        fam_feedback: str = "residual",
        fam_noise: float = 0.0,
        fam_recurrence: str = "layer",
        segment_source: str = "inputs",
        stop_memory_gradient: bool = False,
        rope_wavelength: float | None = 10_000.0,
        rope_scaling: dict | None = None,
        attention_scale: float | None = None,
        attention_softcap: float | None = None,
        use_attention_bias: bool = False,
        use_output_bias: bool = False,
        use_query_key_norm: bool = False,
        query_key_norm: str = "rms_norm",
        query_key_norm_epsilon: float = 1e-6,
        kernel_initializer="glorot_uniform",
        stateful: bool = False,
        **kwargs,
    ):
        super().__init__(stateful=stateful, **kwargs)
        settings = {name: value for name, value in locals().items() if name in self.SETTINGS}
        settings["num_key_value_heads"] = num_query_heads if num_key_value_heads is None else num_key_value_heads
        for name, value in settings.items():
            setattr(self, name, value)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        check_attention_settings(self)
        self.seed_generator = keras.random.SeedGenerator() if fam_noise else None
        self.positions = BlockPositions(
            head_dim=head_dim,
            block_size=block_size,
            fam_length=fam_length,
            fam_position=fam_position,
            fam_query_position=fam_query_position,
            wavelength=rope_wavelength,
            scaling=rope_scaling,
            dtype=self.memory_dtype,
        )

    @property
    def memory_dtype(self):
        """Dtype of the memory: float32, or wider if the layer computes wider."""
        return keras.backend.result_type(self.compute_dtype, "float32")

    def build(self, input_shape):
        self.hidden_dim = input_shape[-1]

        def projection(name, heads, bias):
            return keras.layers.EinsumDense(
                "rd,dnh->rnh",
                output_shape=(heads, self.head_dim),
                bias_axes="nh" if bias else None,
                kernel_initializer=_clone(self.kernel_initializer),
                dtype=self.dtype_policy,
                name=name,
            )

        self.query = projection("query", self.num_query_heads, self.use_attention_bias)
        self.key = projection("key", self.num_key_value_heads, self.use_attention_bias)
        self.value = projection("value", self.num_key_value_heads, self.use_attention_bias)
        self.output_projection = keras.layers.EinsumDense(
            "rnh,nhd->rd",
            output_shape=(self.hidden_dim,),
            bias_axes="d" if self.use_output_bias else None,
            kernel_initializer=_clone(self.kernel_initializer),
            dtype=self.dtype_policy,
            name="output",
        )
        for layer in (self.query, self.key, self.value):
            layer.build((None, self.hidden_dim))
        self.output_projection.build((None, self.num_query_heads, self.head_dim))
        self.query_norm = self.key_norm = None
        if self.use_query_key_norm:
            norm = {"epsilon": self.query_key_norm_epsilon, "dtype": self.dtype_policy}
            self.query_norm = NORMS[self.query_key_norm](name="query_norm", **norm)
            self.key_norm = NORMS[self.query_key_norm](name="key_norm", **norm)
            self.query_norm.build((None, None, self.num_query_heads, self.head_dim))
            self.key_norm.build((None, None, self.num_key_value_heads, self.head_dim))
        self.noise_scale = None
        if self.fam_length and self.fam_noise:
            self.noise_scale = self.add_weight(
                shape=(), dtype="float32", initializer="ones", trainable=False, autocast=False, name="noise_scale"
            )
        self.initial_fam_rows = None
        if self.fam_length and self.own_initial_fam:
            self.initial_fam_rows = self.add_weight(
                shape=(self.fam_length, self.hidden_dim),
                initializer=keras.initializers.RandomNormal(stddev=0.02),
                name="initial_fam",
            )
        self._build_state(input_shape[0])

    # State ------------------------------------------------------------------------------------------------------

    def layer_state_spec(self, batch_size=None):
        """`LayerState` of `Spec`s for one layer."""
        B, F, P = batch_size, self.fam_length, self.num_visible_memories
        heads = (self.num_key_value_heads, self.head_dim)
        slots = Spec((B, (self.memory_segments + 1) * self.block_size, *heads), self.compute_dtype)
        state = LayerState(slots, slots)
        if self.segment_source == "outputs":
            own = Spec((B, self.block_size, *heads), self.compute_dtype)
            state = state._replace(output_key=own, output_value=own)
        if not F:
            return state
        fam = Spec((B, F, self.hidden_dim), self.memory_dtype)
        projected = Spec((B, P * F, *heads), self.compute_dtype)
        static = fam if self.fam_query == "static" else ()
        return state._replace(fam=fam, fam_key=projected, fam_value=projected, static_fam=static)

    def state_spec(self, batch_size=None):
        """`StreamState` of `Spec`s (shape and dtype), for `batch_size` rows."""
        return StreamState(position_spec(batch_size), (self.layer_state_spec(batch_size),))

    def get_initial_state(self, batch_size):
        """The `StreamState` of `batch_size` rows that start anew."""
        return self.initial_state_of(batch_size, norm=no_norm)

    def initial_state_of(self, batch_size, norm):
        """`get_initial_state` for a layer that norms what it projects."""
        if self.fam_length and not self.own_initial_fam:
            raise ValueError(
                f"{self.name} was built with own_initial_fam=False: the model that owns the first memory hands it in. "
                "Use the model's `get_initial_state`, or build the layer with own_initial_fam=True."
            )
        rows = None if self.initial_fam == "summary" else self.initial_fam_rows
        position = initial_position(batch_size, 0 if rows is None else 1)
        fam = None if rows is None else ops.expand_dims(ops.convert_to_tensor(rows), 0)
        return shard_state(StreamState(position, (self.initial_layer_state(batch_size, fam, norm=norm),)))

    def initial_layer_state(self, batch_size, fam, *, norm=no_norm, start=None, static=None):
        """A layer state with empty keys and the memory `fam`.

        Args:
            batch_size: B.
            fam: None (nothing to read yet) or `[1 or B, F, D]`.
            norm: what is applied to memory rows before they are projected.
            start: absolute place of the block that reads the memory, float `[1 or B]`; 0 if None.
            static: the rows that ask if `fam_query="static"`; None means `fam`.
        """

        def fill(spec):
            return ops.zeros(spec.shape, spec.dtype) if spec else ()

        spec = self.layer_state_spec(batch_size)
        empty = LayerState(
            fill(spec.key),
            fill(spec.value),
            output_key=fill(spec.output_key),
            output_value=fill(spec.output_value),
        )
        if not self.fam_length:
            return empty
        if fam is None:
            fam = ops.zeros((1, self.fam_length, self.hidden_dim), self.memory_dtype)
            key = value = ops.zeros((1, *spec.fam_key.shape[1:]), spec.fam_key.dtype)
        else:
            fam = ops.cast(fam, self.memory_dtype)
            start = ops.zeros((1,), self.memory_dtype) if start is None else start
            key, value = self.memory_key_value(norm(fam), start)
            older = (self.num_visible_memories - 1) * self.fam_length
            key, value = (ops.pad(x, [[0, 0], [0, older], [0, 0], [0, 0]]) for x in (key, value))
        static = fam if static is None else ops.cast(static, self.memory_dtype)
        fam, key, value, static = (ops.broadcast_to(x, (batch_size, *x.shape[1:])) for x in (fam, key, value, static))
        return empty._replace(fam=fam, fam_key=key, fam_value=value, static_fam=static if spec.static_fam else ())

    # Projections ------------------------------------------------------------------------------------------------

    @property
    def query_scale(self):
        """Factor of the logits, taken into the queries."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def project_query(self, x):
        """Scaled, normed queries `[B, *, N, H]`, not rotated."""
        query = call_dense(self.query, x)
        if self.query_norm is not None:
            query = run(self.query_norm, query)
        return query * self.query_scale

    def project_key_value(self, x):
        """Keys (normed, not rotated) and values, each `[B, *, K, H]`."""
        key = call_dense(self.key, x)
        return (key if self.key_norm is None else run(self.key_norm, key)), call_dense(self.value, x)

    def project_output(self, attended):
        """Attention outputs `[B, *, N, H]` to `[B, *, D]`."""
        return call_dense(self.output_projection, attended, axes=2)

    def memory_query(self, normed, start):
        """Rotated, scaled queries `[B, F, N, H]` of normed memory rows, for the block that starts at `start`."""
        return rotate(self.project_query(normed), self.positions.memory_query(start))

    def memory_key_value(self, normed, start):
        """Rotated keys and values `[B, F, K, H]` of normed memory rows, for readers of the block at `start`."""
        key, value = self.project_key_value(normed)
        return rotate(key, self.positions.memory_key(start)), value

    def attend_rows(self, normed):
        """Attention among memory rows alone, before the first block (App. B.1); `[1, F, D]` to `[1, F, D]`."""
        start = ops.zeros((1,), self.memory_dtype)
        table = self.positions.memory_key(start)
        query, (key, value) = self.project_query(normed), self.project_key_value(normed)
        attended = attend(rotate(query, table), rotate(key, table), value, None, self.attention_softcap)
        return self.project_output(attended)

    # Reading a stream -------------------------------------------------------------------------------------------

    def _advance(self, x, state, *, start, lengths=None, training=False, keep_state=True):
        seed = next_seed(self.seed_generator, x) if training else None
        return self.advance_one(x, state, Hooks(seed=seed), start=start, lengths=lengths, keep_state=keep_state)

    def advance_one(self, x, state, hooks=None, *, start, lengths=None, keep_state=True):
        """Advances the state of a layer that stands alone, position included."""
        rider = None
        if self.initial_fam == "summary" and self.fam_length:
            rider = ops.expand_dims(ops.convert_to_tensor(self.initial_fam_rows), 0)
        y, layer, _ = self.advance_layer(
            x, state.layers[0], state.position, hooks, start=start, lengths=lengths, rider=rider, keep_state=keep_state
        )
        taken = ops.shape(x)[1] if lengths is None else lengths
        position, _ = advance_position(state.position, taken, self.block_size, self.max_memories)
        return y, shard_state(StreamState(position, (layer,)))

    @property
    def max_memories(self):
        """How many memories a token can ever see: P, or 0 without memory."""
        return self.num_visible_memories if self.fam_length else 0

    def advance_layer(self, x, state, position, hooks=None, **options):
        """See `keras_fam.layers.chunk_attention.advance_layer`."""
        return advance_layer(self, x, state, position, hooks or Hooks(), **options)

    def get_config(self):
        config = super().get_config()
        config.pop("autocast", None)
        config.update({name: getattr(self, name) for name in self.SETTINGS})
        config["kernel_initializer"] = keras.initializers.serialize(self.kernel_initializer)
        config["stateful"] = self.stateful
        return config
