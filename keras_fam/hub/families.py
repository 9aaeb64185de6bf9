"""One small table per family of KerasHub: its constructor's fields, the settings in its layers, its weights.

A `Family` says what every field of the source's constructor means here. A field that no table names is refused, so a
newer KerasHub cannot slip in a feature that these layers lack. Where KerasHub's layers do not follow their fields
(Gemma's layers keep their own epsilon, Qwen 3's query and key norms too), the built layer is read, not the field.
"""

from keras_fam.hub.experts import MIXTRAL, QWEN3_MOE, QWEN_MOE
from keras_fam.hub.family import COMMON, READ, Family, Only, Unused, linear, linear_factor
from keras_fam.hub.gemma import GEMMA, GEMMA3
from keras_fam.hub.gpt_neox import GPT_NEOX
from keras_fam.hub.gpt_oss import GPT_OSS
from keras_fam.hub.layouts import FLAT_HEADS

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

# SmolLM 3 -----------------------------------------------------------------------------------------------------------


def read_smollm3(backbone, layer):
    return {"rope_wavelength": backbone.rope_theta if layer.self_attn.use_rope else None}


def write_smollm3(layers):
    wavelengths = [settings["rope_wavelength"] for settings in layers]
    return {
        "rope_theta": next((w for w in wavelengths if w is not None), 10_000.0),
        "rope_layer_enabled_list": [w is not None for w in wavelengths],
        "layer_types": ["full_attention"] * len(layers),
    }


SMOLLM3 = Family(
    name="SmolLM 3",
    backbones=("SmolLM3Backbone",),
    fields={
        "vocabulary_size": "vocabulary_size",
        "hidden_dim": "hidden_dim",
        "intermediate_dim": "intermediate_dim",
        "num_layers": "num_layers",
        "num_attention_heads": "num_query_heads",
        "num_key_value_heads": "num_key_value_heads",
        "attention_bias": "use_attention_bias",
        "attention_dropout": Only(0, "KerasHub's layers ignore it; set it to 0 and give `convert` a `dropout`"),
        "rope_layer_enabled_list": READ,
        "layer_types": READ,
        "mlp_bias": "use_feedforward_bias",
        "layer_norm_epsilon": "norm_epsilon",
        "max_position_embeddings": Unused(65_536),
        "rope_theta": READ,
        "partial_rotary_factor": Only(1.0, "KerasHub's layers fail with another value"),
    },
    fixed={"tie_weights": True},
    read=read_smollm3,
    write=write_smollm3,
    weights={
        "attention_norm.scale": "input_layernorm.scale",
        **{f"attention.{n}.kernel": (f"self_attn.{n[0]}_proj.kernel", FLAT_HEADS) for n in ("query", "key", "value")},
        **{f"attention.{n}.bias": (f"self_attn.{n[0]}_proj.bias", FLAT_HEADS) for n in ("query", "key", "value")},
        "attention.output_projection.kernel": "self_attn.o_proj.kernel",
        "feedforward_norm.scale": "post_attention_layernorm.scale",
        **{f"{n}.kernel": f"mlp.{n}_proj.kernel" for n in ("gate", "up", "down")},
        **{f"{n}.bias": f"mlp.{n}_proj.bias" for n in ("gate", "up", "down")},
    },
    rotation="self_attn.rotary_embedding",
    rotates="self_attn.use_rope",
    final_norm="norm",
)

FAMILIES = (LLAMA, MISTRAL, QWEN, QWEN3, GEMMA, GEMMA3, PHI3, SMOLLM3, GPT_NEOX, MIXTRAL, QWEN_MOE, QWEN3_MOE, GPT_OSS)
