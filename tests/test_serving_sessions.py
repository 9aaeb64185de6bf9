"""Sessions of an export for TF Serving: what they remember, how calls stay apart, and who may do what."""

import threading
import time

import numpy as np
import pytest
import served as export
import support
from served import CHUNKS, OPTIONS, PLACES, ROWS, SECRET, TOTAL, V, state_of


@pytest.fixture(scope="module")
def lm():
    return export.language_model()


@pytest.fixture(scope="module")
def folder():
    return export.exported()


@pytest.fixture(scope="module")
def served():
    return export.loaded()


@pytest.fixture(scope="module")
def tokens():
    return export.some_tokens()


@pytest.fixture(scope="module")
def whole():
    return export.whole_logits()


@pytest.fixture
def sessions(served):
    """All places of the table, newly opened; free again afterwards."""
    opened = served("open", count=PLACES)["sessions"]
    yield opened
    served("close", sessions=served.open_sessions())


def test_greedy_generation_takes_the_best_token(served, lm, tokens, sessions):
    lengths = np.array([1, 2, 5, 9, 13, 20, 3, 8])  # 20 tokens take three steps of two blocks
    prompt = tokens[:, :20]
    state = served("init_state", batch_size=ROWS)
    given = {"token_ids": prompt, "lengths": lengths, **OPTIONS, "seed": np.zeros(ROWS)}
    results = served("generate", **given, **state)
    assert (results["lengths"] == 6).all()
    text = np.zeros((ROWS, TOTAL), "int32")
    for row, n in enumerate(lengths):
        text[row, : n + 6] = np.concatenate([prompt[row, :n], results["tokens"][row]])
    logits = lm.predict(text, verbose=0)
    for row, n in enumerate(lengths):
        before = logits[row, n - 1 : n + 5]
        chosen = np.take_along_axis(before, results["tokens"][row][:, None], axis=1)[:, 0]
        np.testing.assert_allclose(chosen, before.max(axis=1), atol=1e-5)
        support.close(results["state_logits"][row], logits[row, n + 5], 1e-5)
    by_session = served("session_generate", sessions=sessions, **given)
    np.testing.assert_array_equal(by_session["tokens"], results["tokens"])
    np.testing.assert_array_equal(by_session["positions"], lengths + 6)


def test_rows_end_at_stop_tokens(served, tokens, whole, sessions):
    given = {"sessions": sessions, "token_ids": tokens[:, :5], "lengths": [5] * ROWS, "seed": np.zeros(ROWS)}
    free = served("session_generate", **given, **{**OPTIONS, "max_new_tokens": 12})["tokens"]
    served("reset", sessions=sessions)
    stops = [free[0, 3], free[1, 0]]
    results = served("session_generate", **given, **{**OPTIONS, "max_new_tokens": 12, "stop_tokens": stops})
    assert len(set(results["lengths"])) > 1
    for row in range(ROWS):
        ends = np.flatnonzero(np.isin(free[row], stops))
        count = ends[0] + 1 if len(ends) else 12
        assert results["lengths"][row] == count
        np.testing.assert_array_equal(results["tokens"][row], np.where(np.arange(12) < count, free[row], 0))
    np.testing.assert_array_equal(results["positions"], 5 + results["lengths"])


def test_sessions_remember(served, tokens, whole, sessions):
    order, first = np.random.default_rng(4).permutation(ROWS), 0
    for size in CHUNKS:
        for rows in (order[:3], order[3:]):
            chunk = tokens[rows, first : first + size]
            signature = "append_last" if size == 9 or rows[0] == order[0] else "append"
            results = served.append(sessions[rows], chunk, signature)
            expected = whole[rows, first : first + size]
            support.close(results["logits"], expected[:, -1] if signature == "append_last" else expected, 1e-5)
            assert (results["positions"] == first + size).all()
        first += size
    served("reset", sessions=sessions[2:3])
    support.close(served.append(sessions[2:3], tokens[2:3, :6])["logits"], whole[2:3, :6], 1e-5)


