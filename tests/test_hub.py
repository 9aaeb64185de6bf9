"""Converted KerasHub models are their source: logits, windows, weights, and the way back."""

import importlib

import hub_lines
import keras
import numpy as np
import pytest
from hub_support import TOLERANCE, WINDOW, equal, hub_families, models, numpy, small, source

import keras_fam
from keras_fam import hub

streaming_llm = importlib.import_module("examples.verification.streaming_llm")

WINDOWED = ("Mistral", "Qwen 2, 2.5", "Qwen 3", "Gemma 2", "Gemma 3 (text)")
CASES = [(family, 0) for family in hub_families.FAMILIES] + [(family, 1) for family in WINDOWED] + [("SmolLM 3", 3)]
CASES += [("Qwen 3 MoE", 2)]  # experts in both layers; in one of them with seed 0
JOINED = ("Qwen 1.5 MoE", "Qwen 3 MoE", "GPT-NeoX", "GPT-OSS")  # several weights here are one there


@pytest.mark.parametrize("family, seed", CASES)
def test_a_converted_model_is_its_source(family, seed):
    model, expected = source(family, seed)
    plain = hub.convert(model, **WINDOW, fam_length=0)
    equal(hub_families.logits(plain, hub_families.tokens()), expected)
    assert hub.memory_weights(plain.backbone) == []
    ours, theirs = sizes(plain.weights), sizes(model.trainable_weights)
    assert sum(ours) == sum(theirs) if family in JOINED else ours == theirs
    summary = hub.convert(model, **WINDOW, fam_length=3, initial_fam="summary")
    equal(hub_families.logits(summary, hub_families.tokens()), expected)
    memory = hub.memory_weights(summary.backbone)
    assert memory[0] is summary.backbone.memory_prompt
    assert {v.path.rpartition("attention/")[2] for v in memory[1:]} == {
        "fam_gate",
        "memory_update/kernel",
        "memory_update/bias",
    }
    assert {v.path for v in summary.weights} - {v.path for v in memory} == {
        v.path.replace(plain.backbone.name, summary.backbone.name) for v in plain.weights
    }


def sizes(weights):
    """Numbers of elements, in order: Gemma's heads come first there, and SmolLM 3's have no axis of their own."""
    return sorted(int(np.prod(v.shape)) for v in weights)


@pytest.mark.parametrize("family, seed", CASES)
def test_back_again(family, seed):
    model, _ = source(family, seed)
    lm = hub.convert(model, **WINDOW, fam_length=2)
    back = hub.to_keras_hub(lm, type(model), drop_memory=True)
    for theirs, ours in zip(model.weights, back.weights, strict=True):
        assert np.array_equal(numpy(theirs), numpy(ours)), theirs.path
    wanted, found = model.backbone.get_config(), back.backbone.get_config()
    for name in ("name", "sliding_window_size") if not wanted.get("use_sliding_window_attention") else ("name",):
        wanted.pop(name, None), found.pop(name, None)
    assert found == wanted


@pytest.mark.parametrize("family", ["Mistral", "Qwen 3"])
def test_a_sliding_window_inside_the_blocks_is_exact_over_many_blocks(family):
    field = {"Mistral": "sliding_window", "Qwen 3": "sliding_window_size"}[family]
    model, _ = hub_families.source(family, 0, hidden_dim=16, **{field: 7})
    backbone = hub.convert(model.backbone, block_size=3, memory_segments=2, fam_length=0, attention_sinks=0)
    assert backbone.layer_settings is None and backbone.blocks[1].attention.attention_window == 7
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    equal(hub_families.logits(lm, hub_families.tokens()), hub_families.logits(model, hub_families.tokens()))


@pytest.mark.parametrize("segments, window", [(0, 7), (1, 20)])
def test_a_sliding_window_wider_than_what_every_token_has(segments, window):
    model, _ = hub_families.source("Mistral", 0, hidden_dim=16, sliding_window=window)
    lm = hub.convert(model, block_size=16, memory_segments=segments, fam_length=0, attention_sinks=0)
    assert lm.backbone.blocks[0].attention.attention_window == window
    equal(hub_families.logits(lm, hub_families.tokens()), hub_families.logits(model, hub_families.tokens()))


def test_a_source_without_a_window_may_get_one():
    settings = {"block_size": 4, "memory_segments": 2, "fam_length": 0, "attention_window": 7, "attention_sinks": 0}
    model, _ = hub_families.source("Llama", 0, hidden_dim=16)
    lm = hub.convert(model, **settings)
    assert {block.attention.attention_window for block in lm.backbone.blocks} == {7}
    found, whole = hub_families.logits(lm, hub_families.tokens()), hub_families.logits(model, hub_families.tokens())
    equal(found[:, :7], whole[:, :7])
    assert np.abs(found - whole)[:, 7:].max() > 1e-3
    with pytest.raises(ValueError, match="attention_window"):  # a Llama of KerasHub has none
        hub.to_keras_hub(lm, type(model))
    mistral = hub_families.source("Mistral", 0, hidden_dim=16, sliding_window=7)[0]
    for window in (5, None):
        with pytest.raises(ValueError, match=rf"its sliding window, of \[7\] keys.*Received: {window}"):
            hub.convert(mistral, **{**settings, "attention_window": window})


