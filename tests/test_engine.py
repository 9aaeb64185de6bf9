"""Continuous batching: tokens of private streams whatever runs beside them, turns that count whole or not at all."""

import threading

import numpy as np
import pytest
from support import TINY_VOCABULARY, tiny

import keras_fam
from keras_fam.serve import (
    BadRequest,
    DamagedSession,
    Full,
    NoSuchSession,
    Request,
    SessionBusy,
    SessionEngine,
    SessionStore,
    StaleOwner,
    Unavailable,
)
from keras_fam.serve.sampling import draw

pytest.importorskip("fsspec")
pytest.importorskip("safetensors")

ROWS = 3
WAIT = 120  # seconds, far more than a turn takes: so that a fault is no hang


@pytest.fixture(scope="module")
def lm():
    return tiny(num_layers=2)


@pytest.fixture
def store(tmp_path):
    return SessionStore(f"memory://{tmp_path.name}")


@pytest.fixture
def engines(lm, store):
    """Makes engines over the same model and store, and closes them."""
    made = []

    def make(**settings):
        made.append(SessionEngine(lm, store, **{"rows": ROWS, "save_every": 7, **settings}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


class Private:
    """What one stream alone does with the same turns."""

    def __init__(self, lm):
        self.stream = keras_fam.StreamingModel(lm, 1)

    def turn(self, prompt, count, stops=None):
        if not count:
            self.stream.predict(np.array([prompt]))
            return []
        return self.stream.generate([prompt], max_new_tokens=count, stop_token_ids=stops)[0]

    @property
    def position(self):
        return int(self.stream.position[0])


def prompts(seed, count, longest=14):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, TINY_VOCABULARY, rng.integers(1, longest)).tolist() for _ in range(count)]


class Held:
    """`until` that holds the engine in the middle of a turn, after so many tokens, until it is let go."""

    def __init__(self, after):
        self.after, self.count, self.reached, self.go = after, 0, threading.Event(), threading.Event()

    def __call__(self, token):
        self.count += 1
        if self.count == self.after:
            self.reached.set()
            assert self.go.wait(WAIT)
        return False


def broken(after):
    """`until` that raises after so many tokens, as a fault in the middle of a turn."""
    count = iter(range(1, 10_000))

    def until(token):
        if next(count) == after:
            raise RuntimeError("a fault")
        return False

    return until


# Tokens ---------------------------------------------------------------------------------------------------------


def test_sessions_in_a_batch_say_what_private_streams_say(lm, engines, store):
    """More sessions than rows, prompts shorter and longer than a block, each at its own place."""
    engine, sessions = engines(), 2 * ROWS
    names, private = [store.new_name() for _ in range(sessions)], [Private(lm) for _ in range(sessions)]
    for turn in range(3):
        given = prompts(turn, sessions)
        given[turn] = given[turn] * 3  # several pieces
        counts = [(4 + 3 * i + turn) % 9 for i in range(sessions)]
        running = [
            engine.submit(Request(prompt, count, session=name, create=not turn))
            for name, prompt, count in zip(names, given, counts, strict=True)
        ]
        for stream, prompt, count, run in zip(private, given, counts, running, strict=True):
            assert run.result(WAIT) == stream.turn(prompt, count)
            assert (run.position, run.reason, run.prompt_tokens) == (stream.position, "length", len(prompt))
    found = engine.snapshot()
    assert found["turns"] == 3 * sessions and not found["failures"] and found["running"] == found["waiting"] == 0
    assert found["prompt_tokens"] + found["generated_tokens"] == sum(stream.position for stream in private)
    assert found["rows_read"] > found["steps"], "steps had several rows"
    assert found["loads"], "there are more sessions than rows"


def test_a_session_goes_on_without_a_prompt_and_stops_at_stop_tokens(lm, engines, store):
    engine, name, private = engines(), store.new_name(), Private(lm)
    first = engine.submit(Request([1, 2, 3], 6, session=name, create=True)).result(WAIT)
    assert first == private.turn([1, 2, 3], 6)
    turn = engine.submit(Request([], 6, session=name))
    assert list(turn) == private.turn([], 6)
    stop = Private(lm).turn([4, 2], 8)[3]
    turn = engine.submit(Request([4, 2], 8, stop_token_ids=(stop,)))
    assert turn.result(WAIT) == Private(lm).turn([4, 2], 8, [stop]) and turn.reason == "stop"
    seen = []
    turn = engine.submit(Request([4, 2], 8, until=lambda token: seen.append(token) or len(seen) == 2))
    assert turn.result(WAIT) == seen == Private(lm).turn([4, 2], 2) and turn.reason == "stop"
    assert engine.submit(Request([4, 2], 0, session=name)).result(WAIT) == []
    assert engine.submit(Request([], 3, session=name)).result(WAIT) == [
        *(private.turn([4, 2], 0) or private.turn([], 3))
    ]


