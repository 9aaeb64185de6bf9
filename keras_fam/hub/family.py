"""What the tables in `families` and `gemma` consist of: their types, and what several of them share."""

import dataclasses
from collections.abc import Callable

# Every setting of a `TransformerFAMBackbone` that the source decides, as a plain Llama has it.
PLAIN = {
    "activation": "silu",
    "gated": True,
    "norm": "rms_norm",
    "norm_epsilon": 1e-6,
    "use_post_norm": False,
    "parallel_residual": False,
    "use_feedforward_bias": False,
    "feed_forward": None,
    "use_attention_bias": False,
    "use_output_bias": False,
    "query_key_norm": None,
    "query_key_norm_epsilon": 1e-6,
    "rope_wavelength": 10_000.0,
    "rotary_dim": None,
    "rope_scaling": None,
    "attention_scale": None,
    "attention_softcap": None,
    "softmax_sink": False,
    "attention_window": None,
    "embedding_scale": None,
    "tie_weights": False,
    "logit_softcap": None,
}


@dataclasses.dataclass(frozen=True)
class Only:
    """A field for which one value is supported, and why."""

    value: object
    why: str


@dataclasses.dataclass(frozen=True)
class Read:
    """A field that the family's `read` handles."""


@dataclasses.dataclass(frozen=True)
class Unused:
    """A field without effect on a text model's outputs; `value` is given to new models."""

    value: object


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of KerasHub backbones, described by settings of this package.

    Args:
        name: display name.
        backbones: names of its classes in `keras_hub.models`.
        fields: field of the constructor to the name of our setting, `Only`, `Read` or `Unused`.
        fixed: settings that all its models share, where they are not `PLAIN`.
        read: `(backbone, layer) -> settings` of one built layer.
        write: `(settings of each layer) -> fields`, for the fields that `read` takes care of.
        weights: weight of our block to the weight of its layer; a pair adds a `Layout`.
        rotation: where a layer keeps its rotary embedding. Weights in it follow from the fields.
        rotates: where a layer keeps whether it rotates; None if all layers do.
        final_norm: where the backbone keeps its last norm.
    """

    name: str
    backbones: tuple[str, ...]
    fields: dict[str, object]
    read: Callable
    write: Callable
    weights: dict[str, object]
    rotation: str
    rotates: str | None = None
    final_norm: str = "layer_norm"
    fixed: dict[str, object] = dataclasses.field(default_factory=dict)


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
