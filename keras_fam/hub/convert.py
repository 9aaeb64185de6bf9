"""Conversion of KerasHub models to TransformerFAM models, and back."""

import inspect

import keras

from keras_fam.hub.experts import describe, experts_of
from keras_fam.hub.family import PLAIN
from keras_fam.hub.source import (
    check_fields,
    check_state,
    constructor_fields,
    family_of,
    field_values,
    keras_hub_models,
    layer_settings,
    unwrap_source,
)
from keras_fam.hub.weights import copy, draw_memory, pairs, share
from keras_fam.layers.validation import require_one_of
from keras_fam.models.transformer_fam_backbone import TransformerFAMBackbone
from keras_fam.models.transformer_fam_causal_lm import TransformerFAMCausalLM

SIZES = ("vocabulary_size", "num_layers", "hidden_dim", "num_query_heads", "num_key_value_heads", "intermediate_dim",
         "head_dim")  # fmt: skip
OF_BACKBONE = ("vocabulary_size", "num_layers", "hidden_dim", "tie_weights", "logit_softcap", "embedding_scale")


SINKS = 4  # as in StreamingLLM, arXiv 2309.17453; more help little
# What an untrained memory does least harm with, and the paper's form.
MEMORY = {
    "layer_inputs": {
        "memory_update": "hard_gate",
        "fam_gate": -4.0,
        "initial_fam": "summary",
        "fam_query_position": "current",  # at the end of the block, which rows then read as its next tokens would
    },
    "feedback": {
        "memory_update": "residual",
        "fam_gate": None,
        "initial_fam": "prompt",
        "fam_query_position": "previous",
    },
}
MEMORY["anchored"] = MEMORY["layer_inputs"]


