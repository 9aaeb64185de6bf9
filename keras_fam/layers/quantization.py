"""Quantized sublayers: recorded when a layer is saved, and quantized again before its weights are loaded.

Keras' own layers record their quantization as a dtype policy. A layer made of several records what each of them is in
its build config, because its own policy says nothing about them.
"""

import keras

from keras_fam.layers.fast_call import is_for_memory
from keras_fam.layers.mixture_of_experts import MixtureOfExperts

CALIBRATED = ("gptq", "awq")


def leaves(layer, prefix=""):
    """Paths below `layer`, such as `"attention/query"`, to the layers that have no sublayers."""
    found = {}
    for part in layer._layers:
        path = f"{prefix}{part.name}"
        found |= leaves(part, path + "/") if part._layers else {path: part}
    return found


def quantized_sublayers(layer):
    """A dict from path to `{"mode", "config"}` of every quantized sublayer, serializable."""
    return {
        path: {
            "mode": part.quantization_mode,
            "config": keras.saving.serialize_keras_object(getattr(part, "quantization_config", None)),
        }
        for path, part in leaves(layer).items()
        if getattr(part, "quantization_mode", None)
    }


def quantize_sublayers(layer, quantized):
    """Quantizes the sublayers that `quantized_sublayers` recorded, if they are not quantized yet.

    Raises:
        ValueError: if a sublayer is missing.
    """
    parts = leaves(layer)
    missing = sorted(set(quantized) - set(parts))
    if missing:
        raise ValueError(
            f"{layer.name} has no sublayers {missing}, which were quantized when it was saved. Build it with the "
            "settings that it was saved with."
        )
    for path, record in quantized.items():
        if parts[path].quantization_mode is None:
            config = keras.saving.deserialize_keras_object(record["config"])
            parts[path].quantize(record["mode"], config=config)


def require_exact_kernels(layer):
    """Raises ValueError if saving would merge a LoRA update into a quantized kernel, and round it again, or one for
    memory rows alone into the kernel that tokens pass."""
    for path, part in leaves(layer).items():
        if is_for_memory(part):
            raise ValueError(
                f"{path} of {layer.name} has a LoRA update for memory rows alone. In one file with the kernel it would "
                "act on tokens, too. Save the model with `save_to_preset(folder)`, which keeps both, or the update "
                "alone with `save_lora_weights(path)`."
            )
        if getattr(part, "lora_enabled", False) and part.quantization_mode is not None:
            raise ValueError(
                f"{path} of {layer.name} is quantized ({part.quantization_mode}) and has a LoRA update. Merging the "
                "two into one file would round the kernel again and change the outputs. Save the model with "
                "`save_to_preset(folder)`, which keeps both, or the update alone with `save_lora_weights(path)`."
            )


def check_training(layer, training):
    """Raises ValueError for training with sublayers in float8, which Keras trains with one use a step only.

    Scales and histories of float8 are replaced by their gradients. Here a kernel acts on tokens and on the memory rows
    of every block, so its gradients are a sum over several uses, and the scale would grow with every step.
    """
    if training and any(getattr(part, "quantization_mode", None) == "float8" for part in leaves(layer).values()):
        raise ValueError(
            f"{layer.name} is quantized to float8 and cannot be trained: its kernels act several times in a step (on "
            "tokens and on the memory rows of every block), and Keras would add up the scales of all uses. Train it "
            "first, in bfloat16 for speed, and call `quantize` afterwards."
        )


class QuantizedSublayersMixin:
    """Quantization, saving and loading of a layer whose sublayers may be quantized."""

    def quantize(self, mode=None, type_check=True, config=None, **kwargs):
        """As `keras.Model.quantize`, for `"int8"`, `"int4"` and `"float8"` (for inference).

        Raises:
            ValueError: for `"gptq"` and `"awq"`, for a mixture of experts, and with LoRA on memory rows alone. The
                model is left unchanged.
        """
        if mode in CALIBRATED:
            raise ValueError(
                f"{self.name} cannot be quantized by {mode!r}: Keras calibrates a model block by block on its outputs "
                "alone, without the memory that the blocks of this model start from. Use 'int8' or 'int4'."
            )
        for layer in self._flatten_layers():
            if isinstance(layer, MixtureOfExperts):
                layer.quantize(mode)
            if is_for_memory(layer):
                raise ValueError(
                    f"{layer.name} has a LoRA update for memory rows alone, and Keras' quantized layers update all "
                    f'rows; received mode={mode!r}. Quantize the model without LoRA, or use dtype="bfloat16".'
                )
        return super().quantize(mode=mode, type_check=type_check, config=config, **kwargs)

    def get_build_config(self):
        config, quantized = super().get_build_config(), quantized_sublayers(self)
        return {**(config or {}), "quantized": quantized} if quantized else config

    def build_from_config(self, config):
        config = dict(config)
        quantized = config.pop("quantized", {})
        super().build_from_config(config)
        quantize_sublayers(self, quantized)
