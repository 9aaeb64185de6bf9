"""LoRA (Hu et al., 2021) on attention and feed-forward of every layer, for tokens and memory rows (Sec. 3.1).

Keras' own layers hold the factors; `layers/fast_call.py` computes with them. This module chooses the layers, freezes
the rest, and saves the factors to files of their own.
"""

import io
import pathlib

import keras
import numpy as np
from keras import ops

from keras_fam.layers.fast_call import is_for_memory, is_plain
from keras_fam.ops.backend import refresh_torch_parameters
from keras_fam.utils.atomic import replace_file

ATTENTION = ("query", "key", "value", "output")
FEED_FORWARD = ("gate", "up", "down")
GROUPS = {"attention": ATTENTION, "feed_forward": FEED_FORWARD}
FORMAT = "keras_fam.lora/1"


class LoRAMixin:
    """LoRA for a `TransformerFAMBackbone`, and for a model that has one as its `backbone`."""

    _frozen_variables = ()

    def enable_lora(
        self, rank: int, targets=("attention", "feed_forward"), *, alpha=None, train_memory=True, rows="all"
    ):
        """Freezes all weights and adds trainable low-rank updates, `W + alpha / rank · A·B` (Sec. 3.1 has rank 64).

        Compile the model afterwards. An update acts on tokens and on memory rows, which pass the same weights; with
        `rows="memory"` on memory rows alone (an addition of this package, after Compressed Context Memory, Kim et al.,
        2023). Tokens then pass the weights as they are: while nothing of the memory is read, as behind a closed
        `fam_gate`, outputs are those of the model before. Such updates cannot be merged.

        ```python
        lm.enable_lora(16, rows="memory")
        ```

        Args:
            rank: r, a positive integer. Where a kernel has heads in its output (query, key, value), Keras' update has
                rank r in each head.
            targets: names among `"attention"`, `"feed_forward"`, `"query"`, `"key"`, `"value"`, `"output"`, `"gate"`,
                `"up"`, `"down"`; by default all of attention and feed-forward.
            alpha: None means `rank`, so that the factor is 1.
            train_memory: whether what a plain Transformer lacks stays trainable: the first memory (the memory prompt,
                or each layer's rows), and the weights of `fam_gate` and `memory_update`, where there are any.
            rows: `"all"`, or `"memory"`.

        Raises:
            ValueError: for an invalid rank or name, if LoRA is already enabled, if a kernel is quantized in a mode
                that LoRA does not support (int8 and int4 are supported), or if the feed-forward part of a layer is
                asked for where it is a layer of its own (`feed_forward`); for `rows="memory"` without a memory, on
                quantized kernels, or in a `FeedbackMemoryBackbone`. The model is left unchanged.
        """
        backbone = backbone_of(self)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"`rank` must be a positive integer; received {rank!r}.")
        if backbone.lora_layers():
            raise ValueError(
                "LoRA is already enabled; a model takes one update at a time. Call `merge_lora()` first, which adds it "
                "to the weights."
            )
        names = _target_names(backbone, [targets] if isinstance(targets, str) else list(targets))
        if not backbone.built:
            backbone.build()
        for block in backbone.blocks if names & {*FEED_FORWARD} else ():
            if block.feed_forward is not None:
                raise ValueError(
                    "LoRA updates the kernels of attention and of the plain feed-forward part; that of "
                    f"{block.name} is a layer of its own ({type(block.feed_forward).__name__}). Received targets="
                    f'{targets!r}; pass targets=["attention"].'
                )
        chosen = [layer for name, layer in _candidates(backbone) if name.partition("/")[2] in names]
        _check_rows(backbone, rows, chosen)
        modes = {layer.quantization_mode for layer in chosen} - {None, "int8", "int4"}
        if modes:
            raise ValueError(
                f"LoRA works on kernels that are not quantized, or in int8 or int4; received {sorted(modes)}. Enable "
                "LoRA on the model as it was before `quantize`."
            )
        memory = {id(v) for v in learned_memory_weights(backbone)} if train_memory else set()
        frozen = [v for v in backbone.trainable_variables if id(v) not in memory]
        for v in frozen:
            v.trainable = False
        # Past Keras' tracking of attributes, which would count them twice.
        vars(backbone)["_frozen_variables"] = frozen
        for layer in chosen:
            layer.enable_lora(rank, lora_alpha=alpha)
            vars(layer)["_lora_rows"] = rows
        refresh_torch_parameters(self)

    def lora_layers(self):
        """The layers with LoRA updates, a dict from a name such as `"block_3/query"`."""
        backbone = backbone_of(self)
        return {name: layer for name, layer in _candidates(backbone) if layer.lora_enabled} if backbone.built else {}

    def merge_lora(self):
        """Adds every update to its kernel and removes the factors; outputs stay the same, and cost less.

        What `enable_lora` froze is trainable again. Compile the model afterwards.

        Raises:
            ValueError: without LoRA, if it acts on memory rows alone, or if a kernel is quantized (merge first, then
                quantize). The model is left unchanged.
        """
        backbone, layers = backbone_of(self), self._with_lora()
        if any(map(is_for_memory, layers.values())):
            raise ValueError(
                'The updates of `enable_lora(rows="memory")` act on memory rows alone; in the kernels they would act '
                "on tokens, too, and change the outputs. Keep them apart: `save_lora_weights(path)` or "
                "`save_to_preset(folder)`."
            )
        for name, layer in layers.items():
            if layer.quantization_mode is not None:
                raise ValueError(
                    f"{name} is quantized ({layer.quantization_mode}): adding the update would round the kernel once "
                    "more and change the outputs. Merge first, then quantize."
                )
        for layer in layers.values():
            layer._kernel.assign(ops.cast(layer.kernel, layer._kernel.dtype))
            _remove_factors(layer)
        for v in backbone._frozen_variables:
            v.trainable = True
        vars(backbone)["_frozen_variables"] = ()
        refresh_torch_parameters(self)

    def save_lora_weights(self, path):
        """Saves the updates, and the memory's own weights, to one file: `*.lora.h5`, readable under any backend.

        Args:
            path: the file; it is written completely or not at all.

        Raises:
            ValueError: without LoRA, or for a name with another ending.
        """
        backbone, layers, path = backbone_of(self), self._with_lora(), _checked_path(path)
        import h5py

        content, some = io.BytesIO(), next(iter(layers.values()))
        with h5py.File(content, "w") as file:
            file.attrs.update(format=FORMAT, rank=some.lora_rank, alpha=float(some.lora_alpha), rows=rows_of(some))
            for name, layer in layers.items():
                file[f"lora/{name}/a"] = ops.convert_to_numpy(layer.lora_kernel_a)
                file[f"lora/{name}/b"] = ops.convert_to_numpy(layer.lora_kernel_b)
            for i, v in enumerate(learned_memory_weights(backbone)):
                file[f"memory/{i}"] = np.asarray(ops.convert_to_numpy(ops.cast(v.value, "float32")))
        with replace_file(path) as file:
            file.write(content.getbuffer())

    def load_lora_weights(self, path):
        """Loads what `save_lora_weights` wrote; enables LoRA with the file's settings if it is not enabled.

        Args:
            path: a `*.lora.h5` file.

        Raises:
            ValueError: if the file cannot be read, or its layers, ranks or shapes are not the model's. The model is
                left unchanged.
        """
        path, backbone = _checked_path(path), backbone_of(self)
        if not backbone.built:
            backbone.build()
        settings, factors, memory = _read_file(path)
        _check_file(backbone, path, settings, factors, memory)
        if not self.lora_layers():
            self.enable_lora(targets=sorted({name.partition("/")[2] for name in factors}), **settings)
        layers = self.lora_layers()
        for name, both in factors.items():
            layers[name].lora_kernel_a.assign(both["a"])
            layers[name].lora_kernel_b.assign(both["b"])
        for v, value in zip(learned_memory_weights(backbone), memory, strict=True):
            v.assign(ops.cast(value, v.dtype))

    def _with_lora(self):
        layers = self.lora_layers()
        if not layers:
            raise ValueError("No layer has LoRA; call `enable_lora(rank)` or `load_lora_weights(path)` first.")
        return layers