def convert(
    source,
    *,
    block_size: int,
    memory_segments: int,
    fam_length: int,
    attention_sinks: int | None = None,
    fam_query: str | None = None,
    memory_update=None,
    fam_gate: float | str | None = "auto",
    initial_fam: str | None = None,
    fam_query_position: str | None = None,
    weights: str = "copy",
    seed=None,
    dtype=None,
    name: str | None = None,
    **options,
):
    """Makes a TransformerFAM model from a KerasHub model.

    A pre-trained model, with a memory of 64 rows over blocks of 1,024 tokens:

    ```python
    # downloads weights
    gemma = keras_hub.models.GemmaCausalLM.from_preset("gemma2_2b_en")
    lm = keras_fam.hub.convert(gemma, block_size=1024, memory_segments=4, fam_length=64)
    ```

    The same with random weights:

    ```python
    source = keras_hub.models.LlamaBackbone(
        vocabulary_size=50, num_layers=1, num_query_heads=4, num_key_value_heads=2, hidden_dim=16, intermediate_dim=24
    )
    backbone = keras_fam.hub.convert(source, block_size=8, memory_segments=1, fam_length=2)
    hidden = backbone(np.zeros((1, 20), "int32"))              # [1, 20, 16]
    ```

    Without a second copy of the weights, and without memory: block-wise sliding window attention.

    ```python
    windowed = keras_fam.hub.convert(source, block_size=8, memory_segments=3, fam_length=0, weights="share")
    ```

    Layers, weights and settings are the source's: with `fam_length=0` (as far as the window reaches) and with
    `initial_fam="summary"` (to the end of the first block), the logits are too.

    The memory is the only thing that is new, and untrained. By default it is made so that it does next to no harm
    before training: the keys of the first four tokens are kept (`attention_sinks`); each layer's rows come from the
    layer below in the same block, stand at its end, start as token embeddings and are remembered as they enter the
    layer, so that layers meet what they know (`fam_query="layer_inputs"`); each row is kept or rewritten
    (`memory_update="hard_gate"`), so that nothing accumulates; and tokens hardly read the memory at first
    (`fam_gate=-4.0`). `fam_query="feedback"` is the paper's form, which makes a pre-trained model much worse until it
    is trained.

    Sliding windows of the source are kept, layer by layer, inside the window of the blocks: a token attends to the
    keys that both windows contain. The window of the blocks has m·S+1 to (m+1)·S keys, depending on the token's place
    in its block. A source window of at least (m+1)·S keys is no restriction and is dropped; a smaller one becomes the
    layer's `attention_window`. Up to m·S+1 keys, attention equals the source's at any length (with
    `attention_sinks=0`). Memory rows are read whatever the window, sinks once the first block has left the window of
    the blocks.

    Args:
        source: a backbone or a CausalLM of KerasHub: Llama, Llama 3 (SmolLM is a Llama), Mistral, Qwen (2, 2.5),
            Qwen 3, Gemma (1, 2), Gemma 3 (text), Phi 3, SmolLM 3, GPT-NeoX, Mixtral, Qwen 1.5 MoE, Qwen 3 MoE or
            GPT-OSS. Objects of `keras_nlp` are the same.
        block_size: S, tokens in a block.
        memory_segments: m, past blocks whose keys and values stay visible.
        fam_length: F, rows of memory; 0 is TransformerBSWA.
        attention_sinks: W, the first tokens of each stream whose keys and values are kept for good. None means 4 (or
            `block_size`, if that is smaller): pre-trained models attend to the first tokens whatever they are, and lose
            their way once those have left the window. 0 turns them off, so that a window of the source is its own at
            any length.
        fam_query: what writes the memory: `"layer_inputs"`, `"anchored"`, or `"feedback"`, the paper's form. None means
            the first, or `"anchored"` for a source of one layer (and `"feedback"` without memory).
        memory_update: what becomes of a memory between blocks; None means `"hard_gate"`, and `"residual"` in the
            paper's form.
        fam_gate: where the learned bias on reading the memory starts: `"auto"` means -4.0, and None (no bias) in the
            paper's form.
        initial_fam: None means `"summary"`, and `"prompt"` in the paper's form.
        fam_query_position: None means `"current"`, and `"previous"` in the paper's form.
        weights: `"copy"`, or `"share"`: both models hold the same variables. Sharing needs equal layouts (Llama,
            Mistral, Mixtral, Qwen 2 and 3, Phi 3); the other families can only be copied. Training either model then
            trains both, a variable frozen in one is frozen in both, and LoRA updates belong to the model that has them.
            While this function runs, the weights take their memory twice.
        seed: seed of the first memory, an integer or a `keras.random.SeedGenerator`. Its rows are the embeddings of
            tokens drawn at random among the half whose embeddings are of ordinary size.
        dtype: dtype or policy; None means the source's.
        name: name of the new model.
        **options: other settings that the source does not decide: `fam_position`, `random_state_passing`,
            `blocks_per_step`, `remat`, `dropout` and so on, see `TransformerFAMBackbone`. `attention_window` (a sliding
            window, Fig. 1) is one where no window of the source narrows that of the blocks.

    Returns:
        A `TransformerFAMBackbone` for a backbone, a `TransformerFAMCausalLM` with the source's preprocessor for a
        CausalLM; built, not compiled.

    Raises:
        ValueError: for a class that is not supported, a constructor field of the source whose value is not supported,
            a quantized source, a weight that cannot be shared, an option that the source decides, and settings that
            contradict each other. The source is left unchanged.
        ImportError: without KerasHub.
    """
    if weights not in ("copy", "share"):
        raise ValueError(f"`weights` must be 'copy' or 'share'; received {weights!r}.")
    theirs, is_task, preprocessor = unwrap_source(source)
    family = family_of(type(theirs))
    _check_options(options)
    check_fields(theirs, family)
    check_state(theirs)
    if is_task and {id(v) for v in source.weights} != {id(v) for v in theirs.weights}:
        raise ValueError(f"{type(source).__name__} has weights outside its backbone, which cannot be converted.")
    window = {"block_size": block_size, "memory_segments": memory_segments, "fam_length": fam_length}
    window["attention_sinks"] = min(SINKS, block_size) if attention_sinks is None else attention_sinks
    given = {"memory_update": memory_update, "initial_fam": initial_fam, "fam_query_position": fam_query_position}
    if fam_query is None:
        fam_query = "feedback" if not fam_length else "layer_inputs" if theirs.num_layers > 1 else "anchored"
    memory = _memory_settings(fam_query, fam_gate, given)
    layers = layer_settings(theirs, family, (memory_segments + 1) * block_size)
    windows = sorted({layer["attention_window"] for layer in layers} - {None})
    if "attention_window" in options and windows:
        raise ValueError(
            f"The source decides its sliding window, of {windows} keys; leave `attention_window` out. "
            f"Received: {options['attention_window']!r}."
        )
    settings = {**_merge(layers), **window, **memory, **options}
    backbone = TransformerFAMBackbone(
        **settings, dtype=theirs.dtype_policy if dtype is None else dtype, name=None if is_task else name
    )
    backbone.build()
    found = pairs(backbone, theirs, family)
    if weights == "share":
        share(found, backbone)
    else:
        copy(found)
    draw_memory(backbone, seed)
    if not is_task:
        return backbone
    lm = TransformerFAMCausalLM(backbone, preprocessor=preprocessor, name=name)
    lm.build()
    return lm


