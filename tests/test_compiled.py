"""`jit_compile=True` (XLA on JAX and TensorFlow) and `scan_layers=True` change no result."""

import keras
import numpy as np
import pytest

import keras_fam
from keras_fam.ops.backend import compiled
from keras_fam.ops.programs import programs_of
from keras_fam.streaming.streaming_model import COMPILE_RESET_AFTER

BACKEND = keras.backend.backend()
IDS = np.random.default_rng(0).integers(0, 11, (2, 14)).astype("int32")  # blocks of 4: the last one is not full


TORCH = pytest.mark.skipif(
    BACKEND == "torch", reason="torch.compile breaks graphs at NumPy constants and traces this model for minutes"
)


def model(num_layers=2, **settings):
    keras.utils.set_random_seed(0)
    settings = {"block_size": 4, "memory_segments": 1, "fam_length": 2, "memory_update": "normalized", **settings}
    backbone = keras_fam.TransformerFAMBackbone(11, num_layers, 8, 2, 16, **settings)
    return keras_fam.TransformerFAMCausalLM(backbone)


def losses(jit_compile, **settings):
    lm = model(**settings)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    lm.compile(keras.optimizers.Adam(0.01), loss, jit_compile=jit_compile)
    targets = np.roll(IDS, -1, axis=1)
    found = [float(lm.train_on_batch(IDS, targets, return_dict=True)["loss"]) for _ in range(3)]
    return found, lm.predict_on_batch(IDS)


@TORCH
def test_train_steps_are_the_same_when_compiled():
    if BACKEND == "jax":
        pytest.skip("without `jit`, JAX compiles every operation of a train step: half a minute for this model")
    settings = {"num_layers": 1, "blocks_per_step": 1, "remat": True}
    eager, expected = losses(False, **settings)
    found, outputs = losses(True, **settings)
    np.testing.assert_allclose(found, eager, rtol=1e-5, err_msg=BACKEND)
    np.testing.assert_allclose(outputs, expected, atol=1e-4, err_msg=BACKEND)
    assert eager[2] < eager[0]


@TORCH
def test_streaming_step_compiles_as_one_graph():
    if BACKEND == "jax":
        pytest.skip("every other test of streams runs compiled on JAX")
    lm = model(num_layers=1)
    state = lm.get_initial_state(2)
    ids = keras.ops.convert_to_tensor(IDS[:, :1])
    expected, after = lm.advance(ids, state)
    import tensorflow as tf

    step = tf.function(lm.advance, jit_compile=True)
    outputs, state = step(ids, state)
    pairs = zip(keras.tree.flatten((outputs, state)), keras.tree.flatten((expected, after)), strict=True)
    for ours, theirs in pairs:
        ours, theirs = keras.ops.convert_to_numpy(ours), keras.ops.convert_to_numpy(theirs)
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=BACKEND)


@pytest.mark.parametrize(
    "changes",
    [
        {"initial_fam": "summary", "memory_update": keras_fam.Normalized(noise=0.1), "blocks_per_step": 1},
        {"fam_query": "anchored", "memory_update": keras_fam.HardGate(noise=0.1), "fam_gate": -1.0},
    ],
    ids=["summary", "anchored"],
)
def test_layers_as_a_loop_change_nothing(changes):
    settings = {"dropout": 0.2, "remat": True, **changes}
    expected, outputs = losses(BACKEND == "jax", **settings)
    found, same = losses(BACKEND == "jax", scan_layers=True, **settings)
    np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=BACKEND)
    np.testing.assert_allclose(same, outputs, atol=1e-4, err_msg=BACKEND)


def test_layers_as_a_loop_hand_on_the_same_state():
    found = []
    for scan_layers in (False, True):
        lm = model(scan_layers=scan_layers)
        ids = keras.ops.convert_to_tensor(IDS)
        found.append(keras.tree.flatten(compiled(lm.advance, lambda lm=lm: lm.variables)(ids, lm.get_initial_state(2))))
    for ours, theirs in zip(*found, strict=True):
        ours, theirs = keras.ops.convert_to_numpy(ours), keras.ops.convert_to_numpy(theirs)
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=BACKEND)


def test_layers_as_a_loop_are_equal():
    with pytest.raises(ValueError, match="equal"):
        model(scan_layers=True, layer_settings=[{}, {"memory_segments": 0}])


def test_streams_that_often_start_over():
    """Their state comes from a compiled program then: the same one, of the weights that there are, for any rows."""
    lm = model()
    stream, ids = keras_fam.StreamingModel(lm, batch_size=2), IDS[:, :1]
    for i in range(COMPILE_RESET_AFTER + 2):
        if i == COMPILE_RESET_AFTER + 1:
            for variable in lm.trainable_variables:
                variable.assign(variable.value * 1.5 + 0.01)
            stream.reset_state()
        expected = keras.ops.convert_to_numpy(lm(ids))
        np.testing.assert_allclose(stream.predict(ids, verbose=0), expected, atol=1e-5, err_msg=f"{BACKEND}, start {i}")
        stream.reset_state(rows=[1])
        found = stream.predict(ids, verbose=0)
        np.testing.assert_allclose(found[1], expected[1], atol=1e-5, err_msg=f"{BACKEND}, start {i}")
        assert np.abs(found[0] - expected[0]).max() > 1e-4
        stream.reset_state()
    assert sorted(count for _, count in programs_of(lm).keys("initial_state")) == [1, 2]
