"""One small table per family of KerasHub: its constructor's fields, the settings in its layers, its weights.

A `Family` says what every field of the source's constructor means here. A field that no table names is refused, so a
newer KerasHub cannot slip in a feature that these layers lack. Where KerasHub's layers do not follow their fields
(Gemma's layers keep their own epsilon, Qwen 3's query and key norms too), the built layer is read, not the field.
"""

from keras_fam.hub.family import Family, Only, Read, Unused
from keras_fam.layers.activations import gelu_tanh

READ = Read()
NO_DROPOUT = Only(0, "it drops out elsewhere than these layers; set it to 0 and give `convert` a `dropout` of its own")
SIZES = {
    name: name
    for name in ("vocabulary_size", "num_layers", "num_query_heads", "num_key_value_heads", "hidden_dim")
}  # fmt: skip
COMMON = {**SIZES, "intermediate_dim": "intermediate_dim", "layer_norm_epsilon": "norm_epsilon",
          "rope_max_wavelength": "rope_wavelength", "dropout": NO_DROPOUT}  # fmt: skip


def linear(factor):
    """`rope_scaling` of positions divided by `factor`."""
    return None if factor in (None, 1) else {"type": "linear", "factor": float(factor)}


def linear_factor(scaling):
    return 1.0 if scaling is None else scaling["factor"]


def head_dim(backbone):
    """H; where it is not a field, or None, the width divided by the heads."""
    return getattr(backbone, "head_dim", None) or backbone.hidden_dim // backbone.num_query_heads


# Llama, Llama 3, SmolLM ---------------------------------------------------------------------------------------------

LLAMA_BANDS = {
    "factor": "rope_frequency_adjustment_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_pretraining_sequence_length",
}


def read_llama(backbone, layer):
    factor = getattr(backbone, "rope_position_scaling_factor", 1.0)
    bands = {ours: getattr(backbone, theirs, None) for ours, theirs in LLAMA_BANDS.items()}
    if bands["factor"] is None:
        return {"rope_scaling": linear(factor)}
    if linear(factor):
        raise ValueError(
            f"`rope_position_scaling_factor` is 1 where `rope_frequency_adjustment_factor` is given; received {factor}."
        )
    return {"rope_scaling": {"type": "llama3", **bands}}


def write_llama(layers):
    scaling = layers[0]["rope_scaling"]
    if scaling is None or scaling["type"] == "linear":
        return {"rope_position_scaling_factor": linear_factor(scaling)}
    return {theirs: scaling[ours] for ours, theirs in LLAMA_BANDS.items()}


LLAMA_WEIGHTS = {
    "attention_norm.scale": "_self_attention_layernorm.scale",
    "attention.query.kernel": "_self_attention_layer._query_dense.kernel",
    "attention.key.kernel": "_self_attention_layer._key_dense.kernel",
    "attention.value.kernel": "_self_attention_layer._value_dense.kernel",
    "attention.output_projection.kernel": "_self_attention_layer._output_dense.kernel",
    "feedforward_norm.scale": "_feedforward_layernorm.scale",
    "gate.kernel": "_feedforward_gate_dense.kernel",
    "up.kernel": "_feedforward_intermediate_dense.kernel",
    "down.kernel": "_feedforward_output_dense.kernel",
}

LLAMA = Family(
    name="Llama",
    backbones=("LlamaBackbone", "Llama3Backbone"),
    fields={
        **COMMON,
        "tie_word_embeddings": "tie_weights",
        "rope_position_scaling_factor": READ,
        **{theirs: READ for theirs in LLAMA_BANDS.values()},
    },
    read=read_llama,
    write=write_llama,
    weights=LLAMA_WEIGHTS,
    rotation="_self_attention_layer.rotary_embedding_layer",
)

# Mistral ------------------------------------------------------------------------------------------------------------


def read_mistral(backbone, layer):
    return {
        "rope_scaling": linear(backbone.rope_scaling_factor),
        "attention_window": layer.sliding_window,
    }


def write_mistral(layers):
    return {
        "rope_scaling_factor": linear_factor(layers[0]["rope_scaling"]),
        "sliding_window": layers[0]["attention_window"],
    }


MISTRAL = Family(
    name="Mistral",
    backbones=("MistralBackbone",),
    fields={**COMMON, "rope_scaling_factor": READ, "sliding_window": READ, "head_dim": "head_dim"},
    read=read_mistral,
    write=write_mistral,
    weights=LLAMA_WEIGHTS,
    rotation="_self_attention_layer.rotary_embedding_layer",
)

