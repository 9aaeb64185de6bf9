"""TransformerFAMBlock: a pre-norm Transformer layer with feedback memory (Alg. 2); BSWA if `fam_length=0` (Alg. 1)."""

import keras
from keras import ops

from keras_fam.layers import feed_forward as feed_forwards
from keras_fam.layers.fast_call import run
from keras_fam.layers.feedback_attention import FeedbackAttention
from keras_fam.layers.normalization import NORMS
from keras_fam.layers.recurrent_layer import RecurrentLayer
from keras_fam.layers.validation import require_one_of, require_positive, require_positive_integer
from keras_fam.ops.random import dropout, fold_in


@keras.saving.register_keras_serializable(package="keras_fam")
class TransformerFAMBlock(RecurrentLayer):
    """A Transformer layer that reads a stream block by block and carries a memory of constant size.

    Tokens and memory rows pass through the same weights: norm, attention, residual, norm, feed-forward, residual. Put
    several in any Keras model, each with its own first memory; `TransformerFAMBackbone` shares one memory prompt among
    its layers.

    ```python
    x = keras.Input((None, 256))
    y = keras_fam.TransformerFAMBlock(num_query_heads=4, head_dim=64, intermediate_dim=1024, block_size=128,
                                      memory_segments=1, fam_length=16)(x)
    model = keras.Model(x, keras.layers.Dense(10)(y))

    block = keras_fam.TransformerFAMBlock(2, 8, 32, block_size=8, memory_segments=1, fam_length=2)
    first, second = np.random.normal(size=(2, 3, 20, 16))
    y, state = block(first, return_state=True)
    y, state = block(second, initial_state=state, return_state=True)  # the same as one call of 40 tokens
    ```

    Args:
        num_query_heads: N.
        head_dim: H, even if positions are rotated.
        intermediate_dim: width of the feed-forward part; may be None with `feed_forward`.
        num_key_value_heads: K, a divisor of N; None means N (multi-head), 1 is multi-query.
        block_size: S, tokens in a block.
        memory_segments: m, past blocks whose keys and values stay visible.
        fam_length: F, rows of memory; 0 is TransformerBSWA.
        attention_window, attention_sinks, num_visible_memories, initial_fam, fam_query, memory_update, fam_gate,
            fam_position, fam_query_position, stop_memory_gradient, rope_wavelength, rotary_dim, rope_scaling,
            attention_scale, attention_softcap, softmax_sink, use_attention_bias, use_output_bias, query_key_norm,
            query_key_norm_epsilon: see `FeedbackAttention`. The epsilon defaults to `norm_epsilon`.
        activation: any Keras activation.
        gated: whether the feed-forward part is `down(activation(gate(x)) * up(x))` or `down(activation(up(x)))`.
        norm: `"rms_norm"`, `"offset_rms_norm"` (multiplies by 1 + scale: Gemma) or `"layer_norm"`.
        norm_epsilon: epsilon of the norms.
        use_post_norm: whether attention and feed-forward outputs are normed before they are added (Gemma 2).
        parallel_residual: whether the feed-forward part reads the residual itself, the layer's input, so that both
            parts are added to it at once (GPT-NeoX, arXiv 2204.06745), in place of one after the other.
        use_feedforward_bias: whether the feed-forward part has biases.
        feed_forward: None, or any Keras layer in the place of the feed-forward part, such as
            `keras_fam.MixtureOfExperts` (or its config): `[B, T, D]` to `[B, T, D]`, each row by itself, without a
            state; memory rows pass it too. `activation`, `gated` and `use_feedforward_bias` are then of no use.
        dropout: rate, after attention and after feed-forward, for tokens and memory rows, in training.
        stateful: whether a call continues where the last one stopped; needs a fixed batch size. See `reset_state`.
        kernel_initializer: initializer of all kernels.
        name, dtype, trainable: as in any Keras layer.

    Calls: `y = block(x)`, `y, state = block(x, padding_mask=..., initial_state=..., return_state=True)`, and the pure
    `y, state = block.advance(x, state)`.

    Raises:
        ValueError: if settings contradict each other.

    Reference: Hwang et al., 2024, arXiv 2404.09173, Alg. 1 and 2.
    """

    SETTINGS = (
        "intermediate_dim", "activation", "gated", "norm", "norm_epsilon", "use_post_norm", "parallel_residual",
        "use_feedforward_bias", "feed_forward", "dropout",
    )  # fmt: skip

    keeps_tokens_apart = True  # only memory rows pass `memory_output`, and what projects rows for it

    def __init__(
        self,
        num_query_heads: int,
        head_dim: int,
        intermediate_dim: int | None,
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
        query_key_norm_epsilon: float | None = None,
        activation="silu",
        gated: bool = True,
        norm: str = "rms_norm",
        norm_epsilon: float = 1e-6,
        use_post_norm: bool = False,
        parallel_residual: bool = False,
        use_feedforward_bias: bool = False,
        feed_forward=None,
        dropout: float = 0.0,
        stateful: bool = False,
        kernel_initializer="glorot_uniform",
        name: str | None = None,
        dtype=None,
        trainable: bool = True,
    ):
        attention = {name: value for name, value in locals().items() if name in FeedbackAttention.SETTINGS}
        super().__init__(stateful=stateful, name=name, dtype=dtype, trainable=trainable)
        if feed_forward is None or intermediate_dim is not None:
            require_positive_integer("intermediate_dim", intermediate_dim)
        require_one_of("norm", norm, NORMS)
        require_positive("norm_epsilon", norm_epsilon)
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be a rate in [0, 1); received {dropout!r}.")
        self.intermediate_dim = intermediate_dim
        self.activation = keras.activations.get(activation)
        self.gated = gated
        self.norm = norm
        self.norm_epsilon = norm_epsilon
        self.use_post_norm = use_post_norm
        self.parallel_residual = parallel_residual
        self.use_feedforward_bias = use_feedforward_bias
        self.feed_forward = feed_forwards.get(feed_forward, self.dtype_policy)
        self.dropout = dropout
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        attention["query_key_norm_epsilon"] = norm_epsilon if query_key_norm_epsilon is None else query_key_norm_epsilon
        self.attention = FeedbackAttention(
            **attention, kernel_initializer=self.kernel_initializer, name="attention", dtype=self.dtype_policy
        )
        self.seed_generator = keras.random.SeedGenerator() if self.draws else None

    def attention_layer(self):
        return self.attention

    @property
    def draws(self):
        """Whether training needs random numbers."""
        return bool(self.dropout or self.attention.draws)

    def build(self, input_shape):
        self.hidden_dim = input_shape[-1]
        self.attention.build((None, *input_shape[1:]))
        self.attention_norm = self._norm("attention_norm")
        self.feedforward_norm = self._norm("feedforward_norm")
        self.post_attention_norm = self._norm("post_attention_norm") if self.use_post_norm else None
        self.post_feedforward_norm = self._norm("post_feedforward_norm") if self.use_post_norm else None
        self.gate = self.up = self.down = None
        if self.feed_forward is not None:
            feed_forwards.build(self.feed_forward, self.hidden_dim)
        else:
            self.gate = self._dense("gate", self.intermediate_dim, input_shape) if self.gated else None
            self.up = self._dense("up", self.intermediate_dim, input_shape)
            self.down = self._dense("down", self.hidden_dim, (None, None, self.intermediate_dim))
        self._build_state(input_shape[0])

    def make_norm(self, name):
        """A norm of this layer's kind, not built."""
        return NORMS[self.norm](epsilon=self.norm_epsilon, dtype=self.dtype_policy, name=name)

    def _norm(self, name):
        norm = self.make_norm(name)
        norm.build((None, None, self.hidden_dim))
        return norm

    def _dense(self, name, units, input_shape):
        initializer = self.kernel_initializer
        dense = keras.layers.Dense(
            units,
            use_bias=self.use_feedforward_bias,
            kernel_initializer=initializer.clone() if hasattr(initializer, "clone") else initializer,
            dtype=self.dtype_policy,
            name=name,
        )
        dense.build((None, None, input_shape[-1]))
        return dense

    # Around the attention: one function for tokens and for memory rows ---------------------------------------------

    def pre_norm(self, x):
        return run(self.attention_norm, x)

    def token_output(self, attended, x, seed=None):
        """Everything after the attention: projection, residual, norm, feed-forward, residual.

        Args:
            attended: `[B, *, N, H]`.
            x: `[B, *, D]`, the residual; its dtype is that of the result (float32 or wider for memory rows).
            seed: None, or an integer tensor `[2]` for dropout.
        """
        attended = self.attention.project_output(attended)
        if self.post_attention_norm is not None:
            attended = run(self.post_attention_norm, attended)
        attended = dropout(attended, self.dropout, seed)
        attended = x + ops.cast(attended, x.dtype)
        y = self.apply_feed_forward(run(self.feedforward_norm, x if self.parallel_residual else attended))
        if self.post_feedforward_norm is not None:
            y = run(self.post_feedforward_norm, y)
        y = dropout(y, self.dropout, fold_in(seed, 1))
        return attended + ops.cast(y, x.dtype)

    memory_output = token_output  # Alg. 2: the memory passes the layer's own weights

    def apply_feed_forward(self, x):
        """`[B, *, D]` to `[B, *, D]`."""
        if self.feed_forward is not None:
            return self.feed_forward(x)
        shape = ops.shape(x)
        x = ops.reshape(x, (-1, shape[-1]))  # one matrix of rows, see `call_dense`
        hidden = run(self.up, x)
        hidden = self.activation(hidden) if self.gate is None else self.activation(run(self.gate, x)) * hidden
        return ops.reshape(run(self.down, hidden), (-1, *shape[1:]))

    def forward_rows(self, rows):
        """Memory rows `[B, F, D]` through this layer alone, seeing each other only: the next layer's F_0 (App. B.1)."""
        return self.memory_output(self.attention.attend_rows(self.pre_norm(rows)), rows)

    def get_config(self):
        config = super().get_config()
        config.pop("autocast", None)
        attention = self.attention.get_config()
        config.update({name: attention[name] for name in self.attention.SETTINGS})
        config.update({name: getattr(self, name) for name in self.SETTINGS})
        config["activation"] = keras.activations.serialize(self.activation)
        config["feed_forward"] = feed_forwards.serialize(self.feed_forward, self.dtype_policy)
        config["kernel_initializer"] = keras.initializers.serialize(self.kernel_initializer)
        config["stateful"] = self.stateful
        return config
