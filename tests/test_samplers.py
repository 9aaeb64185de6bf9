"""The package's own samplers: what they may choose, how often, and what their seeds promise."""

import sys

import keras
import numpy as np
import pytest
import support
from keras import ops

import keras_fam
from keras_fam.ops.backend import compiled
from keras_fam.ops.random import fold_in
from keras_fam.streaming.generation import find_sampler

BACKEND = keras.backend.backend()
LOGITS = np.log(np.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.15, 0.25, 0.5]]))
DRAWS = 2000
samplers = keras_fam.samplers


def frequencies(sampler, seed=0):
    """How often each of four tokens is drawn for the rows of `LOGITS`, of `DRAWS` draws."""
    rows = np.repeat(LOGITS, DRAWS, axis=0).astype("float32")
    token = compiled(sampler.choose, list)(
        ops.convert_to_tensor(rows), ops.convert_to_tensor(np.array([seed, 0], "int32"))
    )
    assert keras.backend.standardize_dtype(token.dtype) == "int32"
    token = support.numpy(token).reshape(2, DRAWS)
    return np.stack([(token == i).mean(axis=1) for i in range(4)], axis=1)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (samplers.GreedySampler(), [1, 0, 0, 0]),
        (samplers.RandomSampler(), [0.5, 0.25, 0.15, 0.1]),
        (samplers.RandomSampler(temperature=0.5), [0.725, 0.181, 0.065, 0.029]),
        (samplers.TopKSampler(k=2), [2 / 3, 1 / 3, 0, 0]),
        (samplers.TopKSampler(k=9), [0.5, 0.25, 0.15, 0.1]),
        (samplers.TopPSampler(p=0.7), [2 / 3, 1 / 3, 0, 0]),
        (samplers.TopPSampler(p=0.8), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        (samplers.TopPSampler(p=0.3), [1, 0, 0, 0]),
        (samplers.TopPSampler(p=1.0, k=2), [2 / 3, 1 / 3, 0, 0]),
        (samplers.TopPSampler(p=0.7, temperature=0.5), [1, 0, 0, 0]),  # the first has 0.725
    ],
    ids=str,
)
def test_tokens_are_as_likely_as_they_should_be(sampler, expected):
    found = frequencies(sampler)
    for row, wanted in zip(found, (expected, expected[::-1]), strict=True):
        spread = 4 * np.sqrt(np.array(wanted) * (1 - np.array(wanted)) / DRAWS)  # 0 where a token cannot be drawn
        assert (np.abs(row - wanted) <= spread + 5e-4 * (spread > 0)).all(), f"{BACKEND}: {row} for {wanted}"


def test_seeds_of_successive_tokens_differ():
    sampler, rows = samplers.RandomSampler(), ops.zeros((1, 50))
    seeds = [fold_in(ops.convert_to_tensor(np.array([3, 0], "int32")), i) for i in range(12)]
    tokens = [int(support.numpy(sampler.choose(rows, seed))[0]) for seed in seeds]
    assert len(set(tokens)) > 6, BACKEND
    assert tokens == [int(support.numpy(sampler.choose(rows, seed))[0]) for seed in seeds]


def test_the_best_of_one_is_greedy():
    logits = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(50, 30)).astype("float32"))
    seed = ops.convert_to_tensor(np.array([1, 0], "int32"))
    best = support.numpy(samplers.GreedySampler().choose(logits, seed))
    assert best.tolist() == support.numpy(logits).argmax(axis=1).tolist()
    for sampler in (samplers.TopKSampler(1), samplers.TopPSampler(1e-6), samplers.TopKSampler(temperature=1e-4)):
        assert support.numpy(sampler.choose(logits, seed)).tolist() == best.tolist(), sampler


