"""A model in a folder: settings in JSON, weights in HDF5, tokenizer as KerasHub saves it. Loads under any backend."""

import contextlib
import json
import pathlib

import keras

from keras_fam.layers.fast_call import is_for_memory
from keras_fam.layers.quantization import quantize_sublayers, quantized_sublayers
from keras_fam.models.lora import backbone_of
from keras_fam.utils.atomic import replace_file

FORMAT = "keras_fam.preset/2"
CONFIG, WEIGHTS, PREPROCESSOR = "keras_fam.json", "model.weights.h5", "preprocessor.json"
LORA = "adapter.lora.h5"


class PresetMixin:
    """Saving to a folder, for a `TransformerFAMBackbone` and for a model that has one as its `backbone`."""

    def save_to_preset(self, folder):
        """Saves the model to a folder; `from_preset(folder)` loads it under any backend.

        The folder holds `keras_fam.json`, `model.weights.h5` and, where the model has a preprocessor of KerasHub, what
        KerasHub's own saver writes for it. LoRA updates are merged into the weights. A quantized model keeps its
        kernels as they are; its LoRA updates, if any, are saved beside them and enabled again by `from_preset`,
        because merging would round the kernels once more.

        Args:
            folder: created if it does not exist; a preset in it is replaced.

        Raises:
            ValueError: for a preprocessor that cannot be saved.
        """
        backbone, folder = backbone_of(self), pathlib.Path(folder)
        preprocessor = getattr(self, "preprocessor", None)
        if preprocessor is not None and not hasattr(preprocessor, "save_to_preset"):
            raise ValueError(
                f"A preprocessor of KerasHub is saved beside the model; received {type(preprocessor).__name__}, which "
                "has no `save_to_preset`. Set `model.preprocessor = None` and save it yourself."
            )
        if not backbone.built:
            backbone.build()
        adapted = [x for x in backbone.lora_layers().values() if x.quantization_mode is not None or is_for_memory(x)]
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, PREPROCESSOR, LORA):  # the config is written last: a folder without it is no preset
            (folder / name).unlink(missing_ok=True)
        with _without_lora(adapted):
            backbone.save_weights(folder / WEIGHTS)
        if adapted:
            backbone.save_lora_weights(folder / LORA)
        if preprocessor is not None:
            preprocessor.save_to_preset(str(folder))
        record = {
            "format": FORMAT,
            "backbone": keras.saving.serialize_keras_object(backbone),
            "causal_lm": backbone is not self,
            "quantized": quantized_sublayers(backbone),
            "keras": keras.__version__,
        }
        record["backbone"].pop("build_config", None)
        with replace_file(folder / CONFIG) as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())


@contextlib.contextmanager
def _without_lora(layers):
    """Inside, Keras saves the kernels of these layers as they are, without their updates."""
    for layer in layers:
        layer.lora_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.lora_enabled = True


def load_backbone(folder, backbone_class, load_weights=True, **changes):
    """`(backbone, folder)` of a preset folder.

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
        quantize_sublayers(made, record["quantized"])
        made.load_weights(folder / WEIGHTS)
        if (folder / LORA).is_file():
            made.load_lora_weights(folder / LORA)
    return made, folder


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
