"""Token ids outside the vocabulary: an error wherever values can be read, and no trace in a state where they cannot."""

import keras
import numpy as np
import pytest
import support
from keras import ops

import keras_fam
from keras_fam.ops.backend import compiled

V = support.TINY_VOCABULARY
GOOD = np.array([[3, 1, 4, 1], [5, 9, 2, 6]])


@pytest.fixture(scope="module")
def lm():
    lm = support.tiny()
    support.quick_compile(lm)
    return lm


def held(stream):
    return [support.numpy(x) for x in [*keras.tree.flatten(stream.state), stream.next_logits, stream.position]]


@pytest.mark.parametrize("wrong", [-1, V, 2**31 + 3], ids=["negative", "V", "wide"])
def test_every_entry_refuses_ids_that_can_be_read(lm, wrong):
    bad = GOOD.astype("int64")
    bad[1, 2] = wrong
    stream = keras_fam.StreamingModel(lm, 2)
    stream.predict(GOOD)
    before, weights = held(stream), [support.numpy(w) for w in lm.weights]
    narrow = bad.clip(max=V)  # Keras narrows what a call receives to int32 first
    entries = {
        "predict": lambda: stream.predict(bad),
        "predict, tensor": lambda: stream.predict(ops.convert_to_tensor(narrow)),
        "generate": lambda: stream.generate(bad, max_new_tokens=2),
        "generate, lists": lambda: stream.generate(bad.tolist(), max_new_tokens=2),
        "generate_stream": lambda: stream.generate_stream(bad, max_new_tokens=2),
        "stream.fit": lambda: stream.fit(bad, GOOD, verbose=0),
        "stream.fit, validation": lambda: stream.fit(GOOD, GOOD, validation_data=(bad, GOOD), verbose=0),
        "stream.fit, list": lambda: stream.fit([(GOOD, GOOD), (bad.tolist(), GOOD)], verbose=0),
        "stream.evaluate": lambda: stream.evaluate(bad, GOOD, verbose=0),
        "stream.train_on_batch": lambda: stream.train_on_batch({"token_ids": bad, "lengths": np.array([4, 3])}, GOOD),
        "call": lambda: lm(narrow),
        "call, mask": lambda: lm({"token_ids": narrow, "padding_mask": np.ones((2, 4), "bool")}),
        "backbone": lambda: lm.backbone(narrow),
        "advance": lambda: lm.advance(bad, lm.get_initial_state(2)),
        "lm.predict": lambda: lm.predict(bad, verbose=0),
        "backbone.predict": lambda: lm.backbone.predict(bad, verbose=0),
        "lm.predict_on_batch": lambda: lm.predict_on_batch(bad),
        "lm.fit": lambda: lm.fit(bad, GOOD, verbose=0),
        "lm.fit, dict": lambda: lm.fit({"token_ids": bad, "padding_mask": np.ones((2, 4), "bool")}, GOOD, verbose=0),
        "lm.evaluate": lambda: lm.evaluate(bad, GOOD, verbose=0),
        "lm.train_on_batch": lambda: lm.train_on_batch(bad, GOOD),
        "lm.test_on_batch": lambda: lm.test_on_batch(bad, GOOD),
        "lm.score": lambda: lm.score(narrow),
        "lm.score, targets": lambda: lm.score(GOOD, scoring_mode="loss", target_ids=bad),
        "lm.generate": lambda: lm.generate(bad.tolist(), max_length=6, stop_token_ids=None),
        "scorer": lambda: keras_fam.StreamScorer(lm).score(np.tile(bad, 2)),
        "statistics": lambda: keras_fam.memory_statistics(lm, np.tile(bad, 2)),
    }
    for name, use in entries.items():
        with pytest.raises(ValueError, match=rf"Token ids must be from 0 to {V - 1}; received"):
            use()
            pytest.fail(f"{keras.backend.backend()}: {name} accepts {wrong}")
    for a, b in zip(held(stream), before, strict=True):
        np.testing.assert_array_equal(a, b)
    for weight, value in zip(lm.weights, weights, strict=True):
        np.testing.assert_array_equal(support.numpy(weight), value)


