"""LoRA (Hu et al., 2021) on attention and feed-forward of every layer, for tokens and memory rows alike (Sec. 3.1).

Keras' own layers hold the factors; `layers/apply.py` computes with them. This module chooses the layers, freezes the
rest, and keeps the factors in files of their own.
"""

import io
import pathlib

import keras
import numpy as np
from keras import ops

from keras_fam.utils.atomic import replace_file

ATTENTION = ("query", "key", "value", "output")
FEED_FORWARD = ("gate", "up", "down")
GROUPS = {"attention": ATTENTION, "feed_forward": FEED_FORWARD}
FORMAT = "keras_fam.lora/1"


class LoRA:
    """What `TransformerFAMBackbone` can do with LoRA; `TransformerFAMCausalLM` hands on to it."""

    _frozen_variables = ()

    def enable_lora(self, rank: int, targets=("attention", "feed_forward"), *, alpha=None, train_memory: bool = True):
        """Freezes all weights and adds trainable low-rank updates, `W + alpha / rank · A·B` (Sec. 3.1 has rank 64).

        Compile the model afterwards. An update acts on tokens and on memory rows, which pass the same weights.

        Args:
            rank: r, at least 1. Where a kernel has heads in its output (query, key, value), Keras' update has rank r
                in each head.
            targets: names among `"attention"`, `"feed_forward"`, `"query"`, `"key"`, `"value"`, `"output"`, `"gate"`,
                `"up"`, `"down"`; by default all of attention and feed-forward.
            alpha: None means `rank`, so that the factor is 1.
            train_memory: whether the first memory (the memory prompt, or each layer's rows) stays trainable.

        Raises:
            ValueError: for a rank or names that do not fit, or if LoRA is on already; nothing has changed then.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"`rank` is a whole number of at least 1; received {rank!r}.")
        if self.lora_layers():
            raise ValueError(
                "LoRA is on already, and is enabled once per model. `merge_lora()` first makes it part of the weights."
            )
        names = self._lora_names([targets] if isinstance(targets, str) else list(targets))
        if not self.built:
            self.build()
        memory = {id(v) for v in self._first_memory_weights()} if train_memory else set()
        held = [v for v in self.trainable_variables if id(v) not in memory]
        for v in held:
            v.trainable = False
        vars(self)["_frozen_variables"] = held  # past Keras' tracking of attributes, which would count them twice
        for name, layer in self._lora_candidates():
            if name in names:
                layer.enable_lora(rank, lora_alpha=alpha)
        refresh_torch_parameters(self)

    def lora_layers(self):
        """The layers with LoRA updates, a dict from a name such as `"block_3/query"`."""
        found = {}
        for i, block in enumerate(self.blocks if self.built else ()):
            for name, layer in _candidates(block):
                if layer.lora_enabled:
                    found[f"block_{i}/{name}"] = layer
        return found

    def merge_lora(self):
        """Adds every update to its kernel and takes the factors away; outputs stay the same, and cost less.

        What `enable_lora` froze can be trained again. Compile the model afterwards.

        Raises:
            ValueError: without LoRA, or if a kernel is quantized (merge first, then quantize); nothing has
                changed then.
        """
        layers = self._with_lora()
        for name, layer in layers.items():
            if layer.quantization_mode is not None:
                raise ValueError(
                    f"{name} is quantized ({layer.quantization_mode}), and its numbers cannot take an update up. Merge "
                    "first, then quantize."
                )
        for layer in layers.values():
            layer._kernel.assign(ops.cast(layer.kernel, layer._kernel.dtype))
            _remove(layer)
        for v in self._frozen_variables:
            v.trainable = True
        vars(self)["_frozen_variables"] = ()
        refresh_torch_parameters(self)

    def save_lora_weights(self, path):
        """Saves the updates, and the first memory, to one file: `*.lora.h5`, readable under any backend.

        Args:
            path: the file; it appears whole or not at all.

        Raises:
            ValueError: without LoRA, or for another ending.
        """
        layers = self._with_lora()
        path = _checked(path)
        import h5py

        content, some = io.BytesIO(), next(iter(layers.values()))
        with h5py.File(content, "w") as file:
            file.attrs.update(format=FORMAT, rank=some.lora_rank, alpha=float(some.lora_alpha))
            for name, layer in layers.items():
                file[f"lora/{name}/a"] = ops.convert_to_numpy(layer.lora_kernel_a)
                file[f"lora/{name}/b"] = ops.convert_to_numpy(layer.lora_kernel_b)
            for i, v in enumerate(self._first_memory_weights()):
                file[f"memory/{i}"] = np.asarray(ops.convert_to_numpy(ops.cast(v.value, "float32")))
        with replace_file(path) as file:
            file.write(content.getbuffer())

    def load_lora_weights(self, path):
        """Loads what `save_lora_weights` wrote; LoRA is enabled as in the file, if it is not on.

        Args:
            path: a `*.lora.h5` file.

        Raises:
            ValueError: if the file is none of these, or of layers, ranks or shapes that differ; nothing has changed
                then.
        """
        path = _checked(path)
        import h5py

        if not self.built:
            self.build()
        try:
            with h5py.File(path, "r") as file:
                if file.attrs.get("format") != FORMAT:
                    raise ValueError(f"{path} is no file of `save_lora_weights`: its format is not {FORMAT!r}.")
                rank, alpha = int(file.attrs["rank"]), float(file.attrs["alpha"])
                factors = {
                    f"{block}/{name}": {part: np.asarray(both[part]) for part in ("a", "b")}
                    for block, layers in file["lora"].items()
                    for name, both in layers.items()
                }
                memory = [np.asarray(file[f"memory/{i}"]) for i in range(len(file.get("memory", ())))]
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an HDF5 file: {error}") from error
        self._check_lora_file(path, rank, alpha, factors, memory)
        if not self.lora_layers():
            self.enable_lora(rank, sorted({name.partition("/")[2] for name in factors}), alpha=alpha)
        layers = self.lora_layers()
        for name, both in factors.items():
            layers[name].lora_kernel_a.assign(both["a"])
            layers[name].lora_kernel_b.assign(both["b"])
        for v, value in zip(self._first_memory_weights(), memory, strict=True):
            v.assign(ops.cast(value, v.dtype))

    # Inside -----------------------------------------------------------------------------------------------------

    def _first_memory_weights(self):
        """The trainable first memory: the prompt, or each layer's rows."""
        found = [self.memory_prompt] + [block.attention.initial_fam_rows for block in self.blocks]
        return [v for v in found if v is not None]

    def _lora_candidates(self):
        return [pair for block in self.blocks for pair in _candidates(block)]

    def _lora_names(self, targets):
        known = {*GROUPS, *ATTENTION, *FEED_FORWARD}
        unknown = sorted(set(map(str, targets)) - known)
        if unknown or not targets:
            raise ValueError(f"`targets` are names among {sorted(known)}, at least one; received {targets!r}.")
        names = {name for target in targets for name in GROUPS.get(target, (target,))}
        if names == {"gate"} and self.blocks[0].gated is False:
            raise ValueError("The feed-forward part of this model has no gate; received targets=['gate'].")
        return names

    def _with_lora(self):
        layers = self.lora_layers()
        if not layers:
            raise ValueError("No layer has LoRA; call `enable_lora(rank)` or `load_lora_weights(path)` first.")
        return layers

    def _check_lora_file(self, path, rank, alpha, factors, memory):
        on = self.lora_layers()
        shapes = {name: (tuple(both["a"].shape), tuple(both["b"].shape)) for name, both in factors.items()}
        wanted = {}
        for i, block in enumerate(self.blocks):
            for name, layer in _candidates(block):
                if f"block_{i}/{name}" in (on or factors):
                    shape = tuple(layer._kernel.shape)
                    wanted[f"block_{i}/{name}"] = ((*shape[:-1], rank), (rank, shape[-1]))
        for name in sorted({*shapes, *wanted}):
            if shapes.get(name) != wanted.get(name):
                raise ValueError(
                    f"{path} fits another model: factors of {name} have the shapes {shapes.get(name)}, here "
                    f"{wanted.get(name)}."
                )
        for name, layer in on.items():
            if (layer.lora_rank, float(layer.lora_alpha)) != (rank, alpha):
                raise ValueError(
                    f"{path} has rank {rank} and alpha {alpha}; LoRA is on with rank {layer.lora_rank} and alpha "
                    f"{layer.lora_alpha} in {name}. Load it into a model without LoRA."
                )
        here = [tuple(v.shape) for v in self._first_memory_weights()]
        if here != [m.shape for m in memory]:
            raise ValueError(f"{path} has first memories of shapes {[m.shape for m in memory]}; this model has {here}.")


