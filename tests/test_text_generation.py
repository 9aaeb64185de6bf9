"""Text in and out of generation: pieces as they come, prompts of any length, strings in every form."""

import functools
import types

import keras
import numpy as np
import pytest
import support

import keras_fam
from keras_fam.streaming.text import TextPieces, as_texts, detokenize, is_one_text, tokenize

keras_hub = pytest.importorskip("keras_hub")

BACKEND = keras.backend.backend()
TOKENS = [
    "<|endoftext|>",
    *"abcdefg",
    "ab",
    "Ã",
    "©",
]  # the last two: é in bytes, as GPT-2 writes it
SEQUENCE_LENGTH = 12


@functools.cache
def text_model():
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary={token: i for i, token in enumerate(TOKENS)}, merges=["a b"])
    lm = support.tiny(tie_weights=False)
    lm.preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=SEQUENCE_LENGTH)
    rng = np.random.default_rng(5)
    for weight in lm.weights:
        weight.assign(rng.normal(size=weight.shape) * (0.8 if len(weight.shape) > 1 else 0.2))
    return lm


class Words:
    """A tokenizer that writes a space between words, and none before the first."""

    def __init__(self, words):
        self.words = words

    def detokenize(self, ids):
        return " ".join(self.words[i] for i in ids)


class Bytes:
    """A tokenizer of bytes, whose text has what it cannot read as U+FFFD (`replace`), or left out (`ignore`)."""

    def __init__(self, tokens, errors):
        self.tokens, self.errors = tokens, errors

    def detokenize(self, ids):
        return b"".join(self.tokens[i] for i in ids).decode(errors=self.errors)


def model_of(tokenizer):
    return types.SimpleNamespace(preprocessor=types.SimpleNamespace(tokenizer=tokenizer), name="model")


