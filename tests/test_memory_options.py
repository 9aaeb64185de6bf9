"""Memory updates and the gate on reading: what they promise beyond agreement with the oracle."""

import numpy as np
import pytest
from keras import ops
from support import HIDDEN_DIM, SMALL, copy_weights, gradients, numpy

import keras_fam
from keras_fam import TransformerFAMBlock

ROWS = np.random.default_rng(0).normal(size=(2, 2, 3, HIDDEN_DIM)).astype("float32")


def built(update):
    update.build((None, *ROWS.shape[2:]))
    return update


def test_a_closed_memory_is_bswa_to_the_bit():
    """Whole blocks, and a few tokens anywhere, whatever the memory holds; it is written all the same."""
    settings = {**SMALL, "attention_sinks": 2}
    closed = TransformerFAMBlock(**settings, fam_gate=float("-inf"), fam_query="anchored", memory_update="hard_gate")
    bswa = TransformerFAMBlock(**{**settings, "fam_length": 0})
    for block in (closed, bswa):
        block.build((None, None, HIDDEN_DIM))
    assert closed.attention.gate_bias is None
    copy_weights(closed, bswa)
    x = np.random.default_rng(1).normal(size=(2, 14, HIDDEN_DIM)).astype("float32")
    ours, theirs = closed.get_initial_state(2), bswa.get_initial_state(2)
    for part in (x[:, :9], x[:, 9:12], x[:, 12:]):
        y, ours = closed.advance(part, ours)
        expected, theirs = bswa.advance(part, theirs)
        np.testing.assert_array_equal(numpy(y), numpy(expected))
        np.testing.assert_array_equal(numpy(ours.layers[0].key), numpy(theirs.layers[0].key))
    assert np.abs(numpy(ours.layers[0].fam) - numpy(closed.get_initial_state(2).layers[0].fam)).max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_learned_gate_closes_at_minus_infinity(dtype):
    """As a weight that training or a user moved there: no NaN, and outputs of the closed memory."""
    settings = {**SMALL, "attention_sinks": 2, "dtype": dtype}
    learned, closed = (TransformerFAMBlock(**settings, fam_gate=gate) for gate in (0.0, float("-inf")))
    for block in (learned, closed):
        block.build((None, None, HIDDEN_DIM))
    copy_weights(learned, closed)
    learned.attention.gate_bias.assign(np.full(learned.attention.gate_bias.shape, -np.inf))
    x = np.random.default_rng(1).normal(size=(2, 13, HIDDEN_DIM)).astype(dtype)
    ours, theirs = learned.get_initial_state(2), closed.get_initial_state(2)
    for part in (x[:, :8], x[:, 8:12], x[:, 12:]):
        y, ours = learned.advance(part, ours)
        expected, theirs = closed.advance(part, theirs)
        np.testing.assert_allclose(numpy(y), numpy(expected), atol=1e-5 if dtype == "float32" else 1e-2)


def test_averages():
    written, previous = ROWS
    for update in (built(keras_fam.Average(0.3)), built(keras_fam.Average(0.3, learned=True))):
        expected = 0.7 * previous + 0.3 * written
        np.testing.assert_allclose(numpy(update.call(*map(ops.convert_to_tensor, ROWS))), expected, atol=1e-6)
    assert update.logit.shape == (3,)
    np.testing.assert_array_equal(
        numpy(update.call(*map(ops.convert_to_tensor, ROWS), fresh=ops.convert_to_tensor([True])))[0], written[0]
    )


def test_rows_are_kept_or_rewritten_to_the_bit():
    """At first the upper half is rewritten, the lower half kept; the gradient is that of a soft gate."""
    update = built(keras_fam.HardGate())
    np.testing.assert_allclose(numpy(update.bias), [-2.0, 0.0, 2.0])
    update.bias.assign([-2.0, 0.5, 2.0])
    written, previous = ROWS
    fam = numpy(update.call(*map(ops.convert_to_tensor, ROWS)))
    np.testing.assert_array_equal(fam[:, 0], previous[:, 0])
    np.testing.assert_array_equal(fam[:, 1:], written[:, 1:])
    found = gradients(lambda w, p: ops.sum(update.call(w, p)), [written, previous, update.bias])
    np.testing.assert_allclose(found[0], np.broadcast_to([[0.0], [1.0], [1.0]], written.shape), atol=1e-6)
    soft = 1 / (1 + np.exp(-np.array([-2.0, 0.5, 2.0])))
    expected = (soft * (1 - soft) * (written - previous).sum(-1)).sum(0)
    np.testing.assert_allclose(found[2], expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["average", "hard_gate"])
def test_names_stand_for_the_defaults(name):
    settings = {**SMALL, "memory_update": {"average": keras_fam.Average(), "hard_gate": keras_fam.HardGate()}[name]}
    assert TransformerFAMBlock(**settings).get_config()["memory_update"] == name
    settings["memory_update"] = keras_fam.Average(0.25)
    again = TransformerFAMBlock.from_config(TransformerFAMBlock(**settings).get_config())
    assert again.attention.memory_update.weight == 0.25