def test_names_configs_and_objects():
    assert isinstance(find_sampler("greedy"), samplers.GreedySampler)
    assert find_sampler("top_k").get_config() == {"k": 5, "temperature": 1.0, "seed": None}
    assert find_sampler("top_p").get_config() == {"p": 0.1, "k": None, "temperature": 1.0, "seed": None}
    assert isinstance(find_sampler("random"), samplers.RandomSampler)
    for sampler in (
        samplers.TopKSampler(3, temperature=0.5, seed=9),
        samplers.TopPSampler(0.5, 7),
        find_sampler("greedy"),
    ):
        again = find_sampler(keras.saving.serialize_keras_object(sampler))
        assert (
            type(again) is type(sampler) and again.get_config() == sampler.get_config() and str(again) == str(sampler)
        )
    assert find_sampler({"class_name": "top_k", "config": {"k": 2}}).k == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: samplers.TopKSampler(0), "`k` must be a positive integer"),
        (lambda: samplers.TopKSampler(2.5), "`k` must be a positive integer"),
        (lambda: samplers.TopPSampler(0), "`p` must be a probability"),
        (lambda: samplers.TopPSampler(1.5), "`p` must be a probability"),
        (lambda: samplers.RandomSampler(temperature=0), "`temperature` must be a positive number.*greedy"),
        (lambda: samplers.RandomSampler(temperature=float("nan")), "`temperature` must be a positive number"),
        (lambda: samplers.RandomSampler(seed=-1), "`seed` must be an integer"),
        (lambda: samplers.RandomSampler(seed=True), "`seed` must be an integer"),
        (lambda: find_sampler("nonsense"), "greedy, random, top_k, top_p, beam, contrastive; received 'nonsense'"),
    ],
)
def test_arguments_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_generation_needs_no_keras_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    lm = support.tiny()
    stream = keras_fam.StreamingModel(lm, 2)
    first = stream.generate([[1, 2, 3], [4]], max_new_tokens=6)
    assert [len(row) for row in first] == [6, 6]
    lm.compile(sampler=samplers.TopKSampler(1))
    again = lm.generate([[1, 2, 3], [4]], max_length=7, stop_token_ids=None, strip_prompt=True)
    assert [row[:3] for row in again] == [row[:3] for row in first]
    for name in ("beam", "contrastive"):
        with pytest.raises(ImportError, match=r"keras-fam\[hub\].*greedy, random, top_k, top_p"):
            stream.generate(max_new_tokens=2, sampler=name)


def test_seeds_that_a_call_did_not_use():
    """A sampler's draws go on from call to call; a failed call gives its own back."""
    lm = support.tiny()
    sampler = samplers.RandomSampler(seed=5, temperature=20.0)
    stream = keras_fam.StreamingModel(lm, 1)

    def draw(**options):
        stream.reset_state()
        return stream.generate([[1, 2]], max_new_tokens=12, sampler=sampler, **options)

    first, second = draw(), draw()
    assert first != second
    sampler = samplers.RandomSampler(seed=5, temperature=20.0)
    with pytest.raises(ValueError, match="Token ids"):
        stream.generate([[99]], max_new_tokens=12, sampler=sampler)
    assert draw(seed=8) == draw(seed=8)  # for that call alone
    assert [draw(), draw()] == [first, second]


class Forbid(samplers.Sampler):
    """A sampler of the user's own, as in the docstring of the base."""

    def __init__(self, token, **kwargs):
        super().__init__(**kwargs)
        self.token = token

    def choose(self, logits, seed):
        unwanted = ops.arange(logits.shape[1]) == self.token
        return self.draw(ops.where(unwanted, -float("inf"), logits), seed)


def test_a_sampler_of_ones_own():
    lm = support.tiny()
    stream = keras_fam.StreamingModel(lm, 1)
    plain = stream.generate([[1, 2]], max_new_tokens=40, sampler=samplers.RandomSampler(temperature=20.0), seed=1)[0]
    stream.reset_state()
    found = stream.generate([[1, 2]], max_new_tokens=40, sampler=Forbid(plain[0], temperature=20.0), seed=1)[0]
    assert plain[0] not in found and len(set(found)) > 3


def test_the_sampler_is_part_of_a_compiled_model(tmp_path):
    lm = support.tiny()
    lm.compile("sgd", sampler=samplers.TopPSampler(0.3, temperature=2.0, seed=4))
    lm.save(tmp_path / "lm.keras")
    again = keras.saving.load_model(tmp_path / "lm.keras")
    assert find_sampler(again.sampler).get_config() == lm.sampler.get_config()
