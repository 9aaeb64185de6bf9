"""Distillation against NumPy; a model that equals its teacher; weights of tokens by what long context is worth."""

import keras
import numpy as np
import pytest
from keras import ops
from support import TINY_VOCABULARY, call, close, numpy, tiny

import keras_fam
from keras_fam.ops.backend import value_and_gradient
from keras_fam.training.distillation import shared_weights

V = TINY_VOCABULARY
RNG = np.random.default_rng(0)
STUDENT, TEACHER = (2 * RNG.normal(size=(2, 3, V)).astype("float32") for _ in range(2))


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_are_those_of_the_formula(temperature):
    p, q = softmax(TEACHER.astype("float64") / temperature), softmax(STUDENT.astype("float64") / temperature)
    expected = (p * (np.log(p) - np.log(q))).sum(-1)
    close(keras_fam.training.forward_kl(STUDENT, TEACHER, temperature), expected, 1e-5)
    value, gradient = value_and_gradient(
        lambda x: ops.sum(keras_fam.training.forward_kl(x, ops.convert_to_tensor(TEACHER), temperature)), STUDENT
    )
    close(value, expected.sum(), 1e-5)
    close(gradient, (q - p) / temperature, 1e-5)
    loss = keras_fam.training.ForwardKL(temperature, weight=0.5)
    loss = keras.losses.deserialize(keras.losses.serialize(loss))
    close(loss(TEACHER, STUDENT), 0.5 * expected.mean(), 1e-5)
    with pytest.raises(ValueError, match="temperature"):
        keras_fam.training.forward_kl(STUDENT, TEACHER, 0.0)


def test_top_probabilities_count_the_others_as_one():
    p, q = softmax(TEACHER.astype("float64")), softmax(STUDENT.astype("float64"))
    token_ids, logs = keras_fam.training.top_probabilities(TEACHER, 4)
    order = np.argsort(-p, axis=-1)[..., :4]
    assert np.array_equal(np.sort(numpy(token_ids)), np.sort(order))
    kept = [np.take_along_axis(x, order, axis=-1) for x in (p, q)]
    a, b = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], axis=-1) for x in kept)
    expected = (a * (np.log(a) - np.log(b))).sum(-1)
    close(keras_fam.training.forward_kl(STUDENT, (token_ids, logs)), expected, 1e-4)
    whole = numpy(keras_fam.training.forward_kl(STUDENT, TEACHER))
    assert (expected <= whole + 1e-6).all()
    close(keras_fam.training.forward_kl(TEACHER, (token_ids, logs)), np.zeros((2, 3)), 1e-5)


def test_a_model_within_one_block_equals_its_teacher():
    """Full attention is the streaming model's own within a block, and another beyond its window."""
    lm = tiny(2, fam_length=2, initial_fam="summary", attention_sinks=1)
    lm.enable_lora(2)
    teacher = keras_fam.training.full_attention(lm, 20)
    assert teacher.backbone.get_config()["memory_segments"] == 4 and not teacher.trainable_variables
    ids = np.random.default_rng(1).integers(0, V, (2, 20))
    ours, theirs = numpy(call(lm, ids)), numpy(call(teacher, ids))
    nats = numpy(keras_fam.training.forward_kl(ours, theirs))
    assert np.abs(nats[:, :4]).max() < 1e-6 < 1e-4 < nats[:, 12:].max()
    # Full attention: one block that holds the whole text, with the same weights.
    wide = tiny(2, fam_length=0, block_size=20, memory_segments=0)
    for (_, source), (variable, _) in zip(shared_weights(teacher, lm), shared_weights(wide, lm), strict=True):
        variable.assign(source.value)
    close(theirs, numpy(call(wide, ids)), 1e-5)
    base = keras_fam.training.full_attention(lm, 0, memory_segments=1, attention_sinks=1)
    config = base.backbone.get_config()
    assert (config["memory_segments"], config["attention_sinks"], base.fam_length) == (1, 1, 0)


def test_training_brings_a_model_nearer_to_its_teacher():
    lm = tiny(1, fam_length=2)
    ids = np.random.default_rng(2).integers(0, V, (4, 16))
    targets = keras_fam.training.full_attention(lm, 16).predict(ids, verbose=0)
    lm.compile(keras.optimizers.Adam(0.01), loss=keras_fam.training.ForwardKL(), weighted_metrics=None)
    losses = lm.fit(ids, targets, batch_size=4, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]


def test_quantized_models_have_no_teacher():
    lm = tiny(1)
    lm.quantize("int8")
    with pytest.raises(ValueError, match=r"not quantized; .* Make the teacher before `quantize`"):
        keras_fam.training.full_attention(lm, 8)


def test_weights_are_what_long_context_is_worth():
    weights = keras_fam.data.long_context_weights([3.0, 2.0, 5.0, 9.0], [3.1, 1.0, 2.0, 1.0])
    assert weights.dtype == np.float32
    assert np.allclose(weights, np.array([0, 1, 3, 4]) / 2)
    for short, long in (([1.0], [1.0, 2.0]), ([np.nan], [1.0]), ([1.0], [2.0])):
        with pytest.raises(ValueError):
            keras_fam.data.long_context_weights(short, long)
    with pytest.raises(ValueError, match="limit"):
        keras_fam.data.long_context_weights([2.0], [1.0], limit=0)
    prose = keras_fam.tasks.Prose(np.arange(4), [2, 4], weights)
    task = keras_fam.tasks.ProseTask(prose, lambda text: [0], keras_fam.tasks.Book(weight=0.5))
    text = task.text(4, seed=0)
    assert np.allclose(text.weights, 0.5 * weights[text.token_ids])