def to_keras_hub(model, to, *, drop_memory: bool = False, **fields):
    """Makes a KerasHub model from a TransformerFAM model.

    ```python
    llama = keras_fam.hub.to_keras_hub(lm, keras_hub.models.LlamaCausalLM)
    ```

    The weights are copied; LoRA updates are merged into their kernels. KerasHub's models attend to the whole input, so
    the outputs are equal as far as one block (or the sliding window of the source) reaches.

    Args:
        model: a built `TransformerFAMCausalLM` or `TransformerFAMBackbone`, converted or not.
        to: the class of KerasHub to make: a backbone or a CausalLM of one of the families of `convert`.
        drop_memory: whether a memory may be dropped; if False, `fam_length` must be 0.
        **fields: fields of the backbone's constructor in place of those that follow from the settings, such as a
            `sliding_window` that block windows had made needless.

    Returns:
        An object of the class `to`; a CausalLM has the model's preprocessor.

    Raises:
        ValueError: if the model has a memory, if the class is not supported or cannot express a setting of the model
            (which is named), if the model is quantized, or if a weight has no counterpart.
        ImportError: without KerasHub.
    """
    models = keras_hub_models()
    is_task = isinstance(to, type) and issubclass(to, models.CausalLM)
    backbone_class = to.backbone_cls if is_task else to
    family = family_of(backbone_class)
    backbone = model.backbone if isinstance(model, TransformerFAMCausalLM) else model
    if not isinstance(backbone, TransformerFAMBackbone):
        raise ValueError(
            f"The model must be a TransformerFAMCausalLM or a TransformerFAMBackbone; received {type(model).__name__}."
        )
    if not backbone.built:
        backbone.build()
    if backbone.fam_length and not drop_memory:
        raise ValueError(
            f"KerasHub's models have no memory; this one has fam_length={backbone.fam_length}. Pass drop_memory=True "
            "to drop it."
        )
    check_state(backbone)
    unknown = sorted(set(fields) - set(constructor_fields(backbone_class)))
    if unknown:
        raise ValueError(f"{backbone_class.__name__} has no field {unknown}.")
    layers = [_settings_of(backbone, block) for block in backbone.blocks]
    others = [i for i, layer in enumerate(layers) if layer["feed_forward"] is not None]
    if others and "num_experts" not in family.fields:
        raise ValueError(
            f"{backbone_class.__name__} has a plain feed-forward part in every layer; layer {others[0]} of the model "
            f"has a {type(backbone.blocks[others[0]].feed_forward).__name__} as its `feed_forward`. Use the class of "
            "another family."
        )
    made = backbone_class(**{**field_values(backbone_class, family, layers), **fields}, dtype=backbone.dtype_policy)
    check_fields(made, family)
    attention = backbone.blocks[0].attention
    expected = layer_settings(made, family, (attention.memory_segments + 1) * attention.block_size)
    for i, (wanted, block) in enumerate(zip(expected, layers, strict=True)):
        if wanted["query_key_norm"] is None:
            wanted = {**wanted, "query_key_norm_epsilon": block["query_key_norm_epsilon"]}
        for key, value in wanted.items():
            if not _same(key, value, block[key]):
                raise ValueError(
                    f"{backbone_class.__name__} would have {key}={describe(value)} in layer {i} where the model "
                    f"has {describe(block[key])}. Use the class of another family, or pass the constructor field that "
                    "sets it."
                )
    copy(pairs(backbone, made, family), back=True)
    if not is_task:
        return made
    return to(backbone=made, preprocessor=getattr(model, "preprocessor", None))


def _check_options(options):
    theirs = sorted(set(options) & ({*PLAIN, *SIZES, "layer_settings"} - {"attention_window"}))
    if theirs:
        raise ValueError(f"The source decides {theirs}; remove these options.")
    known = set(inspect.signature(TransformerFAMBackbone.__init__).parameters)
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"TransformerFAMBackbone knows no setting {unknown}.")


def _memory_settings(fam_query, fam_gate, given):
    """Settings of a backbone: those given, and for the rest what goes with the write."""
    require_one_of("fam_query", fam_query, tuple(MEMORY))
    given = {name: value for name, value in given.items() if value is not None}
    if fam_gate != "auto":
        given["fam_gate"] = fam_gate
    return {"fam_query": fam_query, **MEMORY[fam_query], **given}


def _merge(layers):
    """Settings of a backbone: what all layers share, and `layer_settings` for the rest."""
    shared = {key: value for key, value in layers[0].items() if all(layer[key] == value for layer in layers)}
    own = [{key: value for key, value in layer.items() if key not in shared} for layer in layers]
    return {**shared, "layer_settings": own if any(own) else None}


def _settings_of(backbone, block):
    """What `layer_settings` would say of one of our blocks."""
    found = {}
    for key in {*PLAIN, *SIZES}:
        holder = backbone if key in OF_BACKBONE else block if hasattr(block, key) else block.attention
        found[key] = getattr(holder, key)
    return {**found, "feed_forward": experts_of(block.feed_forward)}


def _same(key, first, second):
    if key == "activation":
        return keras.activations.get(first) is keras.activations.get(second)
    if isinstance(first, float) and isinstance(second, int | float):
        return abs(first - second) <= 1e-12 * abs(first)
    return first == second
