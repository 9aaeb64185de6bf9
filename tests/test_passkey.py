"""PassKey data: text, tokenizer, batches and streams."""

import json
import os
import pathlib
import subprocess
import sys
import tracemalloc
from pydoc_data.topics import topics

import numpy as np
import pytest
from support import on_one_backend

import keras_fam
from examples.datasets.python_docs import clean_paragraph, topics_text
from keras_fam.tasks import PassKey, SeveralKeys, WordTokenizer, accuracy, split_documents
from keras_fam.tasks.passkey import PAPER_FILLER, QUESTION

pytestmark = on_one_backend
FIELDS = ("token_ids", "targets", "loss_weights")


@pytest.fixture(scope="module")
def documents():
    return topics_text()


@pytest.fixture(scope="module")
def task(documents):
    return PassKey(documents, seed=3)


@pytest.fixture(scope="module", params=["prose start", "prose anywhere", "paper start", "paper anywhere"])
def any_task(request, documents):
    filler, key_position = request.param.split()
    documents = documents if filler == "prose" else None
    return PassKey(documents, key_position=key_position, digits=4, vocabulary_size=1000, filler_weight=0.25)


def windows(ids, length):
    """The bytes of every run of `length` ids."""
    return [ids[start : start + length].tobytes() for start in range(len(ids) - length + 1)]


def test_prose(documents):
    """Enough of it, without code or markup, no paragraph in two topics, whatever the order of the dictionary."""
    assert sum(map(len, documents)) > 150_000
    assert not any(mark in text for text in documents for mark in ("::=", ">>>", "---", '"'))
    assert not any("pass key" in " ".join(WordTokenizer.tokenize(text)) for text in documents)
    paragraphs = [paragraph for text in documents for paragraph in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 500
    assert topics_text(dict(reversed(topics.items()))) == documents


def test_clean_paragraph():
    marked = '* The *name* of a\n  **type** is kept in its "__name__"\n  attri-\n  bute; a ** b. [2]'
    assert clean_paragraph(marked) == "The name of a type is kept in its __name__ attri-bute; a ** b."
    assert clean_paragraph("   >>> print(1)\n   1") == ""
    assert clean_paragraph("   stmt ::= name of one other rule or of two rules.") == ""
    assert clean_paragraph("Heading of a section\n********************") == ""


def test_split(documents):
    train, held_out = split_documents(documents, 0.2)
    assert set(train).isdisjoint(held_out)
    assert sorted(train + held_out) == sorted(documents)
    assert 0.15 < sum(map(len, held_out)) / sum(map(len, documents)) <= 0.2
    assert split_documents(documents[::-1], 0.2) == (train, held_out)
    assert split_documents(documents, 0.2, seed=1) != (train, held_out)


def test_wrong_documents():
    """A str is no list of documents; a split needs two documents, and tokens on either side."""
    for task in (PassKey, SeveralKeys, split_documents):
        with pytest.raises(TypeError, match="must be a list of str"):
            task("One text. Another text.")
        with pytest.raises(TypeError, match="int at index 1"):
            task(["One text.", 7])
        with pytest.raises(ValueError, match="two different documents"):
            task(["One text.", "One text."])
        with pytest.raises(ValueError, match="between 0 and 1"):
            task(["One text.", "Another text."], held_out=1.0)
    for task in (PassKey, SeveralKeys):
        with pytest.raises(ValueError, match="has no tokens"):
            task(["One text.", " "], held_out=0.5)


def test_nothing_depends_on_the_hash_seed():
    code = """if True:
        import sys, types, zlib
        sys.modules["keras_fam"] = types.ModuleType("keras_fam")  # without its __init__, which imports all
        sys.modules["keras_fam"].__path__ = [sys.argv[1]]
        from keras_fam.tasks import PassKey
        from examples.datasets.python_docs import topics_text
        task = PassKey(topics_text())
        print(zlib.crc32(task.batch(2, 9000, seed=0)["token_ids"].tobytes() + repr(task.tokenizer.vocabulary).encode()))
    """
    folder = pathlib.Path(keras_fam.__file__).parent
    command = [sys.executable, "-c", code, str(folder)]
    own = {**os.environ, "PYTHONPATH": str(folder.parent)}
    environments = [{**own, "PYTHONHASHSEED": hash_seed} for hash_seed in ("1", "2")]
    first, second = (subprocess.run(command, env=env, capture_output=True, check=True) for env in environments)
    assert first.stdout == second.stdout != b""


def test_held_out_text_is_not_in_the_training_text(task, documents):
    """Not under another name either: hardly any run of 16 tokens is in both parts."""
    known = set(windows(task._source("train"), 16))
    assert np.mean([window in known for window in windows(task._source("held_out"), 16)]) < 0.01
    uncapped = PassKey(documents, vocabulary_size=None)  # has all words of the training text and no others
    assert [uncapped.tokenizer.unk_id in uncapped._source(name) for name in ("train", "held_out")] == [False, True]


def test_tokenizer_round_trip(task):
    tokenizer = task.tokenizer
    ids = np.concatenate([tokenizer.encode("It is 70415, and no other: the class! <num>"), task._source("held_out")])
    assert tokenizer.unk_id in ids and tokenizer.num_id in ids
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(ids)), ids)
    again = WordTokenizer.from_config(json.loads(json.dumps(tokenizer.get_config())))
    assert again.vocabulary == tokenizer.vocabulary
    np.testing.assert_array_equal(again.encode(PAPER_FILLER), tokenizer.encode(PAPER_FILLER))