def test_a_converted_model_keeps_its_first_tokens():
    """Four of them, read once block 0 has left the window; none where the window still holds them."""
    model, _ = hub_families.source("Llama", 0, hidden_dim=16)
    ids = hub_families.tokens()
    kept, without = (
        hub.convert(model, block_size=4, memory_segments=1, fam_length=0, **s) for s in ({}, {"attention_sinks": 0})
    )
    assert kept.backbone.blocks[0].attention.attention_sinks == 4
    assert (
        hub.convert(model, block_size=3, memory_segments=1, fam_length=0).backbone.blocks[0].attention.attention_sinks
        == 3
    )
    found, plain = hub_families.logits(kept, ids), hub_families.logits(without, ids)
    equal(found[:, :8], plain[:, :8])
    assert np.abs(found - plain)[:, 8:].max() > 1e-3


def test_sinks_are_those_of_an_independent_streaming_llm():
    model = models.LlamaBackbone(**small(), tie_word_embeddings=True)
    ids = np.random.default_rng(0).integers(0, model.vocabulary_size, 28)
    for segments, sinks in ((0, 2), (1, 3), (2, 4)):
        expected = streaming_llm.StreamingLlama(model, 4, segments, sinks).read(ids)
        ours = hub.convert(model, block_size=4, memory_segments=segments, fam_length=0, attention_sinks=sinks)
        lm = keras_fam.TransformerFAMCausalLM(ours)
        lm.build()
        equal(hub_families.logits(lm, ids[None])[0], expected)


@pytest.mark.parametrize(
    "family, line", [("Qwen 3", "FAM, as `convert` makes it"), ("Gemma 3 (text)", "BSWA, 4 sinks")]
)
def test_a_converted_model_reads_on_as_the_oracle_does(family, line):
    """Over five blocks, in one call and in chunks; more in `hub_lines.py`."""
    found = hub_lines.measure(family, 0, line)
    assert set(found) == {"logits", "oracle", "chunks", "block 1"} and found.pop("logits") > 1
    assert max(found.values()) <= TOLERANCE, f"{keras.backend.backend()}: {found}"


def test_local_and_global_layers_keep_their_own_window_and_rotation():
    model, _ = hub_families.source("Gemma 3 (text)", 0, use_sliding_window_attention=True, sliding_window_size=5)
    backbone = hub.convert(model, block_size=4, memory_segments=1, fam_length=2).backbone
    found = [(b.attention.attention_window, b.attention.rope_wavelength) for b in backbone.blocks]
    assert found == [(5, 1e4)] * 5 + [(None, 1e6)]
    wide = hub.convert(model.backbone, block_size=3, memory_segments=0, fam_length=2)
    assert {b.attention.attention_window for b in wide.blocks} == {None}, "a window that never narrows is left out"


@pytest.mark.parametrize("rotated", [(False, True, True), (True, False, False), (False, False, False), (True,)])
def test_layers_that_rotate_and_layers_that_do_not(rotated):
    model, fields = hub_families.source("SmolLM 3", 3, hidden_dim=16, rope_layer_enabled_list=list(rotated))
    assert fields["attention_bias"] and fields["mlp_bias"]
    lm = hub.convert(model, **WINDOW, fam_length=0)
    expected = [fields["rope_theta"] if turns else None for turns in (*rotated, True, True)[:3]]
    assert [block.attention.rope_wavelength for block in lm.backbone.blocks] == expected
    whole = hub_families.logits(model, hub_families.tokens())
    equal(hub_families.logits(lm, hub_families.tokens()), whole)
    equal(hub_families.logits(hub.to_keras_hub(lm, type(model)), hub_families.tokens()), whole)


@pytest.mark.parametrize("share, width", [(0.25, 2), (0.5, 4), (0.8, 6), (1.0, None)])
def test_a_part_of_each_head_is_rotated(share, width):
    model, _ = hub_families.source("GPT-NeoX", 0, rotary_percentage=share)
    lm = hub.convert(model, **WINDOW, fam_length=0)
    assert {block.attention.rotary_dim for block in lm.backbone.blocks} == {width}
    whole = hub_families.logits(model, hub_families.tokens())
    equal(hub_families.logits(lm, hub_families.tokens()), whole)
    equal(hub_families.logits(hub.to_keras_hub(lm, type(model)), hub_families.tokens()), whole)


