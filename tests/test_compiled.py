"""`jit_compile=True` (XLA on JAX and TensorFlow, `torch.compile` on torch) changes no result."""

import functools

import keras
import numpy as np
import pytest

import keras_fam

BACKEND = keras.backend.backend()
IDS = np.random.default_rng(0).integers(0, 11, (2, 14)).astype("int32")  # blocks of 4: the last one is not full


@pytest.fixture
def graphs(monkeypatch):
    """On torch: graphs are captured and their gradients traced, but no C++ is generated, which takes minutes."""
    if BACKEND == "torch":
        import torch

        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def model(**settings):
    keras.utils.set_random_seed(0)
    backbone = keras_fam.TransformerFAMBackbone(
        11, 2, 8, 2, 16, block_size=4, memory_segments=1, fam_length=2, fam_feedback="normalized", **settings
    )
    return keras_fam.TransformerFAMCausalLM(backbone)


def losses(jit_compile, **settings):
    lm = model(**settings)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    lm.compile(keras.optimizers.Adam(0.01), loss, jit_compile=jit_compile)
    targets = np.roll(IDS, -1, axis=1)
    found = [float(lm.train_on_batch(IDS, targets)) for _ in range(3)]
    return found, lm.predict_on_batch(IDS)


@pytest.mark.parametrize("settings", [{}, {"blocks_per_step": 1, "remat": True}], ids=["whole", "remat"])
def test_train_steps_are_the_same_when_compiled(graphs, settings):
    eager, expected = losses(False, **settings)
    compiled, outputs = losses(True, **settings)
    np.testing.assert_allclose(compiled, eager, rtol=1e-5, err_msg=BACKEND)
    np.testing.assert_allclose(outputs, expected, atol=1e-4, err_msg=BACKEND)
    assert eager[2] < eager[0]


def test_streaming_step_compiles_as_one_graph():
    lm = model()
    state = lm.get_initial_state(2)
    ids = keras.ops.convert_to_tensor(IDS[:, :1])
    expected, after = lm.advance(ids, state)
    if BACKEND == "jax":
        import jax

        step = jax.jit(lm.advance)
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        step = tf.function(lm.advance, jit_compile=True)
    else:
        import torch

        step = torch.no_grad()(torch.compile(lm.advance, backend="aot_eager", fullgraph=True))
    outputs, state = step(ids, state)
    pairs = zip(keras.tree.flatten((outputs, state)), keras.tree.flatten((expected, after)), strict=True)
    for ours, theirs in pairs:
        ours, theirs = keras.ops.convert_to_numpy(ours), keras.ops.convert_to_numpy(theirs)
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=BACKEND)
