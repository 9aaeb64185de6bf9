"""The table of GPT-OSS: experts with clamped SwiGLU, a learned logit in each softmax, YaRN, alternating windows."""

import math

from keras_fam.hub.experts import NO_ROUTER_OUTPUT, experts, write_experts
from keras_fam.hub.family import COMMON, READ, Family
from keras_fam.hub.layouts import interleaved


def read_gpt_oss(backbone, layer):
    attention, bank = layer.self_attention_layer, layer.sparse_moe_block.experts
    window = attention.sliding_window  # tokens before a query's own, which is read as well
    return {
        "intermediate_dim": None,
        "attention_window": window + 1 if window else None,
        "feed_forward": experts(
            num_experts=bank.num_experts,
            intermediate_dim=bank.intermediate_dim,
            top_k=layer.top_k,
            swiglu_limit=bank.limit,
            use_bias=True,
        ),
        **_read_yarn(attention.rotary_embedding_layer, attention._head_dim),
    }


def _read_yarn(rotary, head_dim):
    factor = float(rotary.scaling_factor)
    if factor == 1:
        return {}
    scaling = {name: getattr(rotary, name) for name in ("beta_fast", "beta_slow", "truncate")}
    scaling["original_max_position_embeddings"] = rotary.original_max_position_embeddings
    # Queries and keys are both made longer there; here their product is.
    temperature = 0.1 * math.log(factor) + 1.0
    return {
        "rope_scaling": {"type": "yarn", "factor": factor, **scaling},
        "attention_scale": temperature**2 * head_dim**-0.5,
    }


def write_gpt_oss(layers):
    names = {"num_experts": "num_experts", "top_k": "top_k", "intermediate_dim": "intermediate_dim"}
    scaling = layers[0]["rope_scaling"]
    windows = {layer["attention_window"] for layer in layers} - {None}
    return {
        **write_experts(layers, **names)[0],
        "sliding_window": min(windows) - 1 if windows else None,
        "rope_scaling_factor": 1.0 if scaling is None else scaling["factor"],
    }


BANK = "sparse_moe_block.experts"
GPT_OSS = Family(
    name="GPT-OSS",
    backbones=("GptOssBackbone",),
    fields={
        **COMMON,
        "intermediate_dim": READ,
        "head_dim": "head_dim",
        "num_experts": READ,
        "top_k": READ,
        "rope_scaling_factor": READ,
        "sliding_window": READ,
        "output_router_logits": NO_ROUTER_OUTPUT,
    },
    fixed={"softmax_sink": True, "use_attention_bias": True, "use_output_bias": True},
    read=read_gpt_oss,
    write=write_gpt_oss,
    weights={
        "attention_norm.scale": "input_layernorm.scale",
        **{
            f"attention.{name}.{part}": f"self_attention_layer.{name}_dense.{part}"
            for name in ("query", "key", "value")
            for part in ("kernel", "bias")
        },
        **{f"attention.output_projection.{p}": f"self_attention_layer.output_dense.{p}" for p in ("kernel", "bias")},
        "attention.softmax_sink_logit": "self_attention_layer.sinks",
        "feedforward_norm.scale": "post_attention_layernorm.scale",
        **{f"feed_forward.router_{p}": f"sparse_moe_block.router.router_dense.{p}" for p in ("kernel", "bias")},
        "feed_forward.gate_kernel": (f"{BANK}.gate_up_proj", interleaved(0, 2)),
        "feed_forward.gate_bias": (f"{BANK}.gate_up_proj_bias", interleaved(0, 2)),
        "feed_forward.up_kernel": (f"{BANK}.gate_up_proj", interleaved(1, 2)),
        "feed_forward.up_bias": (f"{BANK}.gate_up_proj_bias", interleaved(1, 2)),
        "feed_forward.down_kernel": f"{BANK}.down_proj",
        "feed_forward.down_bias": f"{BANK}.down_proj_bias",
    },
    rotation="self_attention_layer.rotary_embedding_layer",
)