@pytest.mark.parametrize("errors", ["replace", "ignore"])
def test_pieces_are_whole_characters(errors):
    text = "aé€😀 b€"
    raw = text.encode()
    for cuts in ([*range(1, len(raw))], [2, 5, 7, 9], [1, 4, 8, 10, 12], [3], [6, 8]):
        parts = [raw[i:j] for i, j in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        pieces = TextPieces(model_of(Bytes(parts, errors)))
        found = [pieces.add(i) for i in range(len(parts))]
        assert "".join(found) == text and pieces.finish() == ""
        assert "\ufffd" not in "".join(found)
    assert TextPieces(model_of(Bytes([b"a"], errors))).finish() == ""


def test_bytes_that_are_no_character_are_not_held_back_for_good():
    tokens = [b"\xff", b"a"]
    pieces = TextPieces(model_of(Bytes(tokens, "replace")))
    found = [pieces.add(0) for _ in range(6)]
    assert "".join(found) == "\ufffd" * 3
    assert "".join([*found, pieces.add(1), pieces.finish()]) == "\ufffd" * 6 + "a"


def test_pieces_of_words():
    pieces = TextPieces(model_of(Words(["once", "upon", "a", "time"])))
    assert [pieces.add(i) for i in range(4)] == ["once", " upon", " a", " time"]


def test_pieces_of_a_stream_are_the_text_of_generate():
    lm = text_model()
    stream = keras_fam.StreamingModel(lm, 2)
    options = {"max_new_tokens": 16, "sampler": keras_fam.samplers.RandomSampler(temperature=20.0), "seed": 2}
    expected = stream.generate(["aé", "b"], **options)
    stream.reset_state()
    pieces = list(stream.generate_stream(["aé", "b"], **options))
    assert all(isinstance(row, list) and len(row) == 2 for row in pieces) and len(pieces) > 4
    assert ["".join(rows) for rows in zip(*pieces, strict=True)] == expected
    assert stream.position.tolist() == [1 + 3 + 16, 1 + 1 + 16]
    single = keras_fam.StreamingModel(lm, 1)
    stops = tokenize(lm, "c")
    text = single.generate("a", stop_token_ids=stops, **options)
    single.reset_state()
    found = list(single.generate_stream("a", stop_token_ids=stops, **options))
    assert all(isinstance(piece, str) and piece for piece in found) and "".join(found) == text
    single.reset_state()
    ids = next(iter(single.generate_stream([[1]], max_new_tokens=2)))
    assert isinstance(ids, np.ndarray) and ids.dtype == "int32" and ids.shape == (1,)


def test_prompts_longer_than_the_preprocessor_are_read_whole():
    lm = text_model()
    lm.sampler = "greedy"
    prompt = "acbdefg" * 4 + "é"
    ids = tokenize(lm, prompt, start=True)
    assert len(ids) > 2 * SEQUENCE_LENGTH
    whole = lm.generate([ids], max_length=len(ids) + SEQUENCE_LENGTH, stop_token_ids=None)[0]
    assert whole[: len(ids)] == ids and len(whole) == len(ids) + SEQUENCE_LENGTH
    assert lm.generate(prompt, stop_token_ids=None) == detokenize(lm, whole)
    short, long = lm.generate(["a", prompt], stop_token_ids=None, strip_prompt=True)
    assert long == detokenize(lm, whole[len(ids) :])
    alone = lm.generate([tokenize(lm, "a", start=True)], max_length=SEQUENCE_LENGTH, stop_token_ids=None)[0]
    assert short == detokenize(lm, alone[2:])
    limit = len(ids) + 3
    assert lm.generate(prompt, max_length=limit, stop_token_ids=None) == detokenize(lm, whole[:limit])
    with pytest.raises(ValueError, match=r"1 to `max_length` tokens.*Pass a larger `max_length`"):
        lm.generate(prompt, max_length=10)


def test_strings_come_in_every_form():
    lm = text_model()
    lm.sampler = "greedy"
    options = {"stop_token_ids": None, "strip_prompt": True}
    expected = lm.generate(["a", "bc"], **options)
    assert isinstance(expected, list) and len(expected) == 2
    tf = pytest.importorskip("tensorflow")
    for given in (
        ("a", b"bc"),
        np.array(["a", "bc"]),
        np.array(["a", "bc"], "object"),
        np.array([b"a", b"bc"]),
        tf.constant(["a", "bc"]),
        tf.data.Dataset.from_tensor_slices(["a", "bc"]).batch(2),
    ):
        assert lm.generate(given, **options) == expected, (BACKEND, type(given))
    for given in ("a", b"a", tf.constant("a"), np.array("a"), np.str_("a")):
        assert lm.generate(given, **options) == expected[0], (BACKEND, type(given))
    ids = [tokenize(lm, text, start=True) for text in ("ac", "cd")]
    wanted = lm.generate(ids, max_length=8, stop_token_ids=None)
    for given in (np.array(ids), keras.ops.convert_to_tensor(ids), tf.constant(ids), [np.array(row) for row in ids]):
        found = lm.generate(given, max_length=8, stop_token_ids=None)
        assert found == wanted, (BACKEND, type(given))
    stream = keras_fam.StreamingModel(lm, 2)
    wanted = stream.generate(["a", "bc"], max_new_tokens=4)
    stream.reset_state()
    assert stream.generate(tf.constant(["a", "bc"]), max_new_tokens=4) == wanted


def test_what_is_text():
    assert as_texts("a") == as_texts([b"a"]) == as_texts(np.array("a")) == ["a"]
    assert as_texts(("a", np.bytes_(b"b"))) == ["a", "b"]
    assert (
        as_texts([[1], [2]])
        is as_texts(np.zeros((2, 2)))
        is as_texts([])
        is as_texts(["a", 1])
        is as_texts(None)
        is None
    )
    assert (
        is_one_text("a") and is_one_text(np.array("a")) and not is_one_text(["a"]) and not is_one_text(np.array(["a"]))
    )