def test_prompts_may_depend_on_where_the_session_stands(engines, store):
    engine, name, seen = engines(), store.new_name(), []
    for i in range(2):
        given = [1] * (i + 1)
        request = Request(lambda before, given=given: seen.append(tuple(before)) or given, 2, session=name, create=True)
        engine.submit(request).result(WAIT)
    assert seen == [(0, None), (3, "length")]


def test_a_stored_stream_goes_on_in_an_engine_and_back(lm, engines, store):
    engine, stream, private = engines(), keras_fam.StreamingModel(lm, 2), Private(lm)
    stream.predict([[3] * 7, [1, 2, 3, 4, 5, 0, 0]], lengths=[7, 5])
    private.turn([1, 2, 3, 4, 5], 0)
    name = store.new_name()
    store.put(name, stream, row=1)
    assert engine.submit(Request([6], 4, session=name)).result(WAIT) == private.turn([6], 4)
    store.get(name, stream, row=0)
    assert stream.position[0] == private.position == 10
    assert stream.generate([[7], []], max_new_tokens=3)[0] == private.turn([7], 3)


def test_what_is_drawn_depends_on_seed_and_position_alone(engines, store):
    options = {"temperature": 20.0, "top_p": 0.9, "seed": 7}
    engine = engines()
    alone = engine.submit(Request([1, 2], 12, **options)).result(WAIT)
    beside = [engine.submit(Request(prompt, 9, temperature=1.0, seed=i)) for i, prompt in enumerate(prompts(5, 2))]
    again = engine.submit(Request([1, 2], 12, **options)).result(WAIT)
    other = engine.submit(Request([1, 2], 12, **{**options, "seed": 8})).result(WAIT)
    [turn.result(WAIT) for turn in beside]
    assert alone == again != other
    name = store.new_name()
    half = engine.submit(Request([1, 2], 5, session=name, create=True, **options)).result(WAIT)
    assert half + engine.submit(Request([], 7, session=name, **options)).result(WAIT) == alone


