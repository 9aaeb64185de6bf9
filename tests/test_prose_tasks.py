"""Tasks in natural text: what is stated, where it stands, what is asked, and what the loss is on."""

import collections
import re

import numpy as np
import pytest
from support import on_one_backend

import keras_fam
from keras_fam.tasks import phrases
from keras_fam.tasks.prose import sentences

pytestmark = on_one_backend
STORY = 'Mr. Hill came home late. Nobody was there! "Is anybody here?" he asked. He lit a candle and read. '
TEXTS = [STORY * 40, "A storm rose in the night. The sea was black. All slept. " * 50]
KINDS = [
    keras_fam.tasks.Needle(),
    keras_fam.tasks.Needle(count=4, questions=3, cities=0.5),
    keras_fam.tasks.KeyValue(pairs=5, questions=2),
    *(keras_fam.tasks.WhoIsWhere(facts, events=8) for facts in (1, 2, 3)),
]


def letters(text):
    return [ord(letter) for letter in text]


def read(ids):
    return "".join(map(chr, ids))


def make(mixture=None, **options):
    prose = keras_fam.tasks.Prose.from_texts(TEXTS, letters)
    return keras_fam.tasks.ProseTask(prose, letters, mixture, **options)


def test_prose_is_its_texts_and_knows_where_sentences_end():
    assert "".join(sentences(TEXTS[0])) == TEXTS[0]
    assert sentences(STORY.strip()) == [
        "Mr. Hill came home late.", " Nobody was there!", ' "Is anybody here?" he asked.', " He lit a candle and read.",
    ]  # fmt: skip
    prose = keras_fam.tasks.Prose.from_texts(TEXTS, letters)
    assert read(prose.token_ids) == "".join(TEXTS)
    rng = np.random.default_rng(0)
    for size in (0, 1, 50, 3 * len(prose) + 7):
        ids, gaps, weights = prose.window(rng, size)
        assert len(ids) == len(weights) == size and (not size or gaps[-1] == size)
        assert read(ids) in "".join(TEXTS) * 5
        assert all(re.search(r"[.!?\"]\s*$", read(ids[:gap])) for gap in gaps)
    assert len(gaps) > 3 * len(prose.gaps), "the gaps of a text that is read again are gaps, too"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_statements_and_questions_stand_in_the_text(kind):
    task = make(kind, min_distance=100, early=0.0, again=0.0)
    for seed in range(20):
        text = task.text(1500, seed=seed)
        rng = np.random.default_rng([seed, 0])
        rng.random()
        exercise = kind.draw(rng)
        whole = read(text.token_ids)
        assert len(text.token_ids) == len(text.weights) == 1500
        places = []
        for statement in exercise.statements:  # in the order in which they are true; the same may be said twice
            places.append(whole.index(" " + statement, places[-1] + 1 if places else 0))
        assert all(place == 0 or re.search(r"[.!?\"]\s*$", whole[:place]) for place in places), "between sentences"
        assert [read(text.token_ids[a.start : a.stop]) for a in text.answers] == [
            " " + question.answer for question in exercise.questions
        ]
        learned = np.zeros(1500, bool)
        for answer, question in zip(text.answers, exercise.questions, strict=True):
            assert question.text in whole[places[-1] : answer.start]
            ends = [places[i] + 1 + len(exercise.statements[i]) for i in question.needs]
            assert answer.distance == answer.start - max(ends) >= 100
            learned[answer.start : answer.stop + 1] = True
        assert np.array_equal(text.weights > 0, learned), "the loss is on the answers and what ends them"


def answer_of(statements, question):
    """What a reader finds out from sentences of `WhoIsWhere`, with rules that share nothing with its world."""
    at, has, been = {}, {}, collections.defaultdict(list)
    for sentence in statements:
        words = re.findall(r"\w+", sentence)
        person = next(word for word in words if word in phrases.PEOPLE)
        place = next((word for word in words if word in phrases.PLACES), None)
        thing = next((word for word in words if word in phrases.OBJECTS), None)
        if place and re.search("went|walked|is now|moved|entered|hurried", sentence):
            assert at.get(person) != place, "nobody goes where they are"
            at[person] = place
            for owned in has.get(person, ()):
                been[owned].append(place)
        elif re.search("picked|took|got|grabbed", sentence):
            assert not any(thing in things for things in has.values()), "it was in somebody's hands"
            assert not been[thing] or been[thing][-1] == at[person], "it was elsewhere"
            has.setdefault(person, []).append(thing)
            if not been[thing]:
                been[thing].append(at[person])
        else:
            assert thing in has[person], "nobody leaves what they do not have"
            has[person].remove(thing)
    words = re.findall(r"\w+", question)
    thing = next((word for word in words if word in phrases.OBJECTS), None)
    if thing is None:
        return at[next(word for word in words if word in phrases.PEOPLE)]
    return been[thing][-2 if re.search("before", question) else -1]


