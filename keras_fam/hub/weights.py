"""Weights copied or shared between two models, with a check that none is left out on either side."""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_fam.hub.layouts import SAME, Layout
from keras_fam.hub.source import walk
from keras_fam.layers.fast_call import is_for_memory
from keras_fam.models.lora import learned_memory_weights
from keras_fam.ops.backend import refresh_torch_parameters


@dataclasses.dataclass(frozen=True)
class Pair:
    """One weight in two models: the layers that hold it, its name there, and the layout that relates them."""

    path: str
    ours: keras.layers.Layer
    our_name: str
    theirs: keras.layers.Layer
    their_name: str
    layout: Layout


def variable(layer, name):
    """The variable itself; `layer.kernel` may be a sum with its LoRA update."""
    found = getattr(layer, "_" + name, None)
    return found if isinstance(found, keras.Variable) else getattr(layer, name)


def memory_weights(backbone):
    """The weights without a counterpart in the source: what a memory learns, the scale of its noise, and the memory of
    Random State Passing."""
    found, passing = learned_memory_weights(backbone), backbone.random_state_passing
    found += [block.attention.memory_update.noise_scale for block in backbone.blocks]
    return [v for v in found if v is not None] + ([] if passing is None else list(passing.weights))


def pairs(backbone, source, family):
    """All `Pair`s of a built `TransformerFAMBackbone` and a KerasHub backbone; ValueError if a weight is left over."""
    found = [_pair("token_embedding.embeddings", backbone, "token_embedding.embeddings", source)]
    if not backbone.tie_weights:
        name = "token_embedding.reverse_embeddings"
        found.append(_pair(name, backbone, name, source))
    for name in ("gamma", "beta") if backbone.blocks[0].norm == "layer_norm" else ("scale",):
        found.append(_pair(f"final_norm.{name}", backbone, f"{family.final_norm}.{name}", source))
    for i, (block, layer) in enumerate(zip(backbone.blocks, source.transformer_layers, strict=True)):
        for path, theirs in family.weights.items():
            theirs, layout = (theirs, SAME) if isinstance(theirs, str) else theirs
            if walk(block, path) is not None:
                found.append(_pair(path, block, theirs, layer, layout, f"blocks[{i}]."))
    _check_left_over(backbone, [(p.ours, p.our_name) for p in found], memory_weights(backbone))
    rotations = [walk(layer, family.rotation) for layer in source.transformer_layers]
    _check_left_over(source, [(p.theirs, p.their_name) for p in found], [v for r in rotations for v in r.weights])
    return found


def _pair(our_path, ours, their_path, theirs, layout=SAME, prefix=""):
    def layer(holder, path):
        found = walk(holder, path.rpartition(".")[0])
        if found is None or getattr(found, path.rpartition(".")[2], None) is None:
            raise ValueError(f"{type(holder).__name__} has no weight `{path}`, which its conversion expects.")
        return found

    names = our_path.rpartition(".")[2], their_path.rpartition(".")[2]
    return Pair(prefix + our_path, layer(ours, our_path), names[0], layer(theirs, their_path), names[1], layout)


def _check_left_over(model, used, others):
    seen = {id(variable(layer, name)) for layer, name in used} | {id(v) for v in others}
    for layer, _ in used:  # LoRA updates are part of the kernel that they belong to
        if getattr(layer, "lora_enabled", False):
            seen |= {id(v) for v in layer.weights if "lora" in v.name}
    left = [v.path for v in model.weights if id(v) not in seen]
    if left:
        raise ValueError(f"{type(model).__name__} has weights that its conversion does not know: {left}.")


def copy(pair_list, back=False):
    """Writes every weight of the source into ours, or, with `back`, ours into the source. LoRA updates are merged."""
    for p in pair_list:
        there, here = (p.theirs, p.their_name), (p.ours, p.our_name)
        (layer, name), target = (here, variable(*there)) if back else (there, variable(*here))
        if is_for_memory(layer):
            raise ValueError(
                f'{p.path} has a LoRA update for memory rows alone (`enable_lora(rows="memory")`), and the other model '
                "has no memory. Save the update with `save_lora_weights(path)`; the other weights are the source's."
            )
        value = ops.convert_to_tensor(getattr(layer, name))
        value = p.layout.write(value, target.value) if back else p.layout.read(value, target.shape)
        if tuple(value.shape) != tuple(target.shape):
            raise ValueError(f"{p.path} has the shape {tuple(target.shape)}; received {tuple(value.shape)}.")
        # A copy: a training step on JAX donates the buffers of its variables.
        target.assign(ops.copy(ops.cast(value, target.dtype)))


def share(pair_list, backbone):
    """Replaces our variables by the source's; ValueError if one cannot be shared, before anything is changed."""
    for p in pair_list:
        ours, theirs = variable(p.ours, p.our_name), variable(p.theirs, p.their_name)
        if p.layout is not SAME:
            why = f"its layout differs: {p.layout.difference}"
        elif getattr(p.theirs, "lora_enabled", False):
            why = "the source adds a LoRA update to it"
        elif ours.dtype != theirs.dtype:
            why = f"it is {theirs.dtype} there and {ours.dtype} here"
        else:
            continue
        raise ValueError(f"{p.path} cannot be shared, {why}. Use weights='copy'.")
    for p in pair_list:
        old, new = variable(p.ours, p.our_name), variable(p.theirs, p.their_name)
        name = p.our_name if getattr(p.ours, "_" + p.our_name, None) is not old else "_" + p.our_name
        p.ours._untrack_variable(old)
        p.ours._tracker.unlock()
        p.ours._track_variable(new)
        setattr(p.ours, name, new)
        p.ours._tracker.lock()
    refresh_torch_parameters(backbone)


def draw_memory(backbone, seed=None):
    """Draws the first memory: embeddings of F tokens, no token twice while there are others.

    Only the half of the tokens with embeddings of ordinary size is drawn from (between the quartiles of the root mean
    square): special and unused tokens lie outside. With `initial_fam="prefix"`, each layer's rows are these rows passed
    through the layers below.
    """
    if not backbone.fam_length:
        return
    table = ops.convert_to_tensor(backbone.token_embedding.embeddings)
    size = ops.convert_to_numpy(ops.mean(ops.square(ops.cast(table, "float32")), axis=-1))
    low, high = np.quantile(size, [0.25, 0.75])
    ordinary = np.flatnonzero((low <= size) & (size <= high)).astype("int32")
    drawn = ops.convert_to_numpy(keras.random.shuffle(ordinary, seed=seed))
    rows = ops.cast(ops.take(table, np.resize(drawn, backbone.fam_length), axis=0), "float32")
    rows = rows * (1.0 if backbone.embedding_scale is None else backbone.embedding_scale)
    if backbone.memory_prompt is not None:
        backbone.memory_prompt.assign(ops.cast(rows, backbone.memory_prompt.dtype))
        return
    rows = ops.expand_dims(rows, 0)
    for block in backbone.blocks:
        block.attention.initial_fam_rows.assign(ops.cast(rows[0], block.attention.initial_fam_rows.dtype))
        rows = block.forward_rows(rows)
