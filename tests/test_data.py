"""`keras_fam.data` and `keras_fam.tasks`: documents as contiguous rows, packing, and the tasks beside PassKey."""

import json

import keras
import numpy as np
import pytest

from keras_fam.data import Document, DocumentRows, TaskBatches, example, pack, repeat_segment
from keras_fam.tasks import AssociativeRecall, Copy, PassKey, SeveralKeys, WordTokenizer, accuracy

B, C = 3, 4
TEXT = ["One day the cat sat on the mat. What is the key?", "The dog ran home. The key of all is here."]


def documents(count=7, seed=0):
    """Documents whose tokens tell where they are from: number · 100 + place."""
    lengths = np.random.default_rng(seed).integers(2, 30, count)
    return [100 * i + np.arange(n) for i, n in enumerate(lengths, start=1)]


def read(rows, batches):
    """What each row reads until its next reset, as a list of `(tokens, targets, weights)` of real tokens, per row."""
    pieces = [[] for _ in range(rows.batch_size)]
    for i in range(batches):
        inputs, targets, weights = rows.batch_at(i)
        for row, starts in enumerate(inputs["reset"]):
            if starts:
                pieces[row].append(([], [], []))
            real = inputs["token_ids"][row] > 0
            for kept, new in zip(pieces[row][-1], (inputs["token_ids"], targets, weights), strict=True):
                kept.extend(new[row][real].tolist())
    return pieces