@pytest.mark.parametrize("facts", [1, 2, 3])
def test_worlds_are_consistent_and_answers_need_so_many_facts(facts):
    kind, seen = keras_fam.tasks.WhoIsWhere(facts, events=9, questions=2), collections.Counter()
    for seed in range(100):
        exercise = kind.draw(np.random.default_rng(seed))
        for question in exercise.questions:
            assert len(question.needs) == facts and list(question.needs) == sorted(question.needs)
            if not re.search("directly before", question.text):
                assert question.answer == f"the {answer_of(exercise.statements, question.text)}"
            seen[question.answer] += 1
    assert max(seen.values()) < 0.2 * sum(seen.values()), "no place is the answer to most questions"


def test_statements_stand_early_or_anywhere_and_questions_come_again():
    early = make(KINDS[0], early=1.0, early_tokens=60, min_distance=200, again=0.0)
    anywhere = make(KINDS[0], early=0.0, min_distance=200, again=0.0)
    again = make(KINDS[0], early=0.0, min_distance=200, again=1.0)
    shares = []
    for seed in range(60):
        (answer,) = early.text(2000, seed=seed).answers
        assert answer.start - answer.distance <= 60 + 120  # the statement itself has up to 120 letters
        (answer,) = anywhere.text(2000, seed=seed).answers
        shares.append(answer.distance / 2000)
        text = again.text(2000, seed=seed)
        first, second = text.answers
        assert read(text.token_ids[first.start : first.stop]) == read(text.token_ids[second.start : second.stop])
        assert min(first.distance, second.distance) > 100 and second.start - first.stop == second.distance
        assert len(again.text(400, seed=seed).answers) == 1, "too short for both"
    assert min(shares) < 0.3 and max(shares) > 0.7 and 0.4 < np.mean(shares) < 0.65


def test_segments_are_repeated_and_books_are_read():
    kind = keras_fam.tasks.RepeatedSegment(length=20, cue=10, weight=0.5)
    text = make(kind, min_distance=100).text(800, seed=3)
    whole, (answer,) = read(text.token_ids), text.answers
    assert whole[-30:] == whole[answer.start - answer.distance - 10 :][:30] and answer.distance >= 100
    assert np.array_equal(text.weights, np.repeat(np.float32([0, 0.5]), [780, 20]))
    prose = keras_fam.tasks.Prose(np.arange(100), [50, 100], weights=np.arange(100) / 100)
    task = keras_fam.tasks.ProseTask(prose, letters, keras_fam.tasks.Book(weight=0.5))
    text = task.text(30, seed=0)
    assert not text.answers and np.allclose(text.weights, text.token_ids / 200)