def test_iterators_are_checked_as_they_are_read(lm):
    """On TensorFlow, Keras reads them in a pipeline, whose errors are its own."""
    stream = keras_fam.StreamingModel(lm, 2)
    stream.predict(GOOD)
    before = held(stream)
    with pytest.raises(Exception, match="Token ids must be from 0"):
        stream.fit(iter([(GOOD, GOOD), (np.where(GOOD == 1, V, GOOD), GOOD)]), verbose=0)
    for a, b in zip(held(stream), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_ended_rows_are_not_read_as_a_token(lm):
    stream = keras_fam.StreamingModel(lm, 2)
    first = stream.generate(GOOD, max_new_tokens=1)[0][0]
    stream.reset_state()
    steps = list(stream.generate_stream(GOOD[[0, 1]], max_new_tokens=3, stop_token_ids=[first]))
    ended = np.flatnonzero(steps[1] < 0)
    assert len(ended)
    with pytest.raises(ValueError, match=r"−1 in `generate_stream`.*`lengths` 0"):
        stream.predict(steps[1][:, None])
    lengths = (steps[1] >= 0).astype("int32")
    assert stream.predict(steps[1][:, None], lengths=lengths)[ended[0]].max() == 0.0


def test_padding_may_hold_any_number(lm):
    state = lm.get_initial_state(2)
    padded = GOOD.copy()
    padded[1, 2:] = -1
    found, _ = lm.advance(padded, state, lengths=np.array([4, 2]))
    expected, _ = lm.advance(GOOD, state, lengths=np.array([4, 2]))
    np.testing.assert_array_equal(support.numpy(found), support.numpy(expected))
    mask = padded >= 0
    padded[1, 2:] = V
    np.testing.assert_array_equal(
        support.numpy(lm(padded, padding_mask=mask)), support.numpy(lm(GOOD, padding_mask=mask))
    )
    stream = keras_fam.StreamingModel(lm, 2)
    assert np.isfinite(stream.predict(padded, lengths=[4, 2])).all()
    with pytest.raises(ValueError, match="Token ids"):
        stream.predict(padded, lengths=[4, 3])


def test_compiled_programs_keep_ids_inside_the_vocabulary(lm):
    """Outputs and state are those of the nearest id inside: nothing wraps around, and nothing is NaN."""

    def read(ids, state):
        if keras.backend.backend() == "torch":  # its programs run eagerly, and `advance` would refuse
            return lm.backbone.embed(ids), state
        return lm.advance(ids, state)

    advance = compiled(read, lambda: lm.variables)
    for wrong, nearest in ((-1, 0), (V, V - 1), (-(2**31), 0), (2**31 - 1, V - 1)):
        bad, good = (np.where(GOOD == 1, value, GOOD).astype("int32") for value in (wrong, nearest))
        outputs, state = advance(ops.convert_to_tensor(bad), lm.get_initial_state(2))
        expected, wanted = advance(ops.convert_to_tensor(good), lm.get_initial_state(2))
        np.testing.assert_array_equal(support.numpy(outputs), support.numpy(expected))
        for a, b in zip(keras.tree.flatten(state), keras.tree.flatten(wanted), strict=True):
            np.testing.assert_array_equal(support.numpy(a), support.numpy(b))
        assert np.isfinite(support.numpy(outputs)).all()


def test_training_on_a_dataset_stays_finite(lm):
    """Batches of a dataset are seen by compiled steps alone."""

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return np.where(GOOD == 1, V, GOOD).astype("int32"), GOOD

    if keras.backend.backend() == "torch":  # steps run eagerly, and values can be read
        with pytest.raises(ValueError, match="Token ids"):
            lm.fit(Batches(), verbose=0)
        return
    assert np.isfinite(lm.fit(Batches(), verbose=0).history["loss"]).all()
    assert all(np.isfinite(support.numpy(w)).all() for w in lm.weights)