def backbone_of(model):
    """The backbone of a language model, or `model` itself. No property: Keras' saving would walk it as a sublayer."""
    return getattr(model, "backbone", model)


def _candidates(backbone):
    """Name and layer of every kernel that LoRA can update, such as `("block_3/query", layer)`."""
    found = []
    for i, block in enumerate(backbone.blocks):
        attention = block.attention
        layers = {
            "query": attention.query, "key": attention.key, "value": attention.value,
            "output": attention.output_projection, "gate": block.gate, "up": block.up, "down": block.down,
        }  # fmt: skip
        found += [(f"block_{i}/{name}", layer) for name, layer in layers.items() if layer is not None]
    return found


def learned_memory_weights(backbone):
    """The weights that only a memory needs: the prompt or each layer's rows, then gates and those of memory updates."""
    layers = [block.attention for block in backbone.blocks]
    found = [backbone.memory_prompt, *(layer.initial_fam_rows for layer in layers)]
    found += [layer.gate_bias for layer in layers]
    for layer in layers:
        found += [v for v in layer.memory_update.weights if v is not layer.memory_update.noise_scale]
    return [v for v in found if v is not None]


def rows_of(layer):
    """On which rows the LoRA update of `layer` acts: `"all"` or `"memory"`."""
    return "memory" if is_for_memory(layer) else "all"


