"""Copies and pickles of streams, states, models and stateful layers."""

import copy
import pickle

import numpy as np
import pytest
import support
from support import SPLIT, close, numpy

import keras_fam

IDS = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 1, 2, 3]])
WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


@pytest.fixture(scope="module")
def lm():
    return support.tiny()


@pytest.mark.parametrize("way", WAYS)
def test_a_copied_stream_goes_on_by_itself(lm, way):
    stream = keras_fam.StreamingModel(lm, 2)
    stream.predict(IDS, lengths=[6, 5])
    expected = copy.copy(stream).predict(IDS[:, :3])
    new = WAYS[way](stream)
    assert type(new) is keras_fam.StreamingModel and new.position.tolist() == [6, 5]
    assert (new.model is lm) == (way == "copy")
    close(new.next_logits, stream.next_logits, 0.0)
    close(new.predict(IDS[:, :3]), expected, SPLIT)
    assert new.position.tolist() == [9, 8] and stream.position.tolist() == [6, 5]
    close(stream.predict(IDS[:, :3]), expected, SPLIT)
    assert new.generate(max_new_tokens=3) == stream.generate(max_new_tokens=3)
    assert new._lock is not stream._lock


def test_a_deep_copy_runs_with_its_own_weights(lm):
    stream = keras_fam.StreamingModel(lm, 2)
    before = stream.predict(IDS)  # its programs are compiled
    new = copy.deepcopy(stream)
    for weight in new.model.weights:
        weight.assign(weight * 2.0)
    new.reset_state()
    stream.reset_state()
    close(new.predict(IDS), numpy(new.model(IDS)), SPLIT)
    close(stream.predict(IDS), before, SPLIT)
    assert support.relative(new.model(IDS), before) > 0.1
    first, second = copy.deepcopy([keras_fam.StreamingModel(lm, 1), keras_fam.StreamingModel(lm, 2)])
    assert first.model is second.model is not lm


def test_streams_of_a_layer():
    block = support.make("fam")[0]
    x = np.random.default_rng(0).normal(size=(1, 5, support.HIDDEN_DIM)).astype("float32")
    stream = keras_fam.StreamingModel(block, 1)
    stream.predict(x)
    found = [WAYS[way](stream).predict(x) for way in WAYS]
    expected = stream.predict(x)
    for way, outputs in zip(WAYS, found, strict=True):
        close(outputs, expected, SPLIT)
        assert WAYS[way](stream).next_logits == ()


def test_a_stream_that_trains_is_not_copied(lm):
    stream = keras_fam.StreamingModel(copy.deepcopy(lm), 2)
    stream.compile("sgd")
    for way, what in (("copy", "copied"), ("deepcopy", "copied"), ("pickle", "pickled")):
        with pytest.raises(TypeError, match=f"cannot be {what}.*optimizer.*set_state"):
            WAYS[way](stream)


def test_states(lm):
    stream = keras_fam.StreamingModel(lm, 2)
    stream.predict(IDS)
    for state in (stream.state, lm.get_initial_state(2)):
        for way in WAYS.values():
            new = way(state)
            assert type(new) is keras_fam.StreamState
            support.states_close(new, state, 0.0)


def test_models_with_their_sampler_and_optimizer():
    lm = support.tiny()
    support.quick_compile(lm)
    lm.sampler = "greedy"
    lm.train_on_batch(IDS, IDS)
    keras_fam.StreamingModel(lm, 2).predict(IDS)
    expected = lm(IDS)
    for way in WAYS.values():
        new = way(lm)
        close(new(IDS), expected, 0.0)
        assert new.sampler == "greedy" and int(numpy(new.optimizer.iterations)) == 1
    new.train_on_batch(IDS, IDS)
    assert support.relative(new(IDS), lm(IDS)) > 1e-4
    close(keras_fam.StreamingModel(new, 2).predict(IDS), numpy(new(IDS)), SPLIT)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_stateful_layers_are_copied_with_weights_and_reset_rows(way):
    """As files hold them, and as Keras copies its stateful layers: a stream is no weight."""
    block = keras_fam.TransformerFAMBlock(2, 4, 8, block_size=4, memory_segments=1, fam_length=2, stateful=True)
    x = np.random.default_rng(0).normal(size=(1, 6, 8)).astype("float32")
    first = numpy(block(x))
    new = WAYS[way](block)
    close(new(x), first, SPLIT)
    second = numpy(block(x))
    assert support.relative(second, first) > 1e-3
    close(new(x), second, SPLIT)