def test_calls_that_fail_change_nothing(served, tokens, whole, sessions):
    served.append(sessions, tokens[:, :3])
    own, chunk = sessions[:2], tokens[:2, 3:5]
    far = [next(n for n in range(99) if n not in sessions)]
    for numbers in (far, [-1], [-1 - sessions[0]], [sessions[0] ^ 1]):
        for signature in ("reset", "close"):
            served.refuses("No such session", signature, sessions=numbers)
        served.refuses("No such session", "append", sessions=numbers, token_ids=chunk[:1], lengths=[2])
    served.refuses("No such session", "append", sessions=[sessions[0], far[0]], token_ids=chunk, lengths=[2, 2])
    for signature in ("append", "append_last"):
        served.refuses("each session once", signature, sessions=[own[0]] * 2, token_ids=chunk, lengths=[2, 2])
        served.refuses("from 0 to T", signature, sessions=own, token_ids=chunk, lengths=[2, 3])
        served.refuses("one row per session", signature, sessions=own[:1], token_ids=chunk, lengths=[2, 2])
        served.refuses("integers from 0", signature, sessions=own, token_ids=chunk + V, lengths=[2, 2])
    served.refuses("each session once", "reset", sessions=[own[0]] * 2)
    served.refuses("each session once", "close", sessions=[own[0]] * 2)
    options = {**OPTIONS, "seed": [0, 0], "top_k": -1}
    served.refuses("top_k", "session_generate", sessions=own, token_ids=chunk, lengths=[2, 2], **options)
    served.refuses("close some first. Wanted and free:] .1. .0.", "open", count=1)
    served.refuses("at least 0", "open", count=-1)
    served.refuses("at least 0", "list", count=-1, secret=SECRET)
    np.testing.assert_array_equal(np.sort(sessions), served.open_sessions())
    results = served.append(sessions, tokens[:, 3:5])
    support.close(results["logits"], whole[:, 3:5], 1e-5)


def test_numbers_are_not_used_twice(served, tokens, whole, sessions):
    old = sessions[3:5]
    served.append(old, tokens[:2, :5])
    assert served("close", sessions=old)["free"] == 2
    new = served("open", count=1)["sessions"]
    assert not set(new) & set(sessions)
    served.refuses("No such session", "append", sessions=old[:1], token_ids=tokens[:1, :1], lengths=[1])
    support.close(served.append(new, tokens[:1, :6])["logits"], whole[:1, :6], 1e-5)
    assert served("close", sessions=new)["free"] == 2


def run_threads(work, count):
    """Runs `work(thread)` in threads and raises what any of them raised."""
    errors = []

    def guarded(i):
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_sessions_do_not_mix_between_threads(served, tokens, whole, sessions):
    idle, guard, place, calls = list(range(ROWS)), threading.Lock(), np.zeros(ROWS, int), []

    def work(thread):
        rng = np.random.default_rng(thread)
        for _ in range(25):
            with guard:
                rng.shuffle(idle)
                rows = [idle.pop() for _ in range(rng.integers(1, 3))]
            size = int(rng.integers(1, 8))
            if any(place[rows] + size > TOTAL):
                served("reset", sessions=sessions[rows])
                place[rows] = 0
            chunk = np.stack([tokens[row, place[row] : place[row] + size] for row in rows])
            expected = np.stack([whole[row, place[row] : place[row] + size] for row in rows])
            results = served.append(sessions[rows], chunk)
            support.close(results["logits"], expected, 1e-5)
            place[rows] += size
            assert (results["positions"] == place[rows]).all()
            calls.append(rows)
            with guard:
                idle.extend(rows)

    run_threads(work, 4)
    assert len(calls) == 100


def test_one_session_in_many_threads_is_one_stream(served, tokens, whole, sessions):
    kept, refused = [], []

    def work(thread):
        for _ in range(20):
            token = np.full((1, 1), thread, "int32")
            try:
                results = served.append(sessions[:1], token)
                kept.append((int(results["positions"][0]), thread, results["logits"][0, 0]))
            except served.tf.errors.InvalidArgumentError as error:
                assert "Another call changed" in str(error)
                refused.append(thread)

    run_threads(work, 4)
    kept.sort(key=lambda entry: entry[0])
    assert len(kept) + len(refused) == 80
    assert [position for position, _, _ in kept] == list(range(1, len(kept) + 1))
    text = np.array([[thread for _, thread, _ in kept]], "int32")
    logits = served("serving_default", token_ids=text)["logits"][0]
    support.close(np.stack([found for _, _, found in kept]), logits, 1e-5)


def test_a_cancelled_call_changes_nothing_and_holds_nothing(served, tokens, whole, sessions):
    cancellation = pytest.importorskip("tensorflow.python.eager.cancellation")
    tf = served.tf
    served.append(sessions[:1], tokens[:1, :5])
    given = {**OPTIONS, "sessions": sessions[:1], "token_ids": tokens[:1, :1], "lengths": [1], "seed": [0]}
    given["max_new_tokens"] = 10**8
    function = served.signatures["session_generate"]
    specs = function.structured_input_signature[1]
    given = {name: tf.convert_to_tensor(x, specs[name].dtype) for name, x in given.items()}
    manager, failed = cancellation.CancellationManager(), []

    def work():
        with pytest.raises(tf.errors.CancelledError), cancellation.CancellationManagerContext(manager):
            function(**given)
        failed.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    rescue = threading.Timer(300, manager.start_cancel)  # a call that blocks the others is a failure, not a hang
    rescue.start()
    time.sleep(0.3)
    results = served.append(sessions[1:2], tokens[1:2, :5])
    assert thread.is_alive() and rescue.is_alive(), "calls for different sessions run beside one another"
    support.close(results["logits"], whole[1:2, :5], 1e-5)
    rescue.cancel()
    manager.start_cancel()
    thread.join()
    assert failed
    results = served.append(sessions[:1], tokens[:1, 5:9])
    assert results["positions"][0] == 9
    support.close(results["logits"], whole[:1, 5:9], 1e-5)