def test_tokens():
    assert WordTokenizer.tokenize("Don’t add 12 to __x__!") == ["don't", "add", "1", "2", "to", "__x__", "!"]
    assert WordTokenizer.tokenize("12 in utf8, ٣", hide_numbers=True) == ["<num>", "in", "utf", "<num>", ",", "<num>"]
    assert WordTokenizer.tokenize("٣") == ["3"]


def test_vocabulary_is_capped_and_ranked_with_ties_by_alphabet():
    tokenizer = WordTokenizer.from_documents(["b b a c 1 1 1", "c d"], 17, required=["zebra"])
    assert tokenizer.vocabulary == ["<pad>", "<unk>", "<num>", *"0123456789", "zebra", "b", "c", "a"]
    assert tokenizer.encode("d 7 zebra").tolist() == [1, 10, 13]
    assert tokenizer.digit_ids.tolist() == tokenizer.encode("0123456789").tolist()
    with pytest.raises(ValueError, match="at least 14"):
        WordTokenizer.from_documents(["a"], 13, required=["zebra"])
    for vocabulary, message in (([*tokenizer.vocabulary, "a"], "repeated"), (["a"], "must start with")):
        with pytest.raises(ValueError, match=message):
            WordTokenizer(vocabulary)


def test_batch_layout(any_task):
    task = any_task
    batch = task.batch(8, total_tokens=256, seed=1)
    ids, keys, at = batch["token_ids"], batch["keys"], batch["answer_positions"]
    assert ids.shape == batch["targets"].shape == batch["loss_weights"].shape == (8, 256)
    assert [batch[name].dtype for name in FIELDS] == ["int32", "int32", "float32"]
    assert (keys.dtype, keys.shape, at.dtype, at.shape) == ("int32", (8, 4), "int32", (8, 4))
    assert ids.min() > 0 and ids.max() < task.vocabulary_size
    np.testing.assert_array_equal(batch["targets"][:, :-1], ids[:, 1:])
    assert not batch["targets"][:, -1].any()
    np.testing.assert_array_equal(ids[:, -4:], keys)
    np.testing.assert_array_equal(np.take_along_axis(batch["targets"], at, 1), keys)
    text = task.tokenizer.decode(ids[0])
    key = task.tokenizer.decode(keys[0])
    assert text.startswith("somewhere in this long text an important piece of information is hidden.")
    assert f"the pass key is {key}. do not forget it: {key} is the pass key." in text
    assert text.endswith(f"{QUESTION.lower()} {key}")
    weights = np.full((8, 256), 0.25, "float32")  # the answer has 1, the last position has no target
    np.put_along_axis(weights, at, 1.0, axis=1)
    weights[:, -1] = 0
    np.testing.assert_array_equal(batch["loss_weights"], weights)


def test_loss_weights_cover_exactly_the_answer(task):
    batch = task.batch(3, total_tokens=200, seed=0)
    assert np.unique(batch["loss_weights"]).tolist() == [0, 1]
    np.testing.assert_array_equal(batch["targets"][batch["loss_weights"] > 0].reshape(3, 5), batch["keys"])


@pytest.mark.parametrize("split_name", ["train", "held_out"])
def test_key_is_stated_exactly_twice_and_no_other_digit_occurs(any_task, split_name):
    batch = any_task.batch(16, total_tokens=20_000, seed=5, split=split_name)
    fields = ("token_ids", "keys", "key_positions", "statement_ends")
    after = any_task.tokenizer.encode(" is the pass key.")
    for row, key, first, end in zip(*(batch[name] for name in fields), strict=True):
        places = np.flatnonzero(np.isin(row, any_task.tokenizer.digit_ids)).tolist()
        assert row[places].tolist() == [*key, *key, *key]
        assert places[:4] == list(range(first, first + 4))
        assert places[-4:] == list(range(19_996, 20_000))
        assert places[7] + 1 == end - len(after) and row[end - len(after) : end].tolist() == after.tolist()
    spread = np.ptp(batch["key_positions"])
    assert spread == 0 if any_task.key_position == "start" else spread > 8000


