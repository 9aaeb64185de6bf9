"""The tables of Gemma 1 and 2 and of Gemma 3, as in `families`."""

from keras_fam.hub.family import NO_DROPOUT, READ, SIZES, Family, Only, Unused, linear, linear_factor
from keras_fam.hub.layouts import HEADS_FIRST
from keras_fam.layers.activations import gelu_tanh


def read_gemma(backbone, layer):
    attention = layer.attention
    if layer.use_post_attention_norm != layer.use_post_ffw_norm:
        raise ValueError(
            "`use_post_attention_norm` and `use_post_ffw_norm` are both on or both off here; received "
            f"{layer.use_post_attention_norm} and {layer.use_post_ffw_norm}."
        )
    normalized = attention.query_head_dim_normalize
    return {
        "intermediate_dim": int(layer.gating_ffw.kernel.shape[-1]),
        "norm_epsilon": layer.pre_attention_norm.epsilon,
        "use_post_norm": layer.use_post_attention_norm,
        "rope_wavelength": attention.rope_layer.max_wavelength,
        "rope_scaling": linear(attention.rope_layer.scaling_factor),
        "attention_scale": None if normalized else (backbone.hidden_dim // backbone.num_query_heads) ** -0.5,
        "attention_window": attention.sliding_window_size if attention.use_sliding_window_attention else None,
        "embedding_scale": backbone.hidden_dim**0.5,
        "query_key_norm": "offset_rms_norm" if getattr(backbone, "use_query_key_norm", False) else None,
        "query_key_norm_epsilon": attention.query_norm.epsilon if hasattr(attention, "query_norm") else 1e-6,
    }


def write_gemma(layers):
    windows = {settings["attention_window"] for settings in layers} - {None}
    fields = {
        "intermediate_dim": 2 * layers[0]["intermediate_dim"],
        "layer_norm_epsilon": layers[0]["norm_epsilon"],
        "use_post_attention_norm": layers[0]["use_post_norm"],
        "use_post_ffw_norm": layers[0]["use_post_norm"],
        "query_head_dim_normalize": layers[0]["attention_scale"] is None,
        "use_sliding_window_attention": bool(windows),
    }
    return {**fields, "sliding_window_size": windows.pop()} if windows else fields


def write_gemma3(layers):
    # The last of every six layers is global, with a wavelength and a scaling of its own.
    last = layers[min(5, len(layers) - 1)]
    return {
        **write_gemma(layers),
        "use_query_key_norm": layers[0]["query_key_norm"] is not None,
        "intermediate_dim": layers[0]["intermediate_dim"],
        "use_sliding_window_attention": layers[0]["rope_wavelength"] == 10_000.0,
        "local_rope_scaling_factor": linear_factor(layers[0]["rope_scaling"]),
        "global_rope_scaling_factor": linear_factor(last["rope_scaling"]),
    }


GEMMA_FIELDS = {
    **SIZES,
    "head_dim": "head_dim",
    "intermediate_dim": READ,
    "layer_norm_epsilon": READ,
    "query_head_dim_normalize": READ,
    "use_post_ffw_norm": READ,
    "use_post_attention_norm": READ,
    "attention_logit_soft_cap": "attention_softcap",
    "final_logit_soft_cap": "logit_softcap",
    "use_sliding_window_attention": READ,
    "sliding_window_size": READ,
    "dropout": NO_DROPOUT,
}
GEMMA_WEIGHTS = {
    "attention_norm.scale": "pre_attention_norm.scale",
    "attention.query.kernel": ("attention.query_dense.kernel", HEADS_FIRST),
    "attention.key.kernel": ("attention.key_dense.kernel", HEADS_FIRST),
    "attention.value.kernel": ("attention.value_dense.kernel", HEADS_FIRST),
    "attention.output_projection.kernel": "attention.output_dense.kernel",
    "post_attention_norm.scale": "post_attention_norm.scale",
    "feedforward_norm.scale": "pre_ffw_norm.scale",
    "gate.kernel": "gating_ffw.kernel",
    "up.kernel": "gating_ffw_2.kernel",
    "down.kernel": "ffw_linear.kernel",
    "post_feedforward_norm.scale": "post_ffw_norm.scale",
}

# Gemma stores the rotated halves interleaved; queries and keys alike, so that no product changes.
GEMMA = Family(
    name="Gemma",
    backbones=("GemmaBackbone",),
    fields=GEMMA_FIELDS,
    fixed={
        "activation": gelu_tanh,
        "tie_weights": True,
        "norm": "offset_rms_norm",
    },
    read=read_gemma,
    write=write_gemma,
    weights=GEMMA_WEIGHTS,
    rotation="attention.rope_layer",
)

GEMMA3 = Family(
    name="Gemma 3",
    backbones=("Gemma3Backbone",),
    fields={
        **GEMMA_FIELDS,
        "use_query_key_norm": READ,
        "local_rope_scaling_factor": READ,
        "global_rope_scaling_factor": READ,
        "image_size": Unused(None),
        "vision_encoder": Only(None, "images are not read here; build the text model alone"),
        "use_bidirectional_attention": Only(False, "a stream reads forwards"),
        "is_embedding_model": Only(False, "pooling is no part of a language model"),
        "pooling_intermediate_dim": Only(None, "pooling is no part of a language model"),
        "embedding_dim": Only(None, "pooling is no part of a language model"),
    },
    fixed=GEMMA.fixed,
    read=read_gemma,
    write=write_gemma3,
    weights={
        **GEMMA_WEIGHTS,
        "attention.query_norm.scale": "attention.query_norm.scale",
        "attention.key_norm.scale": "attention.key_norm.scale",
    },
    rotation="attention.rope_layer",
)