def test_sessions_as_the_server_runs_them(folder, tokens, whole):
    """TF Serving and the C API run the export in a session, whose locks and functions are not those of eager calls."""
    import tensorflow as tf

    session = tf.compat.v1.Session(graph=tf.Graph())
    with session.graph.as_default():
        signatures = tf.compat.v1.saved_model.load(session, ["serve"], str(folder)).signature_def

    def call(name, **inputs):
        signature = signatures[name]
        outputs = {key: info.name for key, info in signature.outputs.items()}
        return session.run(outputs, {signature.inputs[key].name: x for key, x in inputs.items()})

    sessions = call("open", count=4)["sessions"]

    def work(thread):
        first = 0
        for size in CHUNKS:
            with pytest.raises(tf.errors.InvalidArgumentError, match="No such session"):
                call("append", sessions=[99], token_ids=[[0]], lengths=[1])
            chunk = tokens[thread : thread + 1, first : first + size]
            results = call("append", sessions=sessions[thread : thread + 1], token_ids=chunk, lengths=[size])
            support.close(results["logits"], whole[thread : thread + 1, first : first + size], 1e-5)
            first += size

    run_threads(work, 4)
    assert call("close", sessions=sessions)["free"] == PLACES
    session.close()


def test_generation_continues_where_it_stopped(served, tokens, sessions):
    given = {"token_ids": tokens[:, :5], "lengths": [5] * ROWS, **OPTIONS, "temperature": 1.3, "top_k": 20}
    given["seed"] = np.arange(ROWS) // 2
    state = served("init_state", batch_size=ROWS)
    at_once = served("generate", **{**given, "max_new_tokens": 9}, **state)
    assert (at_once["tokens"][0] != at_once["tokens"][2]).any()
    first = served("generate", **{**given, "max_new_tokens": 4}, **state)
    rest = {**given, "lengths": np.zeros(ROWS), "max_new_tokens": 5}
    second = served("generate", **rest, **state_of(first))
    joined = np.concatenate([first["tokens"], second["tokens"]], axis=1)
    np.testing.assert_array_equal(joined, at_once["tokens"])
    alone = served(  # another batch, another place in it, the same draws
        "session_generate",
        sessions=sessions[:1],
        **{**given, "token_ids": tokens[3:4, :5], "lengths": [5], "seed": given["seed"][3:4], "max_new_tokens": 9},
    )
    np.testing.assert_array_equal(alone["tokens"][0], at_once["tokens"][3])


def test_calls_without_rows(served, tokens, sessions):
    none = np.zeros(0)
    assert served.append(none, tokens[:0, :3])["logits"].shape == (0, 3, V)
    assert served("open", count=0)["sessions"].shape == (0,)
    assert served("close", sessions=none)["free"] == 0
    assert served("serving_default", token_ids=tokens[:0, :3])["logits"].shape == (0, 3, V)
    state = served("init_state", batch_size=0)
    given = {**OPTIONS, "seed": none, "token_ids": tokens[:0, :3], "lengths": none}
    assert served("generate", **given, **state)["tokens"].shape == (0, 6)


def test_numbers_cannot_be_guessed(served, sessions):
    """63 random bits: each is set in about half of many numbers, and seeds of the exporting process play no part."""
    served("close", sessions=sessions)
    numbers = []
    for _ in range(50):
        drawn = served("open", count=PLACES)["sessions"]
        numbers.extend(drawn.tolist())
        served("close", sessions=drawn)
    assert len(set(numbers)) == len(numbers) and min(numbers) >= 0
    share = np.mean([[number >> bit & 1 for bit in range(63)] for number in numbers], axis=0)
    assert np.abs(share - 0.5).max() < 5 * np.sqrt(0.25 / len(numbers))  # five standard deviations
    served.tf.random.set_seed(0)
    other = export.Served(export.exported())("open", count=1)["sessions"]
    assert not set(other.tolist()) & set(numbers)


def test_only_the_secret_lists_sessions(served, sessions):
    for secret in ("", "of the tests ", SECRET.upper()):
        served.refuses("needs the secret", "list", count=1, secret=secret)
    np.testing.assert_array_equal(served.open_sessions(), np.sort(sessions))
    assert len(served("list", count=3, secret=SECRET)["sessions"]) == 3