def test_keys_are_uniform(task):
    keys = task.batch(4000, total_tokens=task.template_tokens, seed=0)["keys"] - task.tokenizer.digit_ids[0]
    counts = np.stack([np.bincount(column, minlength=10) for column in keys.T])
    assert counts.min() > 320 and counts.max() < 480


def test_lengths(task):
    need = task.template_tokens
    for total in (need, need + 1, 1024, 4096):
        assert task.batch(2, total_tokens=total, seed=0)["token_ids"].shape == (2, total)
    by_filler, by_total = task.batch(2, 300, seed=0), task.batch(2, total_tokens=300 + need, seed=0)
    np.testing.assert_array_equal(by_filler["token_ids"], by_total["token_ids"])
    with pytest.raises(ValueError, match=f"at least {need}"):
        task.batch(2, total_tokens=need - 1)
    for arguments in ({}, {"filler_tokens": 1, "total_tokens": 100}):
        with pytest.raises(ValueError, match="either"):
            task.batch(2, **arguments)


@pytest.mark.parametrize("name", ["train", "held_out"])
def test_filler_is_a_contiguous_window_of_the_right_split(task, name):
    known = set(windows(np.tile(task._source(name), 2), 500))
    start = task.template_tokens - len(task._question) - task.digits
    filler = task.batch(4, 500, seed=2, split=name)["token_ids"][:, start : start + 500]
    assert all(row.tobytes() in known for row in filler)
    assert len({row.tobytes() for row in filler}) == 4


def test_paper_filler():
    paper = PassKey(digits=3)
    assert paper.vocabulary_size < 80
    assert 2 * (" " + PAPER_FILLER.lower()) in paper.tokenizer.decode(paper.batch(1, 48)["token_ids"])


def test_one_tokenizer_serves_both_fillers(task):
    other = PassKey(tokenizer=task.tokenizer)
    assert other.vocabulary_size == task.vocabulary_size == 2000
    assert task.tokenizer.unk_id not in other.batch(2, 300)["token_ids"]
    with pytest.raises(ValueError, match="does not know"):
        PassKey(tokenizer=WordTokenizer.from_documents(["grass"]))


def test_seeds(task):
    def ids(**arguments):
        return task.batch(4, total_tokens=128, **arguments)["token_ids"]

    np.testing.assert_array_equal(ids(seed=7), ids(seed=7))
    assert (ids(seed=7) != ids(seed=8)).any()
    assert (ids(seed=7, split="held_out")[:, -5:] != ids(seed=7)[:, -5:]).any()
    assert (ids(seed=(generator := np.random.default_rng(0))) != ids(seed=generator)).any()
    tasks = [PassKey(seed=seed) for seed in (11, 11, 12)]
    runs = [[own.batch(2, 9)["keys"].tolist() for _ in range(2)] for own in tasks]
    assert runs[0] == runs[1] != runs[2] and runs[0][0] != runs[0][1]


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 199, 200, 300])
def test_stream_is_the_batch(any_task, chunk_tokens):
    whole = any_task.batch(5, total_tokens=200, seed=4)
    chunks = list(any_task.stream(5, total_tokens=200, chunk_tokens=chunk_tokens, seed=4))
    assert [chunk["start"] for chunk in chunks] == list(range(0, 200, chunk_tokens))
    for name in FIELDS:
        np.testing.assert_array_equal(np.concatenate([chunk[name] for chunk in chunks], 1), whole[name])
        assert all(chunk[name].dtype == whole[name].dtype for chunk in chunks)
    for name in ("keys", "answer_positions", "key_positions", "statement_ends"):
        assert all(np.array_equal(chunk[name], whole[name]) for chunk in chunks)


def test_a_million_tokens_take_no_memory(task):
    total, tokens = 1_000_000, 0
    tracemalloc.start()
    for chunk in task.stream(4, total_tokens=total, chunk_tokens=4096, seed=0, split="held_out"):
        tokens += chunk["token_ids"].shape[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokens == total
    assert peak < 2**21, "the token ids alone of the whole sequences are 16 MB"
    np.testing.assert_array_equal(chunk["token_ids"][:, -5:], chunk["keys"])
    assert chunk["answer_positions"].tolist()[0] == list(range(total - 6, total - 1))


def test_accuracy():
    keys = np.array([[3, 4], [5, 6], [7, 8], [9, 3]])
    predicted = np.array([[3, 4], [5, 9], [1, 8], [0, 0]])
    assert accuracy(predicted, keys) == (0.25, 0.5)
    assert accuracy(np.eye(12)[predicted], keys) == (0.25, 0.5)
    with pytest.raises(ValueError, match="shapes"):
        accuracy(predicted[:, :1], keys)
    with pytest.raises(ValueError, match="NaN"):
        accuracy(np.full((4, 2, 12), np.nan), keys)
