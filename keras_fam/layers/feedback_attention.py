"""FeedbackAttention: the projections of a layer, and the attention that reads and writes its memory (Alg. 1 and 2).

Axes: B rows, T tokens, S block, n blocks in the call, m segments, F memory rows, P visible memories,
N query heads, K key/value heads, H head width, D model width.
"""

import keras
from keras import ops

from keras_fam.layers import memory_update as memory_updates
from keras_fam.layers.fast_call import call_dense, run
from keras_fam.layers.normalization import NORMS
from keras_fam.layers.recurrent_layer import RecurrentLayer
from keras_fam.layers.validation import check_attention_settings, require_layer_below
from keras_fam.ops import masks
from keras_fam.ops.attention import attend
from keras_fam.ops.rope import BlockPositions, rotate
from keras_fam.state import LayerState, Spec


def _clone(initializer):
    return initializer.clone() if hasattr(initializer, "clone") else initializer


@keras.saving.register_keras_serializable(package="keras_fam")
class FeedbackAttention(RecurrentLayer):
    """Attention over blocks, memory segments and a memory that feeds back (TransformerFAM, Alg. 2).

    Used by itself, the layer returns the attention output (no residual is added) and its memory is
    `F_τ = attention(F_{τ−1}) + F_{τ−1}`. Inside `TransformerFAMBlock` the memory also passes norms and feed-forward.

    ```python
    attention = keras_fam.FeedbackAttention(num_query_heads=4, head_dim=16, block_size=32, fam_length=8)
    y, state = attention(np.random.normal(size=(2, 100, 64)), return_state=True)
    ```

    Args:
        num_query_heads: N.
        head_dim: H, even if positions are rotated.
        num_key_value_heads: K, a divisor of N; None means N (multi-head), 1 is multi-query.
        block_size: S, tokens in a block.
        memory_segments: m, past blocks whose keys and values stay visible (BSWA, Alg. 1).
        fam_length: F, rows of memory; 0 is TransformerBSWA.
        attention_window: None (a token sees between m·S+1 and (m+1)·S keys), or how many keys it sees at most, itself
            included: m·S is Transformer-XL's mask, any w ≤ m·S+1 is plain sliding window attention, and with a larger w
            a token early in its block sees no more than the blocks hold.
        attention_sinks: W, the first tokens of each stream whose keys and values are kept for good (StreamingLLM, arXiv
            2309.17453): once their block has left the m·S tokens before a token's own block, it reads them as if they
            stood at the W positions before those; memory rows read them from the second block on. At most
            `block_size`; 0 by default. A pre-trained model needs them in order to stream.
        num_visible_memories: P, how many of the last memories tokens and memory rows may read (Table 6).
        initial_fam: `"prompt"` or `"prefix"`: the first memory F_0 is given (App. B.1; one learned set of rows where
            the layer stands alone); `"summary"`: the rows pass up the layers with block 1, whose tokens read no memory.
        fam_query: what writes the memory, as query and residual: `"feedback"` (default, the paper's form): the memory
            itself; `"anchored"` (an addition of this project): the rows of the layer below in the same block, starting
            from learned rows at the bottom, so that a pre-trained layer meets rows such as it knows. What the layer
            makes of them goes up to the next layer and, past `memory_update`, becomes the layer's memory;
            `"layer_inputs"` (likewise, and in a model of two layers or more): the same rows write, and a layer
            remembers them as they enter it, so that keys and values are made of what its weights know. Neither with
            `initial_fam="prefix"`.
        memory_update: what becomes of a memory between blocks: `"residual"` (the paper's), `"normalized"`,
            `"average"`, `"hard_gate"`, or a `keras_fam.MemoryUpdate` such as `keras_fam.Normalized(noise=0.7)`.
        fam_gate: None (the paper's form), or a number (an addition of this project): where a learned bias per query
            head, `[N]`, starts, which is added to the logits of memory rows as tokens read them (not as memory rows do;
            after the soft cap). `float("-inf")` closes the memory: it is written but not read, without a weight or
            cost, and outputs are those of `fam_length=0`.
        fam_position: where memory rows stand: at the `"last"` positions of the block that they compress, or evenly over
            it (`"float"`, App. B.2).
        fam_query_position: position of a memory query: `"previous"` (as its key) or `"current"` (the tail of the block
            being compressed).
        stop_memory_gradient: whether gradients stop at the memory segments (the ablation M1_SG).
        rope_wavelength: base of RoPE; None for no rotation.
        rotary_dim: None (all H), or how many features of each head are rotated, its first ones; even (GPT-NeoX).
        rope_scaling: None or a dict, see `keras_fam.ops.rope.inverse_wavelengths`.
        attention_scale: factor of the logits; None means H^-0.5.
        attention_softcap: None or the soft cap of the logits.
        softmax_sink: whether the softmax has one more term: a learned logit per query head, `[N]`, 0 at first, that no
            value belongs to, for tokens and memory rows (GPT-OSS, arXiv 2508.10925). Not to be confused with
            `attention_sinks`.
        use_attention_bias: whether query, key and value have biases.
        use_output_bias: whether the output projection has a bias.
        query_key_norm: None, or norms over H on queries and keys before the rotation: `"rms_norm"` (Qwen 3), or
            `"offset_rms_norm"`, which multiplies by 1 + scale (Gemma 3).
        query_key_norm_epsilon: epsilon of these norms.
        kernel_initializer: initializer of all kernels.
        stateful: whether a call continues where the last one stopped, for a fixed number of rows.

    Raises:
        ValueError: if settings contradict each other (heads that do not divide, F > S, …).

    Reference: Hwang et al., 2024, arXiv 2404.09173.
    """

    SETTINGS = (
        "num_query_heads", "head_dim", "num_key_value_heads", "block_size", "memory_segments", "fam_length",
        "attention_window", "attention_sinks", "num_visible_memories", "initial_fam", "fam_query", "memory_update",
        "fam_gate", "fam_position", "fam_query_position", "stop_memory_gradient", "rope_wavelength", "rotary_dim",
        "rope_scaling", "attention_scale", "attention_softcap", "softmax_sink", "use_attention_bias",
        "use_output_bias", "query_key_norm", "query_key_norm_epsilon",
    )  # fmt: skip

    # Plain attributes of this layer; `RecurrentLayer` has them as properties of its attention.
    block_size = fam_length = initial_fam = None

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
        attention_sinks: int = 0,
        num_visible_memories: int = 1,
        initial_fam: str = "prompt",
        fam_query: str = "feedback",
        memory_update="residual",
        fam_gate: float | None = None,
        fam_position: str = "last",
        fam_query_position: str = "previous",
        stop_memory_gradient: bool = False,
        rope_wavelength: float | None = 10_000.0,
        rotary_dim: int | None = None,
        rope_scaling: dict | None = None,
        attention_scale: float | None = None,
        attention_softcap: float | None = None,
        softmax_sink: bool = False,
        use_attention_bias: bool = False,
        use_output_bias: bool = False,
        query_key_norm: str | None = None,
        query_key_norm_epsilon: float = 1e-6,
        kernel_initializer="glorot_uniform",
        stateful: bool = False,
        **kwargs,
    ):
        super().__init__(stateful=stateful, **kwargs)
        settings = {name: value for name, value in locals().items() if name in self.SETTINGS}
        settings["num_key_value_heads"] = num_query_heads if num_key_value_heads is None else num_key_value_heads
        settings["memory_update"] = memory_updates.get(memory_update, self.memory_dtype)
        for name, value in settings.items():
            setattr(self, name, value)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.owns_initial_fam = True  # a model that shares one first memory among its layers sets it to False
        check_attention_settings(self)
        self.seed_generator = keras.random.SeedGenerator() if self.draws else None
        self.positions = BlockPositions(
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            block_size=block_size,
            fam_length=fam_length,
            fam_position=fam_position,
            fam_query_position=fam_query_position,
            wavelength=rope_wavelength,
            scaling=rope_scaling,
            dtype=self.memory_dtype,
        )

    def attention_layer(self):
        return self

    @property
    def draws(self):
        """Whether training needs random numbers."""
        return bool(self.fam_length and self.memory_update.noise)

    @property
    def rows_come_from_below(self):
        """Whether the rows of the layer below write the memory, not the memory itself."""
        return self.fam_query != "feedback"

    @property
    def memory_is_closed(self):
        """Whether tokens do not read the memory (`fam_gate=float("-inf")`)."""
        return self.fam_gate == float("-inf")

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
        if self.query_key_norm is not None:
            norm = {"epsilon": self.query_key_norm_epsilon, "dtype": self.dtype_policy}
            self.query_norm = NORMS[self.query_key_norm](name="query_norm", **norm)
            self.key_norm = NORMS[self.query_key_norm](name="key_norm", **norm)
            self.query_norm.build((None, None, self.num_query_heads, self.head_dim))
            self.key_norm.build((None, None, self.num_key_value_heads, self.head_dim))
        self.softmax_sink_logit = None
        if self.softmax_sink:
            self.softmax_sink_logit = self.add_weight(
                shape=(self.num_query_heads,),
                dtype=self.memory_dtype,
                initializer="zeros",
                autocast=False,
                name="softmax_sink",
            )
        self.memory_update.build((None, self.fam_length, self.hidden_dim))
        self.gate_bias = None
        if self.fam_length and self.fam_gate is not None and not self.memory_is_closed:
            self.gate_bias = self.add_weight(
                shape=(self.num_query_heads,),
                dtype=self.memory_dtype,
                initializer=keras.initializers.Constant(self.fam_gate),
                autocast=False,
                name="fam_gate",
            )
        self.initial_fam_rows = None
        if self.fam_length and self.owns_initial_fam:
            require_layer_below(self.fam_query, self.name)
            self.initial_fam_rows = self.add_weight(
                shape=(self.fam_length, self.hidden_dim),
                initializer=keras.initializers.RandomNormal(stddev=0.02),
                name="initial_fam",
            )
        self._build_state(input_shape[0])

    # State ------------------------------------------------------------------------------------------------------

    def initial_rows(self):
        """The learned first memory of a layer that stands alone, `[1, F, D]`."""
        if not self.owns_initial_fam:
            raise ValueError(
                f"The first memory of {self.name} belongs to the model around it. Use the model's "
                "`get_initial_state`, or a layer that stands alone."
            )
        return ops.expand_dims(ops.convert_to_tensor(self.initial_fam_rows), 0)

    def layer_state_spec(self, batch_size=None):
        """`LayerState` of `Spec`s for one layer."""
        B, F, P = batch_size, self.fam_length, self.num_visible_memories
        heads = (self.num_key_value_heads, self.head_dim)
        slots = Spec((B, (self.memory_segments + 1) * self.block_size, *heads), self.compute_dtype)
        state = LayerState(slots, slots)
        if self.attention_sinks:
            sinks = Spec((B, self.attention_sinks, *heads), self.compute_dtype)
            state = state._replace(sink_key=sinks, sink_value=sinks)
        if not F:
            return state
        fam, projected = Spec((B, F, self.hidden_dim), self.memory_dtype), Spec((B, P * F, *heads), self.compute_dtype)
        return state._replace(fam=fam, fam_key=projected, fam_value=projected)

    def initial_layer_state(self, batch_size, fam, pre_norm=None):
        """A `LayerState` with empty keys and the memory `fam`.

        Args:
            batch_size: B.
            fam: None (nothing to read yet) or `[1 or B, F, D]`.
            pre_norm: None, or what is applied to memory rows before they are projected.
        """
        spec = self.layer_state_spec(batch_size)
        # Each a tensor of its own: exporters and donated buffers take one tensor for one input.
        state = LayerState(*(ops.zeros(spec.key.shape, spec.key.dtype) for _ in range(2)))
        if self.attention_sinks:
            sinks = [ops.zeros(spec.sink_key.shape, spec.sink_key.dtype) for _ in range(2)]
            state = state._replace(sink_key=sinks[0], sink_value=sinks[1])
        if not self.fam_length:
            return state
        if fam is None:
            fam = ops.zeros((1, self.fam_length, self.hidden_dim), self.memory_dtype)
            key, value = (ops.zeros((1, *spec.fam_key.shape[1:]), spec.fam_key.dtype) for _ in range(2))
        else:
            fam = ops.cast(fam, self.memory_dtype)
            key, value = self.memory_key_value(fam if pre_norm is None else pre_norm(fam))
            older = (self.num_visible_memories - 1) * self.fam_length
            key, value = (ops.pad(x, [[0, 0], [0, older], [0, 0], [0, 0]]) for x in (key, value))
        fam, key, value = (ops.broadcast_to(x, (batch_size, *x.shape[1:])) for x in (fam, key, value))
        return state._replace(fam=fam, fam_key=key, fam_value=value)

    # Projections ------------------------------------------------------------------------------------------------

    @property
    def query_scale(self):
        """Factor of the logits, taken into the queries."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def softmax_settings(self):
        """Keywords of `attend` and its kin that are the same for tokens and for memory rows."""
        sink = self.softmax_sink_logit
        return {"softcap": self.attention_softcap, "sink": None if sink is None else ops.convert_to_tensor(sink)}

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

    def memory_query(self, normed):
        """Rotated, scaled queries `[B, *, F, N, H]` of normed memory rows `[B, *, F, D]`."""
        return rotate(self.project_query(normed), self.positions.memory_query)

    def memory_key_value(self, normed):
        """Rotated keys and values `[B, *, F, K, H]` of normed memory rows, for readers in the next block."""
        key, value = self.project_key_value(normed)
        return rotate(key, self.positions.memory_key), value

    def attend_rows(self, normed):
        """Attention among memory rows alone, before the first block (App. B.1): `[1, F, D]` to `[1, F, N, H]`."""
        table = self.positions.memory_key
        query, (key, value) = self.project_query(normed), self.project_key_value(normed)
        return attend(rotate(query, table), rotate(key, table), value, None, **self.softmax_settings)

    def sinks(self, state):
        """Keys, rotated for readers in any block, and values `[B, W, K, H]` of the stream's first tokens."""
        table = self.positions.sinks(self.memory_segments, self.attention_sinks)
        return rotate(state.sink_key, table), state.sink_value

    def visible(self, query, key, own_block=None):
        """Whether tokens at int positions `query` see those at `key`; see `keras_fam.ops.masks.visible`."""
        return masks.visible(
            query,
            key,
            block_size=self.block_size,
            memory_segments=self.memory_segments,
            attention_window=self.attention_window,
            own_block=own_block,
        )

    # Around the attention ---------------------------------------------------------------------------------------

    def token_output(self, attended, x, seed=None):
        return self.project_output(attended)

    def memory_output(self, attended, residual, seed=None):
        return residual + ops.cast(self.project_output(attended), residual.dtype)

    def get_config(self):
        config = super().get_config()
        config.pop("autocast", None)
        config.update({name: getattr(self, name) for name in self.SETTINGS})
        config["memory_update"] = memory_updates.serialize(self.memory_update)
        config["kernel_initializer"] = keras.initializers.serialize(self.kernel_initializer)
        config["stateful"] = self.stateful
        return config
