"""A model in a folder: settings in JSON, weights in HDF5, tokenizer as KerasHub saves it. Loads under any backend."""

import json
import pathlib

import keras

from keras_fam.utils.atomic import replace_file

FORMAT = "keras_fam.preset/1"
CONFIG, WEIGHTS, PREPROCESSOR = "keras_fam.json", "model.weights.h5", "preprocessor.json"


def save_to_preset(model, folder):
    """Saves the model to a folder; `from_preset(folder)` makes it again, under any backend.

    The folder holds `keras_fam.json`, `model.weights.h5` and, where the model has a preprocessor of KerasHub, what
    KerasHub's own saver writes for it. LoRA updates are merged into the weights that are saved. A model quantized to
    int8 is saved as it is.

    Args:
        folder: made if it is missing; a preset in it is replaced.

    Raises:
        ValueError: for a preprocessor that cannot be saved.
    """
    backbone, folder = getattr(model, "backbone", model), pathlib.Path(folder)
    preprocessor = getattr(model, "preprocessor", None)
    if preprocessor is not None and not hasattr(preprocessor, "save_to_preset"):
        raise ValueError(
            f"A preprocessor of KerasHub is saved beside the model; received {type(preprocessor).__name__}, which has "
            "no `save_to_preset`. Set `model.preprocessor = None` and save it by yourself."
        )
    if not backbone.built:
        backbone.build()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # it is written last: a folder without it is no preset
    (folder / PREPROCESSOR).unlink(missing_ok=True)
    backbone.save_weights(folder / WEIGHTS)
    if preprocessor is not None:
        preprocessor.save_to_preset(str(folder))
    record = {
        "format": FORMAT,
        "backbone": keras.saving.serialize_keras_object(backbone),
        "causal_lm": backbone is not model,
        "quantized": quantization_of(backbone),
        "keras": keras.__version__,
    }
    record["backbone"].pop("build_config", None)
    with replace_file(folder / CONFIG) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def load_backbone(folder, backbone_class, load_weights=True, **changes):
    """`(backbone, folder, record)` of a preset folder.

    Raises:
        ValueError: if the folder is no preset, or of another format, class or settings.
    """
    folder = pathlib.Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"A preset is a folder that `save_to_preset` wrote, with {CONFIG} in it; {folder} "
            f"{'has none' if folder.is_dir() else 'is no folder'}. Models of KerasHub are converted: "
            "keras_fam.hub.convert(keras_hub.models.CausalLM.from_preset(...), ...)."
        )
    try:
        record = json.loads((folder / CONFIG).read_text())
        found, config = record["format"], record["backbone"]["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {error!r}.") from error
    if found != FORMAT:
        raise ValueError(f"{folder} has the format {found!r}; this version of keras_fam reads {FORMAT!r}.")
    if load_weights and not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}; pass load_weights=False for the settings alone.")
    unknown = sorted(set(changes) - {"dtype", "name"} - set(config))
    if unknown:
        raise ValueError(f"The settings of {folder} have no {unknown}.")
    try:
        made = keras.saving.deserialize_keras_object({**record["backbone"], "config": {**config, **changes}})
    except TypeError as error:
        raise ValueError(f"{folder / CONFIG} has settings that this keras_fam does not know: {error}") from error
    if not isinstance(made, backbone_class):
        raise ValueError(f"{folder} holds a {type(made).__name__}, not a {backbone_class.__name__}.")
    made.build()
    if load_weights:
        if record["quantized"]:
            made.quantize(record["quantized"])
        made.load_weights(folder / WEIGHTS)
    return made, folder, record


def load_preprocessor(folder):
    """The KerasHub preprocessor of a preset folder, or None."""
    if not (folder / PREPROCESSOR).is_file():
        return None
    try:
        import keras_hub  # noqa: F401  (its classes are registered when it is imported)
    except ImportError as error:
        raise ImportError(
            f"The preprocessor in {folder} is KerasHub's: pip install 'keras-fam[hub]', or pass preprocessor=None."
        ) from error
    preprocessor = keras.saving.deserialize_keras_object(json.loads((folder / PREPROCESSOR).read_text()))
    preprocessor.load_preset_assets(str(folder))
    return preprocessor


def quantization_of(model):
    """The mode that a model's layers are quantized in, or None."""
    modes = {layer.quantization_mode for layer in model._flatten_layers() if getattr(layer, "quantization_mode", None)}
    if len(modes) > 1:
        raise ValueError(f"All layers of a preset are quantized alike; received {sorted(modes)}.")
    return modes.pop() if modes else None
