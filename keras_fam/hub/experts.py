"""The tables of models whose feed-forward part is a mixture of experts: Mixtral, Qwen 1.5 MoE, Qwen 3 MoE."""

from keras_fam.hub.family import COMMON, READ, Family, Only, Unused, linear, linear_factor
from keras_fam.hub.layouts import joined
from keras_fam.layers import feed_forward as feed_forwards
from keras_fam.layers.mixture_of_experts import MixtureOfExperts

NO_NOISE = Only(0, "noise on what the router reads has no place here; set it to 0")
NO_ROUTER_OUTPUT = Only(False, "a language model here returns logits alone")


def experts(**settings):
    """The setting `feed_forward` of a layer with experts."""
    layer = MixtureOfExperts(**settings)
    return feed_forwards.serialize(layer, layer.dtype_policy, "feed_forward")


def experts_of(layer):
    """The setting `feed_forward` of one of our blocks: that of `experts`, or another layer's config, or None."""
    if type(layer) is MixtureOfExperts:
        return experts(**{name: getattr(layer, name) for name in MixtureOfExperts.SETTINGS})
    return None if layer is None else feed_forwards.serialize(layer, layer.dtype_policy)


def describe(value):
    """A setting in an error message: of a layer with experts, what makes it different from another one."""
    if not isinstance(value, dict) or value.get("class_name") != MixtureOfExperts.__name__:
        return repr(value)
    settings = ", ".join(f"{name}={value['config'][name]!r}" for name in MixtureOfExperts.SETTINGS)
    return f"{MixtureOfExperts.__name__}({settings})"


def write_experts(layers, **names):
    """Fields of a source whose layers have equal experts, and the numbers of the layers without.

    Args:
        layers: settings of each layer.
        **names: field of the source to setting of `MixtureOfExperts`.

    Raises:
        ValueError: if no layer has experts, or they differ.
    """
    found = [(i, layer["feed_forward"]) for i, layer in enumerate(layers) if layer["feed_forward"] is not None]
    for i, record in found[1:]:
        if record != found[0][1]:
            raise ValueError(
                f"All experts of a KerasHub model are alike; layers {found[0][0]} and {i} of the model differ in "
                "`feed_forward`. Convert a model with equal experts."
            )
    record = found[0][1] if found else None
    if record is None or record.get("class_name") != MixtureOfExperts.__name__:
        raise ValueError(
            "The class of KerasHub has a mixture of experts in its layers (keras_fam.MixtureOfExperts as their "
            f"`feed_forward`); the model has {describe(record)}. Use the class of another family."
        )
    config, with_experts = record["config"], {i for i, _ in found}
    return {field: config[name] for field, name in names.items()}, sorted({*range(len(layers))} - with_experts)


# Mixtral ------------------------------------------------------------------------------------------------------------


def read_mixtral(backbone, layer):
    return {
        "rope_scaling": linear(backbone.rope_scaling_factor),
        "attention_window": layer.sliding_window,
        "intermediate_dim": None,
        "feed_forward": experts(
            num_experts=layer.num_experts, intermediate_dim=layer.intermediate_dim, top_k=layer.top_k
        ),
    }


def write_mixtral(layers):
    fields, _ = write_experts(layers, num_experts="num_experts", top_k="top_k", intermediate_dim="intermediate_dim")
    return {
        **fields,
        "rope_scaling_factor": linear_factor(layers[0]["rope_scaling"]),
        "sliding_window": layers[0]["attention_window"],
    }


MIXTRAL = Family(
    name="Mixtral",
    backbones=("MixtralBackbone",),
    fields={
        **COMMON,
        "intermediate_dim": READ,
        "num_experts": READ,
        "top_k": READ,
        "rope_scaling_factor": READ,
        "sliding_window": READ,
        "router_jitter_noise": NO_NOISE,
        "router_aux_loss_coef": Unused(0.02),
        "output_router_logits": NO_ROUTER_OUTPUT,
    },
    read=read_mixtral,
    write=write_mixtral,
    weights={
        "attention_norm.scale": "_self_attention_layernorm.scale",
        **{f"attention.{n}.kernel": f"_self_attention_layer.{n}_dense.kernel" for n in ("query", "key", "value")},
        "attention.output_projection.kernel": "_self_attention_layer.output_dense.kernel",
        "feedforward_norm.scale": "_feedforward_layernorm.scale",
        "feed_forward.router_kernel": "_sparse_moe_block._sparse_feedforward_gate_dense.kernel",
        "feed_forward.gate_kernel": "_sparse_moe_block.expert_bank._expert_feedforward_gate_dense",
        "feed_forward.up_kernel": "_sparse_moe_block.expert_bank._expert_feedforward_intermediate_dense",
        "feed_forward.down_kernel": "_sparse_moe_block.expert_bank._expert_feedforward_output_dense",
    },
    rotation="_self_attention_layer.rotary_embedding_layer",
)

# Qwen 1.5 MoE, Qwen 3 MoE: some layers may have a plain feed-forward part --------------------------------------------

