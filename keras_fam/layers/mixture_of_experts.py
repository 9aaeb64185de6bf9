"""`MixtureOfExperts`: a feed-forward part of several experts, of which every row chooses its own few."""

import keras
from keras import ops

from keras_fam.layers.validation import require_positive, require_positive_integer

SWIGLU_SLOPE = 1.702  # of GPT-OSS


@keras.saving.register_keras_serializable(package="keras_fam")
class MixtureOfExperts(keras.layers.Layer):
    """A gated feed-forward part with E experts, k of which a learned router chooses for each row.

    `y = Σ_e w_e · down_e(activation(gate_e(x)) * up_e(x))`, where w is a softmax over router logits and 0 for all but
    the k largest. Each row is routed by itself: experts have no capacity, no row is dropped, and what a row becomes
    does not depend on the chunk that it comes in. All experts compute all rows, so the cost is that of E experts. There
    is no loss that balances their load.

    ```python
    experts = keras_fam.MixtureOfExperts(num_experts=8, intermediate_dim=64, top_k=2)
    y = experts(np.random.normal(size=(2, 20, 32)))            # [2, 20, 32]

    block = keras_fam.TransformerFAMBlock(
        num_query_heads=4, head_dim=8, intermediate_dim=None, block_size=8, fam_length=2, feed_forward=experts
    )
    ```

    Args:
        num_experts: E.
        intermediate_dim: width of each expert.
        top_k: k, experts for a row, at most E; 2 by default.
        normalize: whether the k weights of a row sum to 1 (default), or are their part of the softmax over all experts.
        activation: any Keras activation; `"silu"` by default.
        swiglu_limit: None, or a positive number c (GPT-OSS has 7): with g = min(gate(x), c) and u = up(x) clipped to
            [−c, c], an expert's hidden row is `g · sigmoid(1.702 · g) · (u + 1)`, and `activation` is of no use.
        use_bias: whether router and experts have biases; False by default.
        shared_intermediate_dim: None, or the width of one more expert that reads every row, weighted by the sigmoid of
            a learned logit (Qwen 1.5 MoE).
        kernel_initializer: initializer of all kernels.
        name, dtype, trainable: as in any Keras layer.

    Calls: `y = experts(x)`, `[..., D]` to `[..., D]`, in the compute dtype; routing is float32 or wider.

    Raises:
        ValueError: if a size is not positive, or `top_k` exceeds `num_experts`.

    Reference: Shazeer et al., 2017, arXiv 1701.06538; weights over the chosen experts alone as in Mixtral, Jiang et
    al., 2024, arXiv 2401.04088.
    """

    SETTINGS = (
        "num_experts", "intermediate_dim", "top_k", "normalize", "activation", "swiglu_limit", "use_bias",
        "shared_intermediate_dim",
    )  # fmt: skip

    def __init__(
        self,
        num_experts: int,
        intermediate_dim: int,
        top_k: int = 2,
        *,
        normalize: bool = True,
        activation="silu",
        swiglu_limit: float | None = None,
        use_bias: bool = False,
        shared_intermediate_dim: int | None = None,
        kernel_initializer="glorot_uniform",
        **kwargs,
    ):
        super().__init__(**kwargs)
        for name, value in (("num_experts", num_experts), ("intermediate_dim", intermediate_dim), ("top_k", top_k)):
            require_positive_integer(name, value)
        if top_k > num_experts:
            raise ValueError(
                f"`top_k` must be at most `num_experts`: a row chooses among the experts; received {top_k} of "
                f"{num_experts}. Lower `top_k`, or add experts."
            )
        if shared_intermediate_dim is not None:
            require_positive_integer("shared_intermediate_dim", shared_intermediate_dim)
        if swiglu_limit is not None:
            require_positive("swiglu_limit", swiglu_limit)
        self.num_experts, self.intermediate_dim, self.top_k = num_experts, intermediate_dim, top_k
        self.normalize, self.swiglu_limit, self.use_bias = normalize, swiglu_limit, use_bias
        self.shared_intermediate_dim = shared_intermediate_dim
        self.activation = keras.activations.get(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def weight_shapes(self, hidden_dim):
        """A dict from the name of each weight to its shape, for rows of width `hidden_dim`."""
        D, E, M, shared = hidden_dim, self.num_experts, self.intermediate_dim, self.shared_intermediate_dim
        shapes = {"router_kernel": (D, E), "gate_kernel": (E, D, M), "up_kernel": (E, D, M), "down_kernel": (E, M, D)}
        if self.use_bias:
            shapes |= {"router_bias": (E,), "gate_bias": (E, M), "up_bias": (E, M), "down_bias": (E, D)}
        if shared is not None:
            shapes |= {"shared_router_kernel": (D, 1), "shared_gate_kernel": (D, shared)}
            shapes |= {"shared_up_kernel": (D, shared), "shared_down_kernel": (shared, D)}
        return shapes

    def build(self, input_shape):
        self.hidden_dim = input_shape[-1]
        self.router_bias = self.gate_bias = self.up_bias = self.down_bias = None
        for name, shape in self.weight_shapes(self.hidden_dim).items():
            initializer = self.kernel_initializer
            if name.endswith("bias"):
                initializer = "zeros"
            elif hasattr(initializer, "clone"):
                initializer = initializer.clone()
            setattr(self, name, self.add_weight(shape=shape, initializer=initializer, name=name))

    def route(self, rows):
        """Weights of the experts, `[R, D]` to `[R, E]`: k of them in a row, the others 0; float32 or wider."""
        logits = ops.matmul(rows, self.router_kernel)
        logits = logits if self.router_bias is None else logits + self.router_bias
        logits = ops.cast(logits, keras.backend.result_type(logits.dtype, "float32"))
        _, chosen = ops.top_k(logits, k=self.top_k)
        chosen = ops.sum(ops.one_hot(chosen, self.num_experts, dtype=logits.dtype), axis=1)
        if self.normalize:
            return ops.softmax(ops.where(chosen > 0, logits, ops.cast(-1e30, logits.dtype)), axis=-1)
        return ops.softmax(logits, axis=-1) * chosen

    def call(self, x):
        rows = ops.reshape(x, (-1, self.hidden_dim))
        weights = ops.cast(self.route(rows), self.compute_dtype)
        gate, up = ops.einsum("rd,edm->erm", rows, self.gate_kernel), ops.einsum("rd,edm->erm", rows, self.up_kernel)
        if self.use_bias:
            gate, up = gate + self.gate_bias[:, None], up + self.up_bias[:, None]
        # Weighed while it is as narrow as an expert, and summed over experts by the product itself.
        hidden = self._hidden(gate, up) * ops.expand_dims(ops.transpose(weights), -1)
        y = ops.einsum("erm,emd->rd", hidden, self.down_kernel)
        if self.use_bias:
            y = y + ops.matmul(weights, self.down_bias)
        if self.shared_intermediate_dim is not None:
            gate, up = ops.matmul(rows, self.shared_gate_kernel), ops.matmul(rows, self.shared_up_kernel)
            shared = ops.matmul(self._hidden(gate, up), self.shared_down_kernel)
            y = y + shared * ops.sigmoid(ops.matmul(rows, self.shared_router_kernel))
        return ops.reshape(y, ops.shape(x))

    def _hidden(self, gate, up):
        if self.swiglu_limit is None:
            return self.activation(gate) * up
        limit = ops.convert_to_tensor(self.swiglu_limit, gate.dtype)
        gate, up = ops.minimum(gate, limit), ops.maximum(ops.minimum(up, limit), -limit)
        return gate * ops.sigmoid(SWIGLU_SLOPE * gate) * (up + 1)

    def quantize(self, mode=None, **kwargs):
        """Experts are not quantized: raises ValueError."""
        raise ValueError(
            f"{self.name} is a mixture of experts, whose kernels are not quantized: `quantize` reaches Dense and "
            f"EinsumDense kernels, one per layer; received {mode!r}. Leave the model as it is, or use "
            'dtype="bfloat16" to halve its weights.'
        )

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        config = {**super().get_config(), **{name: getattr(self, name) for name in self.SETTINGS}}
        config["activation"] = keras.activations.serialize(self.activation)
        config["kernel_initializer"] = keras.initializers.serialize(self.kernel_initializer)
        return config
