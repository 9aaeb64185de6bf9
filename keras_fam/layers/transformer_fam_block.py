"""TransformerFAMBlock: a pre-norm Transformer layer with feedback memory (Alg. 2); BSWA if `fam_length=0` (Alg. 1)."""

import keras
from keras import ops

from keras_fam.layers.chunk_attention import Hooks
from keras_fam.layers.fast_call import run
from keras_fam.layers.feedback_attention import FeedbackAttention
from keras_fam.layers.normalization import NORMS
from keras_fam.layers.recurrent import StreamingLayer
from keras_fam.layers.validation import require_one_of, require_positive, require_whole
from keras_fam.ops.random import dropout, fold_in, next_seed


@keras.saving.register_keras_serializable(package="keras_fam")
class TransformerFAMBlock(StreamingLayer):
    """A Transformer layer that reads a stream block by block and carries a memory of fixed size.

    Tokens and memory rows pass the same weights: norm, attention, residual, norm, feed-forward, residual. Put several
    in any Keras model, each with its own first memory; `TransformerFAMBackbone` shares one memory prompt among them.

    ```python
    x = keras.Input((None, 256))
    y = keras_fam.TransformerFAMBlock(num_query_heads=4, head_dim=64, intermediate_dim=1024, block_size=128,
                                      memory_segments=1, fam_length=16)(x)
    ```

    Args:
        num_query_heads: N.
        head_dim: H.
        intermediate_dim: width of the feed-forward part.
        activation: any Keras activation.
        gated: whether the feed-forward part is `down(activation(gate(x)) * up(x))` or `down(activation(up(x)))`.
        norm: `"rms_norm"`, `"offset_rms_norm"` (multiplies by 1 + scale: Gemma) or `"layer_norm"`.
        norm_epsilon: epsilon of the norms.
        use_post_norm: whether attention and feed-forward outputs are normed before they are added (Gemma 2).
        use_feedforward_bias: biases of the feed-forward part.
        dropout: rate, after attention and after feed-forward, for tokens and memory rows, in training.
        stateful: whether calls go on where the last one stopped; needs a fixed batch size. See `reset_state`.
        kernel_initializer: initializer of all kernels.
        **attention: every other setting of `FeedbackAttention`: `num_key_value_heads`, `block_size`,
            `memory_segments`, `fam_length`, `attention_window`, `num_visible_memories`, `initial_fam`, `fam_position`,
            `fam_query_position`, `fam_query`, `fam_feedback`, `fam_noise`, `fam_recurrence`, `segment_source`,
            `stop_memory_gradient`, `rope_wavelength`, `rope_scaling`, `attention_scale`, `attention_softcap`,
            `use_attention_bias`, `use_output_bias`, `use_query_key_norm`, `query_key_norm`,
            `query_key_norm_epsilon`; and Keras' `name`, `dtype`, `trainable`.

    Calls: `y = block(x)`, `y, state = block(x, padding_mask=..., initial_state=..., return_state=True)`, and the pure
    `y, state = block.advance(x, state)`; see `StreamingLayer`.

    Raises:
        ValueError: if settings contradict each other.

    Reference: Hwang et al., 2024, arXiv 2404.09173, Alg. 1 and 2.
    """

    SETTINGS = (
        "intermediate_dim", "activation", "gated", "norm", "norm_epsilon", "use_post_norm", "use_feedforward_bias",
        "dropout",
    )  # fmt: skip

    def __init__(
        self,
        num_query_heads: int,
        head_dim: int,
        intermediate_dim: int,
        *,
        activation="silu",
        gated: bool = True,
        norm: str = "rms_norm",
        norm_epsilon: float = 1e-6,
        use_post_norm: bool = False,
        use_feedforward_bias: bool = False,
        dropout: float = 0.0,
        stateful: bool = False,
        kernel_initializer="glorot_uniform",
        name: str | None = None,
        dtype=None,
        trainable: bool = True,
        **attention,
    ):
        super().__init__(stateful=stateful, name=name, dtype=dtype, trainable=trainable)
        require_whole("intermediate_dim", intermediate_dim, 1)
        require_one_of("norm", norm, NORMS)
        require_positive("norm_epsilon", norm_epsilon)
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` is a rate from 0 to below 1; received {dropout!r}.")
        self.intermediate_dim = intermediate_dim
        self.activation = keras.activations.get(activation)
        self.gated = gated
        self.norm = norm
        self.norm_epsilon = norm_epsilon
        self.use_post_norm = use_post_norm
        self.use_feedforward_bias = use_feedforward_bias
        self.dropout = dropout
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        attention.setdefault("query_key_norm_epsilon", norm_epsilon)
        attention.setdefault("query_key_norm", "rms_norm" if norm == "layer_norm" else norm)
        self.attention = FeedbackAttention(
            num_query_heads,
            head_dim,
            kernel_initializer=self.kernel_initializer,
            name="attention",
            dtype=self.dtype_policy,
            **attention,
        )
        self.seed_generator = keras.random.SeedGenerator() if self.draws else None

    @property
    def draws(self):
        """Whether training needs random numbers."""
        return bool(self.dropout or self.attention.fam_noise)

    def build(self, input_shape):
        self.hidden_dim = input_shape[-1]
        inner = (None, None, self.intermediate_dim)
        self.attention.build((None, *input_shape[1:]))
        self.attention_norm = self._norm("attention_norm")
        self.feedforward_norm = self._norm("feedforward_norm")
        self.post_attention_norm = self._norm("post_attention_norm") if self.use_post_norm else None
        self.post_feedforward_norm = self._norm("post_feedforward_norm") if self.use_post_norm else None
        self.gate = self._dense("gate", self.intermediate_dim, input_shape) if self.gated else None
        self.up = self._dense("up", self.intermediate_dim, input_shape)
        self.down = self._dense("down", self.hidden_dim, inner)
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

    # The layer itself: one function for tokens and for memory rows -----------------------------------------------

    def transform(self, attended, residual, seed=None):
        """Everything after the attention: residual, norm, feed-forward, residual.

        Args:
            attended: `[B, *, D]`, output of the attention projection.
            residual: `[B, *, D]`; its dtype is that of the result (float32 or wider for memory rows).
            seed: None, or an integer tensor `[2]` for dropout.
        """
        if self.post_attention_norm is not None:
            attended = run(self.post_attention_norm, attended)
        attended = dropout(attended, self.dropout, seed)
        x = residual + ops.cast(attended, residual.dtype)
        y = self.feed_forward(run(self.feedforward_norm, x))
        if self.post_feedforward_norm is not None:
            y = run(self.post_feedforward_norm, y)
        y = dropout(y, self.dropout, fold_in(seed, 1))
        return x + ops.cast(y, residual.dtype)

    def norm_input(self, x):
        """The norm before the attention."""
        return run(self.attention_norm, x)

    def feed_forward(self, x):
        """`[B, *, D]` to `[B, *, D]`."""
        shape = ops.shape(x)
        x = ops.reshape(x, (-1, shape[-1]))  # one matrix of rows, see `call_dense`
        hidden = run(self.up, x)
        hidden = self.activation(hidden) if self.gate is None else self.activation(run(self.gate, x)) * hidden
        return ops.reshape(run(self.down, hidden), shape)

    def forward_prompt(self, rows):
        """Memory rows `[1, F, D]` through this layer alone, seeing each other only: the next layer's F_0 (App. B.1)."""
        attended = self.attention.attend_rows(self.norm_input(rows))
        return self.transform(attended, rows)

    def hooks(self, seed=None):
        return Hooks(self.norm_input, self.transform, self.transform, seed)

    def advance_layer(self, x, state, position, *, seed=None, **options):
        """See `keras_fam.layers.chunk_attention.advance_layer`; norms and feed-forward are this block's."""
        return self.attention.advance_layer(x, state, position, self.hooks(seed), **options)

    def _advance(self, x, state, *, start, lengths=None, training=False, keep_state=True):
        seed = next_seed(self.seed_generator, x) if training else None
        return self.attention.advance_one(
            x, state, self.hooks(seed), start=start, lengths=lengths, keep_state=keep_state
        )

    # State ------------------------------------------------------------------------------------------------------

    def layer_state_spec(self, batch_size=None):
        return self.attention.layer_state_spec(batch_size)

    def state_spec(self, batch_size=None):
        """`StreamState` of `Spec`s (shape and dtype), for `batch_size` rows."""
        return self.attention.state_spec(batch_size)

    def initial_layer_state(self, batch_size, fam, **options):
        """See `FeedbackAttention.initial_layer_state`."""
        return self.attention.initial_layer_state(batch_size, fam, norm=self.norm_input, **options)

    def get_initial_state(self, batch_size):
        """The `StreamState` of `batch_size` rows that start anew."""
        return self.attention.initial_state_of(batch_size, norm=self.norm_input)

    def get_config(self):
        config = super().get_config()
        config.pop("autocast", None)
        config.update({name: getattr(self.attention, name) for name in self.attention.SETTINGS})
        config.update({name: getattr(self, name) for name in self.SETTINGS})
        config["activation"] = keras.activations.serialize(self.activation)
        config["kernel_initializer"] = keras.initializers.serialize(self.kernel_initializer)
        config["stateful"] = self.stateful
        return config