# Qwen 2, 2.5 --------------------------------------------------------------------------------------------------------


def read_qwen(backbone, layer):
    attention = layer._self_attention_layer
    window = attention.sliding_window_size if attention.use_sliding_window_attention else None
    return {"rope_scaling": linear(backbone.rope_scaling_factor), "attention_window": window}


def write_qwen(layers):
    window = layers[0]["attention_window"]
    fields = {
        "rope_scaling_factor": linear_factor(layers[0]["rope_scaling"]),
        "use_sliding_window_attention": window is not None,
    }
    return fields if window is None else {**fields, "sliding_window_size": window}


QWEN = Family(
    name="Qwen",
    backbones=("QwenBackbone",),
    fields={
        **COMMON,
        "tie_word_embeddings": "tie_weights",
        "rope_scaling_factor": READ,
        "use_sliding_window_attention": READ,
        "sliding_window_size": READ,
    },
    fixed={"use_attention_bias": True},
    read=read_qwen,
    write=write_qwen,
    weights={
        **LLAMA_WEIGHTS,
        **{f"attention.{n}.bias": f"_self_attention_layer._{n}_dense.bias" for n in ("query", "key", "value")},
    },
    rotation="_self_attention_layer.rotary_embedding_layer",
)

# Qwen 3 -------------------------------------------------------------------------------------------------------------


def read_qwen3(backbone, layer):
    attention = layer._self_attention_layer
    return {
        "rope_scaling": linear(backbone.rope_scaling_factor),
        "attention_window": attention.sliding_window_size or None,
        "query_key_norm_epsilon": attention._query_dense_layer_norm.epsilon,
    }


def write_qwen3(layers):
    return {
        "rope_scaling_factor": linear_factor(layers[0]["rope_scaling"]),
        "sliding_window_size": layers[0]["attention_window"],
    }


QWEN3 = Family(
    name="Qwen 3",
    backbones=("Qwen3Backbone",),
    fields={
        **COMMON,
        "tie_word_embeddings": "tie_weights",
        "head_dim": "head_dim",
        "rope_scaling_factor": READ,
        "sliding_window_size": READ,
    },
    fixed={"query_key_norm": "rms_norm"},
    read=read_qwen3,
    write=write_qwen3,
    weights={
        **LLAMA_WEIGHTS,
        "attention.query_norm.scale": "_self_attention_layer._query_dense_layer_norm.scale",
        "attention.key_norm.scale": "_self_attention_layer._key_dense_layer_norm.scale",
    },
    rotation="_self_attention_layer.rotary_embedding_layer",
)

# Gemma 1 and 2, Gemma 3 ---------------------------------------------------------------------------------------------


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
    "attention.query.kernel": ("attention.query_dense.kernel", "heads_first"),
    "attention.key.kernel": ("attention.key_dense.kernel", "heads_first"),
    "attention.value.kernel": ("attention.value_dense.kernel", "heads_first"),
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

# Phi 3 --------------------------------------------------------------------------------------------------------------

SU = "its factors change with the length of the text read so far, which a stream has no end of"

PHI3 = Family(
    name="Phi 3",
    backbones=("Phi3Backbone",),
    fields={
        **COMMON,
        "max_sequence_length": Unused(4096),
        "pretraining_sequence_length": Unused(4096),
        "rope_scaling_type": Only(None, SU),
        "rope_scaling_short_factor": Only(None, SU),
        "rope_scaling_long_factor": Only(None, SU),
    },
    read=lambda backbone, layer: {},
    write=lambda layers: {},
    weights={
        "attention_norm.scale": "pre_attention_layernorm.scale",
        "attention.query.kernel": "attention.query_dense.kernel",
        "attention.key.kernel": "attention.key_dense.kernel",
        "attention.value.kernel": "attention.value_dense.kernel",
        "attention.output_projection.kernel": "attention.output_dense.kernel",
        "feedforward_norm.scale": "post_attention_layernorm.scale",
        "gate.kernel": "feedforward_gate_dense.kernel",
        "up.kernel": "feedforward_intermediate_dense.kernel",
        "down.kernel": "feedforward_output_dense.kernel",
    },
    rotation="attention.rotary_embedding_layer",
)

FAMILIES = (LLAMA, MISTRAL, QWEN, QWEN3, GEMMA, GEMMA3, PHI3)