QWEN_FIELDS = {
    **COMMON,
    "tie_word_embeddings": "tie_weights",
    "rope_scaling_factor": READ,
    "sliding_window_size": READ,
    "moe_intermediate_dim": READ,
    "num_experts": READ,
    "top_k": READ,
    "norm_top_k_prob": READ,
    "decoder_sparse_step": READ,
    "mlp_only_layers": READ,
    "router_aux_loss_coefficient": Unused(0.001),
}
QWEN_WEIGHTS = {
    "attention_norm.scale": "_self_attention_layernorm.scale",
    "attention.output_projection.kernel": "_self_attention_layer._output_dense.kernel",
    "feedforward_norm.scale": "_feedforward_layernorm.scale",
    "gate.kernel": "mlp._feedforward_gate_dense.kernel",
    "up.kernel": "mlp._feedforward_intermediate_dense.kernel",
    "down.kernel": "mlp._feedforward_output_dense.kernel",
    "feed_forward.router_kernel": "mlp._sparse_feedforward_gate_dense.kernel",
    "feed_forward.gate_kernel": ("mlp.expert_bank._expert_feedforward_gate_dense", joined(0, 2)),
    "feed_forward.up_kernel": ("mlp.expert_bank._expert_feedforward_gate_dense", joined(1, 2)),
    "feed_forward.down_kernel": "mlp.expert_bank._expert_feedforward_output_dense",
}


def _read_qwen_experts(layer, **more):
    # Which layers have experts is read from them: `QwenMoeBackbone` does not tell a layer its number.
    if not hasattr(layer.mlp, "expert_bank"):
        return None
    return experts(
        num_experts=layer.num_experts,
        intermediate_dim=layer.moe_intermediate_dim,
        top_k=layer.top_k,
        normalize=bool(layer.norm_top_k_prob),
        **more,
    )


def _write_qwen(layers, **more):
    names = {"moe_intermediate_dim": "intermediate_dim", "norm_top_k_prob": "normalize"}
    fields, without = write_experts(layers, num_experts="num_experts", top_k="top_k", **names, **more)
    return {
        **fields,
        "decoder_sparse_step": 1,
        "mlp_only_layers": without,
        "rope_scaling_factor": linear_factor(layers[0]["rope_scaling"]),
    }


def read_qwen_moe(backbone, layer):
    window = layer.sliding_window_size if layer.use_sliding_window_attention else None
    return {
        "rope_scaling": linear(backbone.rope_scaling_factor),
        "attention_window": window,
        "feed_forward": _read_qwen_experts(layer, shared_intermediate_dim=layer.shared_expert_intermediate_dim),
    }


def write_qwen_moe(layers):
    fields = _write_qwen(layers, shared_expert_intermediate_dim="shared_intermediate_dim")
    window = layers[0]["attention_window"]
    fields["use_sliding_window_attention"] = window is not None
    return fields if window is None else {**fields, "sliding_window_size": window}


QWEN_MOE = Family(
    name="Qwen 1.5 MoE",
    backbones=("QwenMoeBackbone",),
    fields={
        **QWEN_FIELDS,
        "shared_expert_intermediate_dim": READ,
        "use_sliding_window_attention": READ,
        "output_router_logits": NO_ROUTER_OUTPUT,
    },
    fixed={"use_attention_bias": True},
    read=read_qwen_moe,
    write=write_qwen_moe,
    weights={
        **QWEN_WEIGHTS,
        **{f"attention.{n}.kernel": f"_self_attention_layer.{n}_dense.kernel" for n in ("query", "key", "value")},
        **{f"attention.{n}.bias": f"_self_attention_layer.{n}_dense.bias" for n in ("query", "key", "value")},
        "feed_forward.shared_router_kernel": "mlp.shared_expert_gate_dense.kernel",
        "feed_forward.shared_gate_kernel": "mlp.shared_expert_dense._feedforward_gate_dense.kernel",
        "feed_forward.shared_up_kernel": "mlp.shared_expert_dense._feedforward_intermediate_dense.kernel",
        "feed_forward.shared_down_kernel": "mlp.shared_expert_dense._feedforward_output_dense.kernel",
    },
    rotation="_self_attention_layer.rotary_embedding_layer",
)


def read_qwen3_moe(backbone, layer):
    attention = layer._self_attention_layer
    return {
        "rope_scaling": linear(backbone.rope_scaling_factor),
        "attention_window": attention.sliding_window_size or None,
        "query_key_norm_epsilon": attention._query_dense_layer_norm.epsilon,
        "feed_forward": _read_qwen_experts(layer),
    }


def write_qwen3_moe(layers):
    return {**_write_qwen(layers), "sliding_window_size": layers[0]["attention_window"]}


QWEN3_MOE = Family(
    name="Qwen 3 MoE",
    backbones=("Qwen3MoeBackbone",),
    fields={**QWEN_FIELDS, "head_dim": "head_dim"},
    fixed={"query_key_norm": "rms_norm"},
    read=read_qwen3_moe,
    write=write_qwen3_moe,
    weights={
        **QWEN_WEIGHTS,
        **{f"attention.{n}.kernel": f"_self_attention_layer._{n}_dense.kernel" for n in ("query", "key", "value")},
        "attention.query_norm.scale": "_self_attention_layer._query_dense_layer_norm.scale",
        "attention.key_norm.scale": "_self_attention_layer._key_dense_layer_norm.scale",
    },
    rotation="_self_attention_layer.rotary_embedding_layer",
)