def same(one, other):
    for a, b in zip(keras.tree.flatten(one), keras.tree.flatten(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("count", [7, 2])
def test_rows_read_documents_whole_and_in_order(count):
    """Every piece is a document but its last token, targets are the next tokens; no row waits, no document is left."""
    texts = documents(count)
    rows = DocumentRows(texts, B, C, passes=2)
    assert rows.num_batches == rows.steps_per_epoch == len(rows)
    seen = []
    for pieces in read(rows, len(rows)):
        for tokens, targets, weights in pieces:
            if not tokens:
                continue  # a row that is through
            text = texts[tokens[0] // 100 - 1]
            assert tokens == text[:-1].tolist() and targets == text[1:].tolist() and set(weights) == {1.0}
            seen.append(tokens[0] // 100)
    assert sorted(seen) == sorted(2 * list(range(1, count + 1)))
    inputs, _, weights = rows.batch_at(len(rows))
    assert inputs["reset"].all() and not weights.any()


def test_shards_are_the_whole():
    whole = DocumentRows(documents(), 4, C, seed=3)
    parts = [DocumentRows(documents(), 2, C, seed=3, shard=(i, 2)) for i in range(2)]
    for number in (0, 5, 17):
        joined = keras.tree.map_structure(lambda *x: np.concatenate(x), *(part.batch_at(number) for part in parts))
        same(joined, whole.batch_at(number))


def test_seeds_and_random_access():
    rows, again, other = (DocumentRows(documents(), B, C, seed=seed) for seed in (0, 0, 1))
    forwards = [rows.batch_at(i) for i in range(40)]
    for i in (39, 3, 20):
        same(again.batch_at(i), forwards[i])
    assert any((a[0]["token_ids"] != other.batch_at(i)[0]["token_ids"]).any() for i, a in enumerate(forwards))
    plain = DocumentRows(documents(), 1, C, shuffle=False)
    assert plain.batch_at(0)[0]["token_ids"][0, 0] == 100


def test_a_place_is_json_and_goes_on():
    rows = DocumentRows(documents(), B, C, steps_per_epoch=10)
    place = json.loads(json.dumps(rows.state_dict(13)))
    again = DocumentRows(documents(), B, C, steps_per_epoch=10)
    again.load_state_dict(place)
    assert (again.position, again.epoch, len(again)) == (13, 1, 7)
    for i, batch in enumerate(again):
        same(batch, rows.batch_at(13 + i))
    with pytest.raises(IndexError, match="7 batches left"):
        again[7]
    again.advance(7)
    assert (again.position, len(again)) == (20, 10)
    with pytest.raises(ValueError, match="belongs to a dataset with other settings"):
        DocumentRows(documents(), B, C, seed=1, steps_per_epoch=10).load_state_dict(place)
    with pytest.raises(ValueError, match="starts at batch 20"):
        again.batch_at(3)
    with pytest.raises(TypeError, match="no length"):
        len(DocumentRows(documents(), B, C))


def test_longest_cuts_documents_from_the_next_start_on():
    texts = [100 + np.arange(23), 200 + np.arange(23), 300 + np.arange(23)]
    rows = DocumentRows(texts, B, C, longest=8)
    for pieces in read(rows, 12):
        assert [len(tokens) for tokens, _, _ in pieces[:3]] == [8, 8, 6]
        assert pieces[0][1][-1] == pieces[1][0][0]  # the target of a cut is the next token all the same
    rows.advance(1)
    rows.longest = None  # the piece that is being read still ends where it was to end
    inputs = [rows.batch_at(i)[0] for i in range(1, 6)]
    assert [part["reset"].tolist() for part in inputs] == [[False] * 3, [True] * 3] + [[False] * 3] * 3
    place = json.loads(json.dumps(rows.state_dict(2)))
    again = DocumentRows(texts, B, C, longest=8)
    again.load_state_dict(place)
    same([again[i] for i in range(9)], [rows.batch_at(3 + i) for i in range(9)])


def test_wrong_documents():
    for name, value in {"batch_size": 0, "longest": 0, "shard": (2, 2)}.items():
        with pytest.raises(ValueError, match=f"`{name}`"):
            DocumentRows(**{"documents": documents(), "batch_size": B, "chunk_tokens": C, name: value})
    with pytest.raises(ValueError, match="at least one document"):
        DocumentRows([], B, C)
    with pytest.raises(ValueError, match="at least 2 token ids"):
        DocumentRows([np.arange(5), [1]], 2, C)
    with pytest.raises(ValueError, match="steps_per_epoch"):
        DocumentRows(documents(), B, C, steps_per_epoch=0)


def test_documents_end_with_their_passes():
    """Padding is not read as data, and shards end together."""
    texts = documents()
    rows = DocumentRows(texts, B, C, passes=1)
    assert rows.batches_left == len(rows)
    rows.advance(len(rows) - 1)
    assert rows.batches_left == len(rows) == 1 and rows[0][2].any()
    rows.advance(1)
    assert rows.batches_left == 0
    for read_on in (lambda: rows[0], lambda: list(rows)):
        with pytest.raises(ValueError, match="All documents were read 1 times"):
            read_on()
    whole, parts = (
        DocumentRows(texts, 4, C, passes=1),
        [DocumentRows(texts, 2, C, passes=1, shard=(i, 2)) for i in (0, 1)],
    )
    assert [len(part) for part in parts] == [len(whole)] * 2
    assert DocumentRows(texts, B, C).batches_left is None


def test_workers_are_refused():
    """Keras' workers lose the order: the class that promises it says so."""
    for wrong in ({"workers": 2}, {"workers": 1, "use_multiprocessing": True}):
        with pytest.raises(ValueError, match="Use workers=1"):
            DocumentRows(documents(), B, C, steps_per_epoch=5, **wrong)
        with pytest.raises(ValueError, match="TaskBatches has workers"):
            TaskBatches(AssociativeRecall(num_pairs=2), 2, block_size=8, blocks=2, **wrong)
    DocumentRows(documents(), B, C, steps_per_epoch=5, workers=1, max_queue_size=3)


def test_tf_dataset():
    pytest.importorskip("tensorflow")
    rows = DocumentRows(documents(), B, C, steps_per_epoch=5)
    rows.advance(3)
    found = list(rows.to_tf_dataset().as_numpy_iterator())
    assert len(found) == 2
    for i, batch in enumerate(found):
        same(batch, rows[i])
    spec = DocumentRows(documents(), B, C).to_tf_dataset(fixed_length=False).element_spec
    assert spec[0]["token_ids"].shape.as_list() == [B, None] and spec[0]["reset"].shape.as_list() == [B]


def test_grain():
    """Rows are a source of grain as they are, whose iterators resume by themselves."""
    grain = pytest.importorskip("grain")
    rows = DocumentRows(documents(), B, C, steps_per_epoch=5)
    data = grain.MapDataset.source(rows)
    same(list(data), list(rows))
    iterator, again = iter(data.to_iter_dataset()), iter(data.to_iter_dataset())
    next(iterator)
    again.set_state(iterator.get_state())
    same(next(again), rows[1])


def test_packing():
    parts = [example([1, 2], [3]), example([4], [5, 6, 7]), np.array([8, 9])]
    packed = pack(parts, 7, pad_id=0)
    assert [d.token_ids.tolist() for d in packed] == [[1, 2, 3, 4, 5, 6, 7], [8, 9, 0, 0, 0, 0, 0]]
    assert [d.weights.tolist() for d in packed] == [[0, 0, 1, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]]
    assert [len(d.token_ids) for d in pack(parts, 7)] == [7, 2]
    _, targets, weights = DocumentRows(packed, 1, 6, shuffle=False).batch_at(0)
    assert targets.tolist() == [[2, 3, 4, 5, 6, 7]] and weights.tolist() == [[0, 1, 0, 1, 1, 1]]
    with pytest.raises(ValueError, match="packed whole"):
        pack(parts, 3)


def test_repeated_segment():
    text = Document(np.arange(10, 40), np.zeros(30, "float32"))
    starts = set()
    for number in range(20):
        ids, weights = repeat_segment(text, [1, 2], length=5, seed=(0, number))
        assert ids[:30].tolist() == list(range(10, 40)) and ids[30:32].tolist() == [1, 2] and len(ids) == 37
        assert np.diff(ids[32:]).tolist() == [1] * 4 and 10 <= ids[32] <= 35
        np.testing.assert_allclose(weights, [0.0] * 32 + [0.1] * 5)
        starts.add(int(ids[32]))
    assert len(starts) > 5
    same(repeat_segment(text, [1], 5, seed=7), repeat_segment(text, [1], 5, seed=7))
    assert len(repeat_segment(np.arange(4), [1], 256).token_ids) == 9


def tasks():
    return [
        SeveralKeys(num_keys=3, num_questions=2, digits=2, documents=TEXT, held_out=0.5),
        SeveralKeys(num_keys=3, num_questions=2, digits=2),
        AssociativeRecall(num_pairs=5, num_keys=3, num_questions=2, key_length=2, value_length=3, symbols=4),
        AssociativeRecall(num_pairs=4, spread=8),
        Copy(length=5, symbols=3),
    ]


@pytest.mark.parametrize("number", range(5))
def test_tasks_state_what_they_ask_for(number):
    """Shapes, targets and weights; seeds; and the answers, found again in the tokens by a reader of its own."""
    task = tasks()[number]
    total = task.template_tokens + 30
    batch = task.batch(16, total, seed=1)
    ids, targets, asked, answers = (batch[k] for k in ("token_ids", "targets", "answer_positions", "answers"))
    assert ids.shape == targets.shape == batch["loss_weights"].shape == (16, total)
    assert ids.min() >= 0 and ids.max() < task.vocabulary_size
    np.testing.assert_array_equal(targets[:, :-1], ids[:, 1:])
    np.testing.assert_array_equal(np.take_along_axis(targets, asked, axis=1), answers)
    expected = np.zeros(ids.shape)
    np.put_along_axis(expected, asked, 1, axis=1)
    np.testing.assert_array_equal(batch["loss_weights"], expected)
    assert accuracy(answers, answers).exact == 1.0
    same(batch, task.batch(16, total, seed=1))
    assert (task.batch(16, total)["token_ids"] != task.batch(16, total)["token_ids"]).any()
    assert task.batch(2)["token_ids"].shape == (2, task.template_tokens)
    with pytest.raises(ValueError, match="at least"):
        task.batch(2, task.template_tokens - 1)
    for row in range(16):
        reader = {SeveralKeys: read_keys, AssociativeRecall: read_pairs, Copy: read_copy}[type(task)]
        found, distances = reader(task, ids[row].tolist())
        assert found == answers[row].tolist() and distances == batch["distances"][row].tolist()


def read_keys(task, ids):
    """Answers and distances by reading the text: the last tokens are the questions."""
    words = [task.tokenizer.vocabulary[i] for i in ids]
    keys, answers, distances = {}, [], []
    for i in range(len(words)):
        if words[i : i + 3] == ["the", "key", "of"] and words[i + 4 : i + 5] == ["is"]:
            name, digits = words[i + 3], ids[i + 5 : i + 5 + task.digits]
            if name in keys:
                answers += keys[name][0]
                distances.append(i + 5 - keys[name][1])
            elif all(d in task.tokenizer.digit_ids for d in digits):
                keys[name] = digits, i + 5
    return answers, distances


def read_pairs(task, ids):
    values, answers, distances = {}, [], []
    k, v = task.key_length, task.value_length
    for i, token in enumerate(ids):
        key = tuple(ids[i + 1 : i + 1 + k])
        if token == 1:
            assert ids[i + 1 + k] == 3
            values[key] = ids[i + 2 + k : i + 2 + k + v], i + 2 + k
        if token == 2:
            answers += values[key][0]
            distances.append(i + 2 + k - values[key][1])
    return answers, distances


def read_copy(task, ids):
    n = task.length
    assert ids[0] == 1 and ids[-n - 1] == 2
    return ids[1 : 1 + n], [len(ids) - n - 1] * n


def test_rewriting():
    """Keys come again with new values; where all keys differ they do not. Places follow `spread`."""
    batch = AssociativeRecall(num_pairs=12, num_keys=3, symbols=8).batch(32, 100, seed=0)
    assert batch["updates"].max() > 2 and batch["updates"].min() >= 1
    batch = AssociativeRecall(num_pairs=4, spread=8).batch(8, 40, seed=0)
    assert (batch["updates"] == 1).all() and batch["pair_positions"][0].tolist() == [0, 8, 16, 24]
    for changes in ({"num_pairs": 20, "symbols": 4}, {"num_keys": 9}, {"spread": 3}, {"symbols": 1}):
        with pytest.raises(ValueError):
            AssociativeRecall(**changes)
    for changes in ({"num_questions": 5}, {"key_length": 0}, {"value_length": 0}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            AssociativeRecall(**changes)
    with pytest.raises(ValueError, match="num_questions"):
        SeveralKeys(num_keys=2, num_questions=3)
    with pytest.raises(ValueError, match="different words"):
        SeveralKeys(num_keys=2, names=("amber", "amber"))
    with pytest.raises(ValueError, match="one word"):
        SeveralKeys(tokenizer=WordTokenizer.from_documents(TEXT), documents=TEXT, held_out=0.5)


def test_task_batches():
    """Every batch has a seed of its own, shards differ, and any task serves."""
    task = PassKey(documents=TEXT * 2, held_out=0.5, digits=2)
    one, other = (TaskBatches(task, 2, block_size=32, blocks=3, shard=(i, 2), steps_per_epoch=4) for i in range(2))
    tokens, targets, weights = one[0]
    assert tokens.shape == targets.shape == weights.shape == (2, 96)
    assert (tokens != other[0][0]).any() and (tokens != one[1][0]).any()
    same(one[0], one[0])
    one.advance(2)
    one.blocks = 4
    again = TaskBatches(task, 2, block_size=32, blocks=1, shard=(0, 2), steps_per_epoch=4)
    again.load_state_dict(json.loads(json.dumps(one.state_dict(1))))
    assert again[0][0].shape == (2, 128) and len(again) == 1
    same(again[0], one[1])
