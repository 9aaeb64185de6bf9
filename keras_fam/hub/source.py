"""A KerasHub model read: its family, and its constructor's fields as settings of a `TransformerFAMBackbone`."""

import inspect
import math

import numpy as np
from keras import ops

from keras_fam.hub.families import FAMILIES
from keras_fam.hub.family import PLAIN, Only, Read, Unused
from keras_fam.hub.unsupported import REASONS
from keras_fam.ops.rope import inverse_wavelengths

_NO_FIELDS = {"self", "args", "kwargs", "name", "dtype", "trainable"}


def keras_hub_models():
    """The module `keras_hub.models`."""
    try:
        from keras_hub import models
    except ImportError as error:
        raise ImportError("Models of KerasHub need KerasHub: pip install 'keras-fam[hub]'.") from error
    return models


def family_of(backbone_class):
    """The `Family` of a backbone class of KerasHub; ValueError if there is none."""
    models = keras_hub_models()
    for family in FAMILIES:
        for name in family.backbones:
            if getattr(models, name, None) is backbone_class:
                return family
    reason = REASONS.get(getattr(backbone_class, "__name__", None))
    if reason is not None and getattr(models, backbone_class.__name__, None) is backbone_class:
        raise ValueError(f"{backbone_class.__name__} of KerasHub cannot be converted: {reason}.")
    known = ", ".join(name for family in FAMILIES for name in family.backbones)
    raise ValueError(
        f"Supported backbones of KerasHub are {known}, and their CausalLMs; received {backbone_class!r}. A subclass of "
        "one of them may compute something else: convert an object of the class itself."
    )


def unwrap_source(source):
    """`(backbone, is it a task, preprocessor)` of a KerasHub backbone or CausalLM."""
    models = keras_hub_models()
    if isinstance(source, models.Backbone):
        return source, False, None
    if isinstance(source, models.CausalLM):
        return source.backbone, True, source.preprocessor
    raise ValueError(f"The source must be a Backbone or a CausalLM of KerasHub; received {type(source).__name__}.")


def walk(holder, path):
    """The object at a dotted path, or None where an attribute on the way is missing or None."""
    for name in path.split("."):
        holder = getattr(holder, name, None)
        if holder is None:
            return None
    return holder


def constructor_fields(backbone_class):
    """Names of the fields of a backbone's constructor."""
    return [name for name in inspect.signature(backbone_class.__init__).parameters if name not in _NO_FIELDS]


def check_fields(backbone, family):
    """Raises ValueError for a field that the family's table does not name, or does not allow."""
    names = {*constructor_fields(type(backbone)), *backbone.get_config()} - _NO_FIELDS
    for name in sorted(names):
        if name not in family.fields:
            raise ValueError(
                f"The field `{name}` of {type(backbone).__name__} is unknown to this conversion of {family.name}; "
                f"received {getattr(backbone, name, None)!r}. Convert a model without it."
            )
        rule = family.fields[name]
        if isinstance(rule, Only) and getattr(backbone, name, rule.value) != rule.value:
            raise ValueError(
                f"`{name}` of {type(backbone).__name__} must be {rule.value!r}: {rule.why}; received "
                f"{getattr(backbone, name)!r}."
            )


def check_state(backbone):
    """Raises ValueError for a source that is quantized, or overflows in float16 where it clips and we do not."""
    for layer in backbone._flatten_layers():
        if getattr(layer, "quantization_mode", None) is not None:
            raise ValueError(
                f"The source is quantized ({layer.quantization_mode} in {layer.path}), and its rounded "
                "weights cannot be trained. Convert the model before it is quantized, and quantize the result."
            )
    if backbone.compute_dtype == "float16" and type(backbone).__name__ == "Gemma3Backbone":
        raise ValueError(
            "Gemma 3 in float16 clips its residuals, which is not supported. Load the source in bfloat16 or float32."
        )


def layer_settings(backbone, family, reach):
    """The settings of every layer, a list of dicts with all names of `PLAIN` and the sizes.

    Args:
        backbone: a built KerasHub backbone.
        family: its `Family`.
        reach: the most keys that a token can see, (m+1)·S. A window of the source that is not smaller never narrows
            anything and is left out.
    """
    fields = {
        ours: getattr(backbone, name)
        for name, ours in family.fields.items()
        if isinstance(ours, str) and hasattr(backbone, name)
    }
    layers = []
    for layer in backbone.transformer_layers:
        settings = {**PLAIN, **family.fixed, **fields, **family.read(backbone, layer)}
        settings["head_dim"] = settings.get("head_dim") or settings["hidden_dim"] // settings["num_query_heads"]
        window = settings["attention_window"]
        settings["attention_window"] = None if not window or window >= reach else int(window)
        _check_norm(getattr(backbone, family.final_norm), settings)
        if family.rotates is None or walk(layer, family.rotates):
            _check_rotation(backbone, layer, family, settings)
        layers.append(settings)
    if not layers:
        raise ValueError("The source must have at least one layer; received num_layers=0.")
    return layers


def _check_norm(final_norm, settings):
    if final_norm.epsilon != settings["norm_epsilon"]:
        raise ValueError(
            f"`layer_norm_epsilon`={final_norm.epsilon} is the epsilon of the source's final norm alone; "
            f"its layers use {settings['norm_epsilon']} (KerasHub does not pass the field on). Here all norms have one "
            "epsilon: build the source with the epsilon of its layers."
        )


def _check_rotation(backbone, layer, family, settings):
    """The frequencies of the built layer against those of the settings: KerasHub's fields are not always used."""
    rotary, width = walk(layer, family.rotation), settings["rotary_dim"] or settings["head_dim"]
    if settings["rope_wavelength"] is None:
        raise ValueError(
            f"The layers of {type(backbone).__name__} rotate queries and keys; received a `rope_wavelength` of None."
        )
    half = np.concatenate([np.ones(width // 2), np.zeros(width // 2)]).reshape(1, 1, 1, width).astype("float32")
    turned = rotary(half, start_index=1)
    turned = turned if isinstance(turned, tuple) else ops.split(turned, 2, axis=-1)  # SmolLM 3's are tables: cos, sin
    cos, sin = (np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")), "float64").reshape(-1) for x in turned)
    found = np.arctan2(sin, cos)[: width // 2]
    wanted = inverse_wavelengths(width, settings["rope_wavelength"], settings["rope_scaling"])
    tolerance = 1e-4 if rotary.compute_dtype in ("float32", "float64") else 2e-2
    if not np.all(np.abs(found - wanted) <= tolerance * wanted):
        fields = {name: getattr(backbone, name) for name in family.fields if "rope" in name and hasattr(backbone, name)}
        worst = math.exp(np.abs(np.log(np.maximum(found, 1e-30) / wanted)).max())
        raise ValueError(
            f"The layers of the source do not rotate as its fields say: {fields} imply other frequencies, by a factor "
            f"of up to {worst:.3g}. This KerasHub ignores some of these fields; build the source without them, or "
            "update KerasHub."
        )


def field_values(backbone_class, family, layers):
    """The inverse of `layer_settings`: fields for the constructor of `backbone_class`."""
    written = family.write(layers)
    fields = {}
    for name in constructor_fields(backbone_class):
        rule = family.fields.get(name)
        if name in written:
            fields[name] = written[name]
        elif isinstance(rule, str):
            fields[name] = layers[0][rule]
        elif isinstance(rule, Only | Unused):
            fields[name] = rule.value
        elif rule is not None and not isinstance(rule, Read):
            raise TypeError(f"The table of {family.name} has {rule!r} for `{name}`.")
    return fields