def test_draws_follow_the_probabilities():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    found = np.bincount([draw(logits, 1.0, 1.0, 3, i) for i in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(found, [0.5, 0.3, 0.15, 0.05], atol=0.015)
    found = np.bincount([draw(logits, 1.0, 0.75, 3, i) for i in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(found, [0.625, 0.375, 0, 0], atol=0.015)
    found = np.bincount([draw(logits, 0.5, 1.0, 3, i) for i in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(found, np.square([0.5, 0.3, 0.15, 0.05]) / 0.365, atol=0.015)
    assert {draw(logits, 1.0, 1e-9, seed, 0) for seed in range(50)} == {0}
    assert {draw([5.0, 5.0], 1.0, 1.0, 2**64 - 1, i) for i in range(50)} == {0, 1}


def test_a_short_request_waits_for_one_piece_of_a_long_prompt(lm, engines):
    engine, held, seen = engines(), Held(1), []
    holding = engine.submit(Request([1], 1, until=held))
    assert held.reached.wait(WAIT)  # the engine stands still, until both have a row
    long = np.random.default_rng(0).integers(0, TINY_VOCABULARY, 400).tolist()
    first = engine.submit(Request(long, 1))
    short = engine.submit(Request([2, 3], 3, until=lambda token: seen.append(first.read)))
    with engine._changed:
        assert engine._changed.wait_for(lambda: first.phase == short.phase == "loaded", WAIT)
    held.go.set()
    assert short.result(WAIT) == Private(lm).turn([2, 3], 3)
    piece = 4 * lm.block_size
    assert short.steps == 1 and seen == [piece, 2 * piece, 3 * piece], "one piece between two of its tokens"
    assert first.result(WAIT) == Private(lm).turn(long, 1)
    assert first.steps == 400 // piece and holding.result(WAIT)


# One turn at a time, and no more turns than there is room ---------------------------------------------------------


def test_a_session_takes_one_turn_at_a_time_and_a_repeated_request_joins_it(engines, store):
    engine, name, held = engines(), store.new_name(), Held(2)
    request = Request([1], 4, session=name, create=True, until=held)
    turn = engine.submit(request)
    assert held.reached.wait(WAIT)
    with pytest.raises(SessionBusy, match="one turn at a time"):
        engine.submit(Request([2], 4, session=name))
    with pytest.raises(SessionBusy):
        engine.delete(name)
    assert engine.submit(request) is turn
    turn.leave()  # one of two
    held.go.set()
    tokens = turn.result(WAIT)
    assert len(tokens) == 4 and held.count == 4
    again = engine.submit(request)  # it is done
    assert again.result(WAIT) == tokens and (again.position, again.reason) == (turn.position, turn.reason)
    assert held.count == 4 and engine.snapshot()["replayed"] == 1
    engine.delete(name)
    with pytest.raises(NoSuchSession):
        engine.submit(Request([2], 4, session=name)).result(WAIT)


def test_a_full_engine_refuses_and_loses_nothing(lm, engines):
    engine, held = engines(max_waiting=1), [Held(1) for _ in range(ROWS)]
    running = [engine.submit(Request([i + 1], 3, until=hold)) for i, hold in enumerate(held)]
    waiting = engine.submit(Request([7], 3))
    with pytest.raises(Full, match="lets 1 wait"):
        engine.submit(Request([8], 3))
    for hold in held:
        hold.go.set()
    for i, turn in enumerate(running):
        assert turn.result(WAIT) == Private(lm).turn([i + 1], 3)
    assert waiting.result(WAIT) == Private(lm).turn([7], 3)
    assert engine.submit(Request([8], 3)).result(WAIT) == Private(lm).turn([8], 3)


# Turns that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fault", "cancel", "store", "step"])
def test_a_turn_that_fails_leaves_its_session_as_it_was(how, lm, engines, store, monkeypatch):
    engine, name, private = engines(), store.new_name(), Private(lm)
    tokens = engine.submit(Request([1, 2], 4, session=name, create=True)).result(WAIT)
    assert tokens == private.turn([1, 2], 4)
    if how == "fault":
        with pytest.raises(Unavailable, match="a fault"):
            engine.submit(Request([5] * 9, 30, session=name, until=broken(17))).result(WAIT)
    elif how == "cancel":
        held = Held(14)
        turn = engine.submit(Request([5] * 9, 30, session=name, until=held))
        assert held.reached.wait(WAIT)
        turn.leave()
        held.go.set()
        with pytest.raises(SessionBusy, match="cancelled"):
            turn.result(WAIT)
    elif how == "store":
        with monkeypatch.context() as patch:
            patch.setattr(store.log, "create", lambda path, data: (_ for _ in ()).throw(OSError("away")))
            patch.setattr(store.log, "attempts", 1)
            with pytest.raises(Unavailable, match="away"):
                engine.submit(Request([5] * 9, 12, session=name)).result(WAIT)
        assert engine.snapshot()["store_failures"]
    else:
        with monkeypatch.context() as patch:
            patch.setattr(engine.tensors, "read", lambda tokens: (_ for _ in ()).throw(MemoryError("no room")))
            with pytest.raises(Unavailable, match="no room"):
                engine.submit(Request([5], 12, session=name)).result(WAIT)
    stored = store.token(name)
    assert (stored > 1) == (how in ("fault", "cancel")), "the middle of a turn was stored"
    turn = engine.submit(Request([3], 5, session=name))
    assert turn.result(WAIT) == private.turn([3], 5) and turn.position == private.position
    assert engines().submit(Request([], 2, session=name)).result(WAIT) == private.turn([], 2)


def test_a_first_turn_that_fails_leaves_no_session(engines, store):
    engine, name = engines(), store.new_name()
    with pytest.raises(Unavailable):
        engine.submit(Request([5] * 9, 30, session=name, create=True, until=broken(9))).result(WAIT)
    assert store.token(name)
    with pytest.raises(NoSuchSession):
        engine.submit(Request([1], 2, session=name)).result(WAIT)


@pytest.mark.parametrize("first", [True, False])
def test_another_engine_goes_on_in_the_middle_of_a_turn(first, lm, engines, store):
    one, two, name, private = engines(), engines(), store.new_name(), Private(lm)
    if not first:
        assert one.submit(Request([4], 3, session=name, create=True)).result(WAIT) == private.turn([4], 3)
    again = {"session": name, "create": first, "request_id": "r", "temperature": 1.0, "seed": 5}
    with pytest.raises(Unavailable):
        one.submit(Request([1, 2, 3] * 5, 40, until=broken(23), **again)).result(WAIT)
    seen = []
    turn = two.submit(Request([1, 2, 3] * 5, 40, until=lambda token: seen.append(token), **again))
    tokens = turn.result(WAIT)
    assert len(tokens) == 40 and seen == tokens and two.snapshot()["resumed"] == 1
    assert two.snapshot()["generated_tokens"] < 40, "not all of it was computed again"
    whole = Request([1, 2, 3] * 5, 40, temperature=1.0, seed=5)
    if first:
        assert tokens == two.submit(whole).result(WAIT)
    assert turn.position == private.position + 55
    # The first engine is told that the turn is done, and goes on from it.
    assert one.submit(Request([1, 2, 3] * 5, 40, **again)).result(WAIT) == tokens
    assert one.snapshot()["replayed"] == 1
    following = one.submit(Request([2], 3, session=name))
    assert len(following.result(WAIT)) == 3 and following.position == turn.position + 4


def test_of_two_engines_that_take_a_session_at_once_one_is_refused(lm, engines, store):
    one, two, name, private, held = engines(save_every=100), engines(), store.new_name(), Private(lm), Held(3)
    one.submit(Request([1], 2, session=name, create=True)).result(WAIT)
    private.turn([1], 2)
    turn = one.submit(Request([2], 9, session=name, until=held))
    assert held.reached.wait(WAIT)
    assert two.submit(Request([3], 4, session=name)).result(WAIT) == private.turn([3], 4)
    held.go.set()
    with pytest.raises(StaleOwner, match="no longer"):
        turn.result(WAIT)
    assert one.submit(Request([4], 5, session=name)).result(WAIT) == private.turn([4], 5), "it reads what is stored"
    assert two.submit(Request([], 5, session=name)).result(WAIT) == private.turn([], 5)


def test_of_two_engines_that_are_given_the_same_request_both_answer(engines, store):
    one, two, name, held = engines(save_every=100), engines(save_every=100), store.new_name(), Held(3)
    again = {"session": name, "create": True, "request_id": "r"}
    turn = one.submit(Request([2], 9, until=held, **again))
    assert held.reached.wait(WAIT)
    tokens = two.submit(Request([2], 9, **again)).result(WAIT)
    held.go.set()
    assert turn.result(WAIT) == tokens and store.token(name) == 1


def test_an_engine_that_is_closed_fails_its_turns(lm, engines, store):
    engine, held, name = engines(save_every=100), Held(2), store.new_name()
    turn = engine.submit(Request([2], 9, session=name, create=True, until=held))
    assert held.reached.wait(WAIT)
    closing = threading.Thread(target=engine.close)
    closing.start()
    held.go.set()
    closing.join(WAIT)
    with pytest.raises(Unavailable, match="closed"):
        turn.result(WAIT)
    assert not engine.healthy() and store.token(name) == 0
    with pytest.raises(Unavailable):
        engine.submit(Request([2], 9))


def test_requests_that_do_not_fit_are_refused(engines, store):
    engine, name = engines(), store.new_name()
    wrong = {
        "max_tokens": [-1, 1.5, True], "temperature": [-1, 101, "0", float("nan")], "top_p": [0, 1.1, None],
        "seed": [-1, 2**64, 0.5], "stop_token_ids": [(1.5,)],
    }  # fmt: skip
    for option, values in wrong.items():
        for value in values:
            with pytest.raises(BadRequest, match=option) as caught:
                Request([1], **{option: value})
            assert caught.value.param == option and caught.value.status == 400
    for ids in ([TINY_VOCABULARY], [-1], [0.5], [[1]]):
        with pytest.raises(BadRequest, match="token ids from 0"):
            engine.submit(Request(ids, session=name, create=True)).result(WAIT)
    with pytest.raises(BadRequest, match="stop_token_ids"):
        engine.submit(Request([1], stop_token_ids=(99,))).result(WAIT)
    with pytest.raises(BadRequest, match="at least one token"):
        engine.submit(Request([], session=name, create=True)).result(WAIT)
    with pytest.raises(BadRequest, match="22 to 128"):
        engine.submit(Request([1], session="7"))
    with pytest.raises(NoSuchSession):
        engine.submit(Request([1], session=name)).result(WAIT)
    for settings in ({"rows": 0}, {"max_waiting": -1}, {"save_every": 0}):
        with pytest.raises(BadRequest, match=next(iter(settings))):
            engines(**settings)
    assert store.list() == []


def test_a_damaged_session_is_refused(engines, store):
    engine, name = engines(), store.new_name()
    engine.submit(Request([1], 2, session=name, create=True)).result(WAIT)
    path, data = store.log._path(name, 1), store.log.read(name, 1)
    store.log.fs.pipe_file(path, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedSession):
        engines().submit(Request([1], 2, session=name)).result(WAIT)
    store.log.fs.pipe_file(path, data)
    assert len(engines().submit(Request([1], 2, session=name)).result(WAIT)) == 2