class TaskLoRA:
    """The same for a `TransformerFAMCausalLM`: all of it happens in the backbone."""

    def enable_lora(self, rank: int, targets=("attention", "feed_forward"), *, alpha=None, train_memory: bool = True):
        self.backbone.enable_lora(rank, targets, alpha=alpha, train_memory=train_memory)
        refresh_torch_parameters(self)

    def lora_layers(self):
        return self.backbone.lora_layers()

    def merge_lora(self):
        self.backbone.merge_lora()
        refresh_torch_parameters(self)

    def save_lora_weights(self, path):
        self.backbone.save_lora_weights(path)

    def load_lora_weights(self, path):
        self.backbone.load_lora_weights(path)
        refresh_torch_parameters(self)

    for _name in ("enable_lora", "lora_layers", "merge_lora", "save_lora_weights", "load_lora_weights"):
        locals()[_name].__doc__ = getattr(LoRA, _name).__doc__


def refresh_torch_parameters(model):
    """Under torch, every layer keeps a list of the parameters below it."""
    for layer in model._flatten_layers():
        if hasattr(layer, "_torch_params"):
            layer._track_variables()


def _candidates(block):
    """Name and layer of every kernel of a block that LoRA can update."""
    attention = block.attention
    found = {
        "query": attention.query, "key": attention.key, "value": attention.value,
        "output": attention.output_projection, "gate": block.gate, "up": block.up, "down": block.down,
    }  # fmt: skip
    return [(name, layer) for name, layer in found.items() if layer is not None]


def _remove(layer):
    """Takes the factors out of a Keras layer."""
    for name in ("lora_kernel_a", "lora_kernel_b"):
        layer._untrack_variable(getattr(layer, name))
        super(keras.layers.Layer, layer).__delattr__(name)  # the layer's own collects garbage, every time
    layer.lora_enabled = False
    layer.lora_rank = layer.lora_alpha = None


def _checked(path):
    path = pathlib.Path(path)
    if not path.name.endswith(".lora.h5"):
        raise ValueError(f"The name of a LoRA file ends in `.lora.h5`; received {path.name!r}.")
    return path
