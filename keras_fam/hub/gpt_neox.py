"""The table of GPT-NeoX (Pythia is one): parallel residual, partial rotation, biases everywhere."""

from keras_fam.hub.family import NO_DROPOUT, READ, Family, Unused
from keras_fam.hub.layouts import FLAT_HEADS, joined
from keras_fam.layers.activations import gelu_tanh


def read_gpt_neox(backbone, layer):
    attention = layer._self_attention_layer
    rotary_dim, head_dim = attention.rotary_dim, attention.attn_head_size
    return {
        "num_key_value_heads": backbone.num_heads,
        "rotary_dim": None if rotary_dim == head_dim else rotary_dim,
    }


def write_gpt_neox(layers):
    head_dim, rotary_dim = layers[0]["head_dim"], layers[0]["rotary_dim"] or layers[0]["head_dim"]
    share = rotary_dim / head_dim
    exact = int(head_dim * share) == rotary_dim  # KerasHub rounds down
    return {"rotary_percentage": share if exact else (rotary_dim + 0.5) / head_dim}


GPT_NEOX = Family(
    name="GPT-NeoX",
    backbones=("GPTNeoXBackbone",),
    fields={
        "vocabulary_size": "vocabulary_size",
        "num_layers": "num_layers",
        "num_heads": "num_query_heads",
        "hidden_dim": "hidden_dim",
        "intermediate_dim": "intermediate_dim",
        "dropout": NO_DROPOUT,
        "rotary_percentage": READ,
        "rotary_max_wavelength": "rope_wavelength",
        "layer_norm_epsilon": "norm_epsilon",
        "max_sequence_length": Unused(512),
    },
    fixed={
        "activation": gelu_tanh,
        "gated": False,
        "norm": "layer_norm",
        "parallel_residual": True,
        "tie_weights": True,
        "use_attention_bias": True,
        "use_output_bias": True,
        "use_feedforward_bias": True,
    },
    read=read_gpt_neox,
    write=write_gpt_neox,
    weights={
        **{f"attention_norm.{n}": f"_self_attention_layer_norm.{n}" for n in ("gamma", "beta")},
        **{
            f"attention.{name}.{part}": (f"_self_attention_layer._qkv_dense.{part}", joined(i, 3))
            for i, name in enumerate(("query", "key", "value"))
            for part in ("kernel", "bias")
        },
        "attention.output_projection.kernel": ("_self_attention_layer._output_dense.kernel", FLAT_HEADS),
        "attention.output_projection.bias": "_self_attention_layer._output_dense.bias",
        **{f"feedforward_norm.{n}": f"_feedforward_layer_norm.{n}" for n in ("gamma", "beta")},
        **{f"up.{part}": f"_feedforward_intermediate_dense.{part}" for part in ("kernel", "bias")},
        **{f"down.{part}": f"_feedforward_output_dense.{part}" for part in ("kernel", "bias")},
    },
    rotation="_self_attention_layer.rotary_embedding_layer",
)