@pytest.mark.parametrize("factor", [1.0, 32.0])
def test_gpt_oss_has_windows_in_every_other_layer_and_the_temperature_of_yarn(factor):
    """KerasHub's window counts the tokens before a query's own."""
    model, _ = hub_families.source(
        "GPT-OSS", 0, hidden_dim=16, head_dim=4, sliding_window=4, rope_scaling_factor=factor
    )
    settings = [block.attention for block in hub.convert(model, **WINDOW, fam_length=2).backbone.blocks]
    assert [attention.attention_window for attention in settings] == [None, 5]
    scale = None if factor == 1 else (0.1 * np.log(32.0) + 1) ** 2 / 2
    assert settings[0].attention_scale == (scale and pytest.approx(scale))
    assert not hub.memory_weights(hub.convert(model.backbone, **WINDOW, fam_length=0)), "a softmax sink is no memory"


def test_the_first_memory_is_drawn_from_ordinary_tokens():
    model, _ = source("Gemma 1", 0)
    table = numpy(model.backbone.token_embedding.embeddings)
    table[:3] *= 100  # special tokens, say
    model.backbone.token_embedding.embeddings.assign(table)
    first = hub.convert(model, block_size=16, memory_segments=0, fam_length=9, seed=3).backbone
    rows = numpy(first.memory_prompt) / model.backbone.hidden_dim**0.5
    distance = np.abs(rows[:, None] - table).max(-1)
    tokens = distance.argmin(1)
    assert distance.min(1).max() < 1e-5 and len(set(tokens.tolist())) == 9, "each row is another token"
    size = np.square(table).mean(-1)
    assert np.isin(tokens, np.argsort(size)[len(size) // 4 - 1 : -(len(size) // 4) + 1]).all()
    again = hub.convert(model.backbone, block_size=16, memory_segments=0, fam_length=9, seed=3)
    assert np.array_equal(numpy(again.memory_prompt), numpy(first.memory_prompt))
    paper = {**WINDOW, "fam_length": 2, "fam_query": "feedback", "seed": 3}
    prefix = hub.convert(model, **paper, initial_fam="prefix").backbone
    prompt = hub.convert(model, **paper).backbone
    for one, other in zip(prefix.first_memories(), prompt.first_memories(), strict=True):
        assert np.abs(numpy(one) - numpy(other)).max() < 1e-5, "a prefix starts as the prompt's memories"


def test_what_is_known_to_do_no_harm_is_the_default_and_the_paper_is_one_argument_away():
    model, _ = source("Llama", 0)
    names = ("fam_query", "memory_update", "fam_gate", "initial_fam", "fam_query_position", "attention_sinks")

    def made(**options):
        config = hub.convert(model, **{**WINDOW, "fam_length": 2, **options}).backbone.get_config()
        return tuple(config[name] for name in names)

    sinks = min(4, WINDOW["block_size"])
    assert made() == ("layer_inputs", "hard_gate", -4.0, "summary", "current", sinks)
    paper = ("feedback", "residual", None, "prompt", "previous", sinks)
    assert made(fam_query="feedback") == made(fam_length=0) == paper
    given = {"memory_update": "average", "fam_gate": None, "initial_fam": "prompt", "fam_query_position": "previous"}
    given["attention_sinks"] = 0
    assert made(**given) == ("layer_inputs", *given.values())
    with pytest.raises(ValueError, match="`fam_query` must be one of"):
        made(fam_query="static")


# Sharing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen 2, 2.5", "Qwen 3", "Phi 3", "Mixtral"])
def test_shared_weights_are_the_same_variables(family):
    model, expected = source(family, 0)
    more = {"fam_query": "anchored", "memory_update": "hard_gate", "fam_gate": -4.0}
    lm = hub.convert(model, **WINDOW, fam_length=2, initial_fam="summary", weights="share", **more)
    memory = {id(v) for v in hub.memory_weights(lm.backbone)}
    assert {id(v) for v in lm.weights} - memory == {id(v) for v in model.weights}
    assert {id(v) for v in lm.trainable_weights} - memory == {id(v) for v in model.trainable_weights}
    if hasattr(lm, "parameters"):
        assert sum(p.numel() for p in lm.parameters()) == lm.count_params()
    equal(hub_families.logits(lm, hub_families.tokens()), expected)


def test_training_a_sharing_model_trains_the_source():
    model, _ = hub_families.source("Llama", 0, hidden_dim=16, num_layers=1)
    before = [numpy(v).copy() for v in model.weights]
    lm = hub.convert(model, **WINDOW, fam_length=2, weights="share", memory_update=keras_fam.Normalized(noise=0.1))
    lm.compile(optimizer=keras.optimizers.SGD(0.1))
    x = hub_families.tokens()
    lm.fit(x, np.roll(x, -1, 1), verbose=0)
    assert all(np.abs(numpy(v) - b).max() > 0 for v, b in zip(model.weights, before, strict=True))
    trained = hub_families.logits(model, x)
    equal(hub_families.logits(hub.convert(model, **WINDOW, fam_length=0), x), trained)


def test_training_a_copy_leaves_the_source_alone():
    model, _ = hub_families.source("Llama", 0, hidden_dim=16, num_layers=1)
    before = [numpy(v).copy() for v in model.weights]
    lm = hub.convert(model, **WINDOW, fam_length=2)
    lm.compile(optimizer=keras.optimizers.SGD(0.1))
    x = hub_families.tokens()
    lm.fit(x, np.roll(x, -1, 1), verbose=0)
    assert all(np.array_equal(numpy(v), b) for v, b in zip(model.weights, before, strict=True))


def test_what_cannot_be_shared_says_which_weight():
    with pytest.raises(ValueError, match=r"feed_forward.gate_kernel cannot be shared.* part 1 of 2 of one weight"):
        hub.convert(source("Qwen 1.5 MoE", 0)[0], **WINDOW, fam_length=2, weights="share")
    for family in ("Gemma 1", "SmolLM 3"):
        with pytest.raises(ValueError, match=r"attention.query.kernel cannot be shared, its layout differs"):
            hub.convert(source(family, 0)[0], **WINDOW, fam_length=2, weights="share")
    with pytest.raises(ValueError, match=r"token_embedding.embeddings cannot be shared, it is float32 there"):
        hub.convert(source("Llama", 0)[0], **WINDOW, fam_length=2, weights="share", dtype="bfloat16")


def test_lora_of_the_source_and_of_ours_is_merged():
    model, _ = hub_families.source("Llama", 0, hidden_dim=16, num_layers=1)
    model.backbone.enable_lora(2)
    for v in model.weights:
        if "lora" in v.name:
            v.assign(keras.random.normal(v.shape, stddev=0.3, seed=1))
    expected = hub_families.logits(model, hub_families.tokens())
    lm = hub.convert(model, **WINDOW, fam_length=0)
    equal(hub_families.logits(lm, hub_families.tokens()), expected)
    layer = lm.backbone.blocks[0].gate
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(keras.random.normal(layer.lora_kernel_b.shape, seed=1))
    back = hub.to_keras_hub(lm, models.LlamaCausalLM)
    equal(hub_families.logits(back, hub_families.tokens()), hub_families.logits(lm, hub_families.tokens()))
    with pytest.raises(ValueError, match="LoRA"):
        hub.convert(model, **WINDOW, fam_length=0, weights="share")


# Around the numbers --------------------------------------------------------------------------------------------------


def test_the_preprocessor_is_carried_over():
    words = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġa": 5}
    tokenizer = models.QwenTokenizer(vocabulary=words, merges=["a b", "Ġ a"])
    preprocessor = models.QwenCausalLMPreprocessor(tokenizer, sequence_length=16)
    backbone = models.QwenBackbone(**small())
    model = models.QwenCausalLM(backbone=backbone, preprocessor=preprocessor)
    lm = hub.convert(model, **WINDOW, fam_length=2)
    assert lm.preprocessor is preprocessor
    x, _, _ = lm.preprocessor(["ab a", "b"])
    assert tuple(lm(x).shape) == (2, 16, 31)
    assert hub.to_keras_hub(lm, models.QwenCausalLM, drop_memory=True).preprocessor is preprocessor
    assert isinstance(hub.convert(backbone, **WINDOW, fam_length=2), keras_fam.TransformerFAMBackbone)


@pytest.mark.parametrize("family", ["Gemma 2", "Qwen 1.5 MoE"])
def test_a_converted_model_is_saved_and_loaded(family, tmp_path):
    model, expected = source(family, 0)
    lm = hub.convert(model, **WINDOW, fam_length=2, initial_fam="summary", random_state_passing=0.5, name="mine")
    lm.save(tmp_path / "lm.keras")
    loaded = keras.saving.load_model(tmp_path / "lm.keras")
    assert loaded.name == "mine"
    equal(hub_families.logits(loaded, hub_families.tokens()), expected)


def test_the_dtype_is_the_sources_unless_given():
    fields = small(dtype="bfloat16")
    backbone = models.LlamaBackbone(**fields)
    assert hub.convert(backbone, **WINDOW, fam_length=2).dtype_policy.name == "bfloat16"
    wide = hub.convert(backbone, **WINDOW, fam_length=2, dtype="float32")
    assert {v.dtype for v in wide.weights} == {"float32"}
