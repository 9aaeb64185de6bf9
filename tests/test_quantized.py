"""Quantized models are saved, loaded and copied as they are; what Keras' modes cannot do here is refused."""

import copy
import json

import keras
import numpy as np
import pytest
from keras import ops
from support import numpy, quick_compile, tiny

import keras_fam
from keras_fam.layers.quantization import quantized_sublayers
from keras_fam.ops.backend import compiled

MODES = ("int8", "int4", "float8")
SETTINGS = {"block_size": 4, "memory_segments": 1, "fam_length": 2, "attention_sinks": 2}


def functional(mode=None):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((None, 8))
    block = keras_fam.TransformerFAMBlock(2, 4, 12, query_key_norm="rms_norm", **SETTINGS)
    model = keras.Model(inputs, keras.layers.Dense(3)(block(inputs)))
    if mode is not None:
        model.quantize(mode)
    return model


def outputs(model, x):
    return numpy(compiled(lambda x: model(x), lambda: model.variables)(ops.convert_to_tensor(x)))


def same(found, expected):
    """Same layers in the same modes, and the same weights to the bit."""
    assert quantized_sublayers(expected) != {}
    assert json.dumps(quantized_sublayers(found)) == json.dumps(quantized_sublayers(expected))
    pairs = zip(*(sorted(m.weights, key=lambda v: v.path.split("/")[-2:]) for m in (found, expected)), strict=True)
    for a, b in pairs:  # float8 makes the variables of a layer in another order when it is loaded
        assert (a.name, a.dtype) == (b.name, b.dtype) and np.array_equal(numpy(a), numpy(b)), a.path


@pytest.mark.parametrize("mode", MODES)
def test_a_model_with_a_quantized_block_is_saved_loaded_and_copied(mode, tmp_path):
    model = functional(mode)
    assert {part["mode"] for part in quantized_sublayers(model).values()} == {mode}
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    same(loaded, model)
    same(copy.deepcopy(model), model)
    same(copy.deepcopy(model.layers[1]), model.layers[1])
    x = np.random.default_rng(0).normal(size=(2, 10, 8)).astype("float32")
    assert np.array_equal(outputs(loaded, x), outputs(model, x))


@pytest.mark.parametrize("mode", MODES)
def test_a_quantized_language_model_is_saved_loaded_and_copied(mode, tmp_path):
    lm = tiny()
    lm.quantize(mode, filters="^(query|up)$" if mode == "int4" else None)
    lm.save(tmp_path / "lm.keras")
    same(keras.saving.load_model(tmp_path / "lm.keras"), lm)
    same(copy.deepcopy(lm), lm)
    lm.save_to_preset(tmp_path / "preset")
    same(keras_fam.TransformerFAMCausalLM.from_preset(tmp_path / "preset"), lm)
    if mode == "int4":
        assert len(quantized_sublayers(lm)) == 2, "the filter is part of what is kept"


@pytest.mark.parametrize("mode", ("gptq", "awq"))
def test_calibrated_modes_are_refused_and_change_nothing(mode):
    lm = tiny()
    make = keras.quantizers.GPTQConfig if mode == "gptq" else keras.quantizers.AWQConfig
    config = make(dataset=["a"], tokenizer=lambda text: [1])
    for model in (lm, lm.backbone):
        with pytest.raises(ValueError, match=f"cannot be quantized by '{mode}'.*Use 'int8' or 'int4'"):
            model.quantize(mode, config=config)
    assert quantized_sublayers(lm) == {}


def test_float8_reads_and_is_not_trained():
    lm = tiny()
    x = np.arange(12, dtype="int32").reshape(2, 6) % 11
    expected = outputs(lm, x)
    lm.quantize("float8")
    found = outputs(lm, x)
    assert 0 < np.abs(found - expected).max() < 0.15 * np.abs(expected).max()
    before = [numpy(v).copy() for v in lm.weights]
    quick_compile(lm)
    with pytest.raises(ValueError, match="float8 and cannot be trained"):
        lm.train_on_batch(x, x)
    stream = keras_fam.StreamingModel(lm, 2)
    stream.compile("sgd")
    with pytest.raises(ValueError, match="float8 and cannot be trained"):
        stream.train_on_batch(x, x)
    block = functional("float8")
    block.compile("sgd", "mse")
    with pytest.raises(ValueError, match="float8 and cannot be trained"):
        block.train_on_batch(np.zeros((2, 4, 8), "float32"), np.zeros((2, 4, 3), "float32"))
    assert all(np.array_equal(numpy(v), b) for v, b in zip(lm.weights, before, strict=True))
    assert np.isfinite(lm.evaluate(x, x, verbose=0)[0])