def test_texts_follow_from_seed_and_split_alone():
    prose = keras_fam.tasks.Prose.from_texts(TEXTS[:1], letters)
    held_out = keras_fam.tasks.Prose.from_texts(TEXTS[1:], letters)
    task = keras_fam.tasks.ProseTask(prose, letters, held_out=held_out, min_distance=20)
    first, again, other = (task.batch(4, 900, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first["token_ids"], again["token_ids"])
    assert not np.array_equal(first["token_ids"], other["token_ids"])
    for split, word, absent in (("train", "candle", "storm"), ("held_out", "storm", "Nobody was")):
        text = read(task.text(900, seed=5, split=split).token_ids)
        assert word in text and absent not in text
    with pytest.raises(ValueError, match="split"):
        task.text(900, split="test")


def test_a_mixture_has_its_weights_and_phrasings_their_parts():
    mixture = [(keras_fam.tasks.Needle(name="a"), 3.0), (keras_fam.tasks.Needle(name="b"), 1.0), (KINDS[2], 0.0)]
    task = make(mixture, min_distance=0)
    names = collections.Counter(task.text(400, seed=seed).answers[-1].name for seed in range(400))
    assert set(names) == {"a", "b"} and 0.68 < names["a"] / 400 < 0.82
    banks = [bank[key] for bank in (phrases.NEEDLE, phrases.CITY, phrases.RECORD) for key in bank]
    for bank in [*banks, phrases.MOVES, phrases.TAKES, phrases.DROPS, phrases.WHERE_BEFORE, phrases.REPEAT]:
        rng, parts = np.random.default_rng(0), {}
        for which in phrases.WHICH:
            parts[which] = {phrases.choose(rng, bank, which) for _ in range(300)}
        assert parts["all"] == set(bank) == parts["train"] | parts["held_out"]
        assert parts["held_out"] and not parts["train"] & parts["held_out"]


def test_batches_say_what_the_last_answers_are():
    task = make([(KINDS[1], 1.0), (keras_fam.tasks.Book(), 1.0)], min_distance=50)
    batch = task.batch(12, 700, seed=0)
    assert np.array_equal(batch["targets"][:, :-1], batch["token_ids"][:, 1:])
    some = 0
    for row, text in enumerate(batch["texts"]):
        told = batch["answers"][row] >= 0
        if not text.answers:
            assert not told.any() and batch["loss_weights"][row, :-1].all()
            continue
        some += 1
        at = batch["answer_positions"][row][told]
        assert np.array_equal(batch["targets"][row, at], batch["answers"][row][told])
        assert batch["loss_weights"][row, at].all() and batch["distances"][row] == text.answers[-1].distance
    assert 0 < some < 12
    right = np.where(batch["answers"] < 0, 5, batch["answers"])
    assert keras_fam.tasks.accuracy(right, batch["answers"]) == (1.0, 1.0)
    right[np.argmax(batch["answers"][:, 0] >= 0), 0] += 1
    assert keras_fam.tasks.accuracy(right, batch["answers"]).exact == pytest.approx(1 - 1 / some)


def test_documents_stream_from_batch_to_batch():
    documents = keras_fam.data.TaskDocuments(make(min_distance=30), 50, (300, 900), multiple=100, seed=4)
    assert {documents.length(i) % 100 for i in range(50)} == {0}
    first, again = documents[7], documents[7]
    assert np.array_equal(first.token_ids, again.token_ids) and len(first.token_ids) == documents.length(7) + 1
    rows = keras_fam.data.DocumentRows(documents, batch_size=2, chunk_tokens=100, shuffle=False)
    read_, weights = [], []
    for number in range(documents.length(0) // 100):
        inputs, targets, weight = rows.batch_at(number)
        assert bool(inputs["reset"][0]) == (number == 0)
        read_.append(targets[0])
        weights.append(weight[0])
    assert np.array_equal(np.concatenate(read_), documents[0].token_ids[1:])
    assert np.array_equal(np.concatenate(weights), documents[0].weights[1:])
    with pytest.raises(IndexError):
        documents[50]


def test_batches_of_a_task_train():
    task = make(min_distance=30)
    batches = keras_fam.data.TaskBatches(task, batch_size=2, block_size=64, blocks=6, steps_per_epoch=2)
    ids, targets, weights = batches[0]
    assert ids.shape == targets.shape == weights.shape == (2, 384)
    assert np.array_equal(ids, batches.batch_at(0)[0])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="total_tokens=50"):
        make(KINDS[0]).text(50)
    with pytest.raises(ValueError, match="segment"):
        make(keras_fam.tasks.RepeatedSegment(length=100)).text(150)
    for options in ({"early": 1.5}, {"again": -1}, {"min_distance": -1}, {"frames": [("no", "")]}):
        with pytest.raises(ValueError, match=next(iter(options))):
            make(**options)
    with pytest.raises(ValueError, match="phrasings"):
        make(phrasings="some")
    for mixture in ([(KINDS[0], -1.0)], [(KINDS[0], 0.0)], []):
        with pytest.raises(ValueError, match="weights"):
            make(mixture)
    with pytest.raises(TypeError, match="mixture"):
        make([KINDS[0]])
    with pytest.raises(TypeError, match="prose"):
        keras_fam.tasks.ProseTask(TEXTS, letters)
    with pytest.raises(TypeError, match="single str"):
        keras_fam.tasks.Prose.from_texts(STORY, letters)
    with pytest.raises(ValueError, match="integers"):
        keras_fam.tasks.encoder(str.split)("a b")
    with pytest.raises(TypeError, match="tokenizer"):
        keras_fam.tasks.encoder(3)
    for gaps in ([], [0], [3, 2], [9]):
        with pytest.raises(ValueError, match="gaps"):
            keras_fam.tasks.Prose(np.arange(5), gaps)
    for kind, options in (
        (keras_fam.tasks.Needle, {"count": 0}),
        (keras_fam.tasks.Needle, {"digits": 0}),
        (keras_fam.tasks.KeyValue, {"questions": 9}),
        (keras_fam.tasks.WhoIsWhere, {"facts": 4}),
        (keras_fam.tasks.WhoIsWhere, {"places": 2}),
        (keras_fam.tasks.WhoIsWhere, {"events": 1}),
        (keras_fam.tasks.Book, {"weight": 0}),
        (keras_fam.tasks.RepeatedSegment, {"cue": 0}),
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            kind(**options)
    with pytest.raises(ValueError, match="tokens"):
        keras_fam.data.TaskDocuments(make(), 5, (9, 3))