def _check_rows(backbone, rows, chosen):
    if rows not in ("all", "memory"):
        raise ValueError(f'`rows` must be "all" or "memory"; received {rows!r}.')
    if rows == "all":
        return
    if not backbone.fam_length:
        raise ValueError('`rows="memory"` needs a memory; this model has `fam_length=0`. Pass rows="all".')
    if not backbone.block_class.keeps_tokens_apart:
        raise ValueError(
            f'`rows="memory"` needs tokens that pass the weights as they are; in {backbone.block_class.__name__} their '
            'outputs become keys of later blocks. Pass rows="all".'
        )
    modes = sorted({layer.quantization_mode for layer in chosen if not is_plain(layer)} - {None})
    if any(not is_plain(layer) for layer in chosen):
        raise ValueError(
            f'`rows="memory"` needs kernels that are not quantized and of the dtype that they compute in; received '
            f'{modes or chosen[0].dtype_policy.name}. Convert or load the model with dtype="float32" or '
            '"bfloat16", or pass rows="all".'
        )


def _target_names(backbone, targets):
    known = {*GROUPS, *ATTENTION, *FEED_FORWARD}
    unknown = sorted(set(map(str, targets)) - known)
    if unknown or not targets:
        raise ValueError(f"`targets` must be one or more of {sorted(known)}; received {targets!r}.")
    names = {name for target in targets for name in GROUPS.get(target, (target,))}
    if names == {"gate"} and backbone.blocks[0].gated is False:
        raise ValueError("The feed-forward part of this model has no gate; received targets=['gate'].")
    return names


def _remove_factors(layer):
    """Removes the factors from a Keras layer."""
    for name in ("lora_kernel_a", "lora_kernel_b"):
        layer._untrack_variable(getattr(layer, name))
        super(keras.layers.Layer, layer).__delattr__(name)  # the layer's own collects garbage, every time
    layer.lora_enabled = False
    vars(layer).pop("_lora_rows", None)
    layer.lora_rank = layer.lora_alpha = None


# Files ---------------------------------------------------------------------------------------------------------------


def _checked_path(path):
    path = pathlib.Path(path)
    if not path.name.endswith(".lora.h5"):
        raise ValueError(f"The name of a LoRA file must end in `.lora.h5`; received {path.name!r}.")
    return path


def _read_file(path):
    """`(settings, factors, memory)`: those of `enable_lora`; by layer name, a dict of arrays `a` and `b`; arrays."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != FORMAT:
                raise ValueError(
                    f"{path} was not written by `save_lora_weights` of this version: its format is "
                    f"{file.attrs.get('format')!r}, expected {FORMAT!r}."
                )
            factors = {
                f"{block}/{name}": {part: np.asarray(both[part]) for part in ("a", "b")}
                for block, layers in file["lora"].items()
                for name, both in layers.items()
            }
            memory = [np.asarray(file[f"memory/{i}"]) for i in range(len(file.get("memory", ())))]
            settings = {"rank": int(file.attrs["rank"]), "alpha": float(file.attrs["alpha"])}
            return {**settings, "rows": file.attrs.get("rows", "all")}, factors, memory
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an HDF5 file: {error}") from error


def _check_file(backbone, path, settings, factors, memory):
    enabled, rank = backbone.lora_layers(), settings["rank"]
    shapes = {name: (tuple(both["a"].shape), tuple(both["b"].shape)) for name, both in factors.items()}
    expected = {}
    for name, layer in _candidates(backbone):
        if name in (enabled or factors):
            shape = tuple(layer.kernel.shape)  # of a packed int4 kernel, too
            expected[name] = ((*shape[:-1], rank), (rank, shape[-1]))
    for name in sorted({*shapes, *expected}):
        if shapes.get(name) != expected.get(name):
            raise ValueError(
                f"{path} belongs to another model: its factors of {name} have the shapes {shapes.get(name)}, this "
                f"model's {expected.get(name)}."
            )
    for name, layer in enabled.items():
        here = {"rank": layer.lora_rank, "alpha": float(layer.lora_alpha), "rows": rows_of(layer)}
        if here != settings:
            told = "rank {rank}, alpha {alpha} and rows {rows!r}"
            raise ValueError(
                f"{path} has {told.format(**settings)}; LoRA is enabled with {told.format(**here)} in {name}. Load it "
                "into a model without LoRA."
            )
    here = [tuple(v.shape) for v in learned_memory_weights(backbone)]
    if here != [m.shape for m in memory]:
        raise ValueError(f"{path} has memory weights of shapes {[m.shape for m in memory]}; this model has {here}.")
