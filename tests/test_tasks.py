"""LoRA, int8, scores, text in `fit`, and presets of TransformerFAM language models."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops
from support import INT8, close, gradients, numpy

import keras_fam
from keras_fam.layers.fast_call import call_dense
from keras_fam.ops.backend import compiled
from keras_fam.streaming.generation import tokenize

SETTINGS = {
    "vocabulary_size": 31, "num_layers": 2, "hidden_dim": 16, "num_query_heads": 4, "num_key_value_heads": 2,
    "intermediate_dim": 24, "block_size": 4, "memory_segments": 1, "fam_length": 3,
}  # fmt: skip
VARIANTS = {
    "joined": {},
    "biased": {"use_attention_bias": True, "use_feedforward_bias": True, "query_key_norm": "rms_norm"},
    "static": {"backbone_class": keras_fam.baselines.SummaryFAMBackbone},
    "float": {"fam_position": "float"},
}
ALL = {"query", "key", "value", "output", "gate", "up", "down"}


def model(seed=0, backbone_class=keras_fam.TransformerFAMBackbone, **settings):
    keras.utils.set_random_seed(seed)
    lm = keras_fam.TransformerFAMCausalLM(backbone_class(**{**SETTINGS, **settings}))
    lm.build()
    for v in lm.weights:
        if v.name == "bias":
            v.assign(keras.random.normal(v.shape, stddev=0.3))
    return lm


def tokens(length=15, rows=2):
    return np.random.default_rng(1).integers(0, 31, (rows, length)).astype("int32")


def logits(lm, x=None):
    x = tokens() if x is None else x
    return ops.convert_to_numpy(compiled(lambda x: lm(x), lambda: lm.variables)(ops.convert_to_tensor(x)))


def shake(lm, seed=2):
    """Gives the updates random values: they start as nothing."""
    for i, layer in enumerate(lm.lora_layers().values()):
        layer.lora_kernel_b.assign(keras.random.normal(layer.lora_kernel_b.shape, stddev=0.2, seed=seed + i))


def read_alone(lm):
    """What every memory row is after three blocks, so that its updates are seen by themselves."""
    run = compiled(lambda x, state: lm.advance(x, state)[1], lambda: lm.variables)
    state = run(ops.convert_to_tensor(tokens(12)), lm.get_initial_state(2))
    return np.stack([ops.convert_to_numpy(layer.fam) for layer in state.layers])


# LoRA ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_act_on_tokens_and_memory_rows_as_merged_kernels_do(variant):
    lm = model(**VARIANTS[variant])
    before, memory, count = logits(lm), read_alone(lm), len(lm.weights)
    lm.enable_lora(2, alpha=3.0)
    close(logits(lm), before, 1e-6)
    shake(lm)
    with_updates, with_memory = logits(lm), read_alone(lm)
    assert np.abs(with_updates - before).max() > 0.05 and np.abs(with_memory - memory).max() > 0.05
    merged = model(**VARIANTS[variant])
    kernels = {name: ops.convert_to_numpy(layer.kernel) for name, layer in lm.lora_layers().items()}
    assert len(kernels) == 2 * len(ALL)
    merged.enable_lora(1)
    for name, layer in merged.lora_layers().items():
        layer._kernel.assign(kernels[name])
    merged.merge_lora()
    assert len(merged.weights) == count
    close(with_updates, logits(merged), 1e-5)
    close(with_memory, read_alone(merged), 1e-5)
    lm.merge_lora()
    assert lm.lora_layers() == {} and len(lm.weights) == len(lm.trainable_weights) == count
    assert np.abs(logits(lm) - with_updates).max() <= 1e-5
    lm.enable_lora(1)  # and again, on top


def test_factors_have_the_gradients_of_keras_own_layers():
    rng = np.random.default_rng(0)
    dense = keras.layers.Dense(5)
    dense.build((None, 6))
    heads = keras.layers.EinsumDense("rnh,nhd->rd", output_shape=(5,), bias_axes="d")
    heads.build((None, 2, 3))
    query = keras.layers.EinsumDense("rd,dnh->rnh", output_shape=(2, 3))
    query.build((None, 6))
    for layer, axes, out in ((dense, 1, (5,)), (heads, 2, (5,)), (query, 1, (2, 3))):
        layer.enable_lora(2, lora_alpha=3.0)
        layer.lora_kernel_b.assign(rng.normal(size=layer.lora_kernel_b.shape))
        x = rng.normal(size=(2, 4, 2, 3) if axes == 2 else (2, 4, 6)).astype("float32")
        flat = x.reshape(8, *x.shape[2:])
        weight = ops.convert_to_tensor(rng.normal(size=(8, *out)).astype("float32"))
        wanted = gradients(
            lambda x, layer=layer, weight=weight: ops.sum(layer.call(x) * weight),
            [flat, layer.lora_kernel_a, layer.lora_kernel_b],
        )
        found = gradients(
            lambda x, layer=layer, weight=weight, axes=axes: ops.sum(
                ops.reshape(call_dense(layer, x, axes), weight.shape) * weight
            ),
            [x, layer.lora_kernel_a, layer.lora_kernel_b],
        )
        for a, b in zip(found, wanted, strict=True):
            close(a.reshape(b.shape), b, 1e-5)


@pytest.mark.parametrize("train_memory", [True, False])
def test_only_updates_and_the_memory_prompt_are_trained(train_memory):
    lm = model()
    base = {v.path: ops.convert_to_numpy(v).copy() for v in lm.weights}
    lm.enable_lora(2, ["attention", "down"], train_memory=train_memory)
    assert {name.partition("/")[2] for name in lm.lora_layers()} == ALL - {"gate", "up"}
    prompt = lm.backbone.memory_prompt
    factors = {id(v) for layer in lm.lora_layers().values() for v in (layer.lora_kernel_a, layer.lora_kernel_b)}
    assert {id(v) for v in lm.trainable_weights} == factors | ({id(prompt)} if train_memory else set())
    if hasattr(lm, "parameters"):
        assert sum(p.numel() for p in lm.parameters() if p.requires_grad) == sum(
            int(np.prod(v.shape)) for v in lm.trainable_weights
        )
    x = tokens(16)
    lm.compile(keras.optimizers.Adam(0.02))
    first = lm.fit(x, np.roll(x, -1, 1), epochs=6, verbose=0).history["loss"]
    assert first[-1] < first[0] - 0.01
    for v in lm.weights:
        if v.path in base:
            moved = np.abs(ops.convert_to_numpy(v) - base[v.path]).max()
            assert (moved > 0) == (v is prompt and train_memory), v.path
    for layer in lm.lora_layers().values():
        assert np.abs(ops.convert_to_numpy(layer.lora_kernel_b)).max() > 0


def test_updates_go_to_a_file_and_come_back(tmp_path):
    settings = {"memory_update": "hard_gate", "fam_gate": -1.0, "fam_query": "anchored"}
    lm, path = model(**settings), tmp_path / "some.lora.h5"
    lm.enable_lora(2, alpha=3)
    shake(lm)
    memory = [v for v in lm.trainable_weights if "lora" not in v.name]
    assert [v.name for v in memory] == ["memory_prompt", *2 * ["fam_gate", "kernel", "bias"]]
    for v in memory:
        v.assign(v + 0.1)
    expected = logits(lm)
    lm.save_lora_weights(path)
    assert os.listdir(tmp_path) == ["some.lora.h5"]
    fresh = model(**settings)
    fresh.load_lora_weights(path)
    close(logits(fresh), expected, 1e-6)
    shake(fresh, seed=9)
    fresh.load_lora_weights(path)  # where LoRA is on already
    close(logits(fresh), expected, 1e-6)


def test_lora_refuses_what_does_not_fit(tmp_path):
    lm, path = model(), tmp_path / "some.lora.h5"
    with pytest.raises(ValueError, match="positive integer; received 0"):
        lm.enable_lora(0)
    with pytest.raises(ValueError, match=r"one or more of .*received \['atention'\]"):
        lm.enable_lora(2, ["atention"])
    with pytest.raises(ValueError, match="No layer has LoRA"):
        lm.merge_lora()
    with pytest.raises(ValueError, match="No layer has LoRA"):
        lm.save_lora_weights(path)
    assert len(lm.trainable_weights) == len(lm.weights), "a refused call has frozen something"
    lm.enable_lora(2, "feed_forward")
    with pytest.raises(ValueError, match="already enabled"):
        lm.enable_lora(2)
    with pytest.raises(ValueError, match=r"must end in `.lora.h5`"):
        lm.save_lora_weights(tmp_path / "some.h5")
    lm.save_lora_weights(path)
    before = {name: numpy(layer.lora_kernel_a) for name, layer in lm.lora_layers().items()}
    other = model()
    other.enable_lora(3, "feed_forward")
    with pytest.raises(ValueError, match=r"has rank 2 and alpha 2.0; LoRA is enabled with rank 3"):
        other.load_lora_weights(path)
    with pytest.raises(ValueError, match="belongs to another model: its factors of block_0/down"):
        model(intermediate_dim=20).load_lora_weights(path)
    short = model(fam_length=2)
    with pytest.raises(ValueError, match="memory weights of shapes"):
        short.load_lora_weights(path)
    assert short.lora_layers() == {}
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="cannot be read"):
        lm.load_lora_weights(path)
    for name, layer in lm.lora_layers().items():
        assert np.array_equal(numpy(layer.lora_kernel_a), before[name])


# int8 ----------------------------------------------------------------------------------------------------------------


def test_int8_reads_whole_and_in_chunks_and_takes_lora(tmp_path):
    lm = model(num_layers=1)
    expected = logits(lm)
    lm.quantize("int8")
    found = logits(lm)
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    stream = keras_fam.StreamingModel(lm, 2)
    close(np.concatenate([stream.predict(part) for part in np.split(tokens(), [4, 7], axis=1)], axis=1), found, INT8)
    lm.save_to_preset(tmp_path)
    loaded = keras_fam.TransformerFAMCausalLM.from_preset(tmp_path)
    assert loaded.backbone.blocks[0].up.quantization_mode == "int8"
    close(logits(loaded), found, 1e-6)
    lm.enable_lora(2)
    close(logits(lm), found, 1e-6)
    shake(lm)
    with_updates = logits(lm)
    assert np.abs(with_updates - found).max() > 0.05
    with pytest.raises(ValueError, match="Merge first, then quantize"):
        lm.merge_lora()
    lm.save_to_preset(tmp_path)
    loaded = keras_fam.TransformerFAMCausalLM.from_preset(tmp_path)
    assert loaded.lora_layers().keys() == lm.lora_layers().keys() and loaded.backbone.blocks[0].up.lora_enabled
    close(logits(loaded), with_updates, 1e-6)
    close(logits(lm), with_updates, 1e-6)
    with pytest.raises(ValueError, match=r"round the kernel again.*save_to_preset"):
        lm.save(tmp_path / "lm.keras")


def test_lora_needs_kernels_that_it_can_update():
    lm = model(num_layers=1)
    lm.quantize("float8")
    with pytest.raises(ValueError, match=r"in int8 or int4; received \['float8'\]"):
        lm.enable_lora(2)
    assert lm.lora_layers() == {} and lm.backbone.memory_prompt.trainable
    assert all(v.trainable for v in lm.backbone.token_embedding.trainable_weights) and lm.trainable_weights


# Scores and text -----------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_source():
    keras_hub = pytest.importorskip("keras_hub")
    keras.utils.set_random_seed(0)
    sizes = {name: SETTINGS[name] for name in list(SETTINGS)[:6]}
    source = keras_hub.models.LlamaCausalLM(backbone=keras_hub.models.LlamaBackbone(**sizes), preprocessor=None)
    lm = keras_fam.hub.convert(source, block_size=16, memory_segments=0, fam_length=2, initial_fam="summary")
    x = tokens()
    targets = np.roll(x, -1, 1)

    def both(x, targets):
        wanted = source.score(x, scoring_mode="loss", target_ids=targets)
        return lm.score(x, scoring_mode="loss", target_ids=targets), wanted

    found, wanted = compiled(both, lambda: lm.variables + source.variables)(*map(ops.convert_to_tensor, (x, targets)))
    close(found, wanted, 1e-4)
    with pytest.raises(ValueError, match="'logits' or 'loss'"):
        lm.score(x, scoring_mode="bits")
    with pytest.raises(ValueError, match="`target_ids`"):
        lm.score(x, scoring_mode="loss")


def with_text(**settings):
    keras_hub = pytest.importorskip("keras_hub")
    words = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġa": 5}
    tokenizer = keras_hub.models.QwenTokenizer(vocabulary=words, merges=["a b", "Ġ a"])
    lm = model(**settings)
    lm.preprocessor = keras_hub.models.QwenCausalLMPreprocessor(tokenizer, sequence_length=8)
    return lm


def test_fit_evaluate_and_predict_on_strings():
    lm = with_text()
    lm.compile("sgd")
    texts = ["ab a", "b", "a a ab", "ab"]
    x, y, weights = lm.preprocessor(texts)
    weights = numpy(weights).astype("float32")
    found = lm.evaluate(texts, batch_size=2, verbose=0)
    x = {name: numpy(value) for name, value in x.items()}
    expected = lm.evaluate(x, numpy(y), sample_weight=weights, batch_size=2, verbose=0)
    assert found == pytest.approx(expected, rel=1e-5)
    history = lm.fit(texts, epochs=2, batch_size=2, validation_data=texts[:2], verbose=0).history
    assert history["loss"][1] < history["loss"][0] and len(history["val_loss"]) == 2
    assert lm.predict(np.array(texts), batch_size=2, verbose=0).shape == (4, 8, 31)
    assert tokenize(lm, "ab a", start=True) == [3, 5], "there is no start token to add"
    with pytest.raises(ValueError, match="leave `y` and weights out"):
        lm.fit(texts, np.zeros(4))
    lm.preprocessor = None
    with pytest.raises(ValueError, match="CausalLMPreprocessor of KerasHub"):
        lm.fit(texts)


# Presets -------------------------------------------------------------------------------------------------------------

READER = """
import sys, numpy as np, keras, keras_fam
from keras_fam.ops.backend import compiled
lm = keras_fam.TransformerFAMCausalLM.from_preset(sys.argv[1])
read = compiled(lambda x: lm(x), lambda: lm.variables)
np.save(sys.argv[2], keras.ops.convert_to_numpy(read(np.load(sys.argv[3]))))
"""


def test_a_folder_holds_the_model_and_its_words(tmp_path):
    layers = [{"fam_gate": -1.0}, {"fam_gate": float("-inf")}]
    update = keras_fam.Average(0.2, learned=True)
    lm = with_text(memory_update=update, fam_query="anchored", layer_settings=layers)
    lm.enable_lora(2)
    shake(lm)
    expected = logits(lm)
    lm.save_to_preset(tmp_path)
    loaded = keras_fam.TransformerFAMCausalLM.from_preset(tmp_path)
    close(logits(loaded), expected, 1e-5)
    assert loaded.lora_layers() == {} and len(loaded.trainable_weights) == len(loaded.weights)
    assert numpy(loaded.preprocessor.tokenizer("ab a")).tolist() == [3, 5]
    assert keras_fam.TransformerFAMCausalLM.from_preset(tmp_path, preprocessor=None).preprocessor is None
    half = keras_fam.TransformerFAMBackbone.from_preset(tmp_path, dtype="bfloat16", blocks_per_step=2)
    assert half.compute_dtype == "bfloat16" and half.blocks_per_step == 2


def test_a_folder_loads_under_another_backend(tmp_path):
    lm = model()
    lm.save_to_preset(tmp_path / "preset")
    np.save(tmp_path / "x.npy", tokens())
    other = {"torch": "jax", "jax": "torch", "tensorflow": "torch"}[keras.backend.backend()]
    command = [sys.executable, "-c", READER, *(str(tmp_path / name) for name in ("preset", "y.npy", "x.npy"))]
    environment = {**os.environ, "KERAS_BACKEND": other, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    close(np.load(tmp_path / "y.npy"), logits(lm), 1e-5)


def test_a_folder_that_is_no_preset_is_refused(tmp_path, monkeypatch):
    load = keras_fam.TransformerFAMCausalLM.from_preset
    with pytest.raises(ValueError, match="is no folder"):
        load(tmp_path / "missing")
    with pytest.raises(ValueError, match="has none"):
        load(tmp_path)
    with_text().save_to_preset(tmp_path)
    with pytest.raises(ValueError, match=r"have no \['fam_lenght'\]"):
        load(tmp_path, fam_lenght=4)
    with pytest.raises(ValueError, match="at most `block_size`"):
        load(tmp_path, block_size=2)
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(ImportError, match=r"keras-fam\[hub\]"):
        load(tmp_path)
    path = tmp_path / "keras_fam.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "format": "keras_fam.preset/9"}))
    with pytest.raises(ValueError, match=r"reads 'keras_fam.preset/2'"):
        load(tmp_path)
    config = {**record["backbone"]["config"], "sparse_heads": 3}
    path.write_text(json.dumps({**record, "backbone": {**record["backbone"], "config": config}}))
    with pytest.raises(ValueError, match="does not know"):
        load(tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path)
    path.write_text(json.dumps(record))
    (tmp_path / "model.weights.h5").unlink()
    with pytest.raises(ValueError, match=r"no model.weights.h5"):
        load(tmp_path)


def test_a_preprocessor_without_a_saver_is_refused(tmp_path):
    lm = model()
    lm.preprocessor = len
    with pytest.raises(ValueError, match="received builtin_function_or_method"):
        lm.save_to_preset(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# What Keras has to know about the input ------------------------------------------------------------------------------


def test_a_built_model_knows_its_input(tmp_path, monkeypatch):
    lm = model(num_layers=1)
    lines = []
    lm.summary(print_fn=lines.append)
    assert "(None, None, 16)" in "\n".join(lines), "the backbone's output shape"
    lm.save_to_preset(tmp_path / "preset")
    loaded = keras_fam.TransformerFAMCausalLM.from_preset(tmp_path / "preset")
    given = []
    monkeypatch.setattr(keras.Model, "export", lambda self, *args, **kwargs: given.append(kwargs["input_signature"]))
    for each in (loaded, loaded.backbone):
        each.export(tmp_path / "x")
    loaded.export(tmp_path / "x", input_signature=["mine"])
    assert [(spec.shape, spec.dtype) for (spec,) in given[:2]] == 2 * [((None, None), "int32")]
    assert given[2] == ["mine"]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Keras writes SavedModels by TensorFlow")
def test_tensorflow_exports_a_model_and_one_around_it(tmp_path):
    import tensorflow as tf

    lm = model(num_layers=1)
    inputs = keras.Input((None,), dtype="int32")
    for i, each in enumerate((lm, keras.Model(inputs, lm(inputs)))):
        each.export(tmp_path / str(i), verbose=False)
        found = tf.saved_model.load(tmp_path / str(i))
        for x in (tokens(), tokens(9, rows=3)):
            close(found.serve(x), logits(lm, x), 1e-6)
