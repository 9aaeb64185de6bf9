"""Replicas on Ray Serve, on a cluster of this machine: sessions outlive the processes that hold them.

On one backend only: what differs between backends is below the engine, whose tests run on all.
"""

import asyncio
import contextlib
import os
import re
import signal
import socket
import threading
import time
import urllib.request

import keras
import pytest

import keras_fam
from examples.serving.small_model import VOCABULARY, small_text_model
from keras_fam.serve import BadRequest, ray_app
from keras_fam.serve.__main__ import deploy, make_parser, patiently, running
from keras_fam.serve.protocol import parse

ray = pytest.importorskip("ray")
openai = pytest.importorskip("openai")
if keras.backend.backend() != "torch":
    pytest.skip("the cluster is the same with every backend; PyTorch starts fastest", allow_module_level=True)

MODEL, WAIT, REPLICAS = "small_text_model", 180, 2


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Arguments of the server that runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = tmp_path_factory.mktemp("store")
    args = make_parser().parse_args(
        f"examples.serving.small_model:{MODEL} --store {store} --replicas {REPLICAS} --rows 3 --save-every 8 "
        f"--cpus-per-replica 0.1 --port {port}".split()
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with running(args):
            yield args
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def client(server):
    url = f"http://127.0.0.1:{server.port}/v1"
    return openai.OpenAI(base_url=url, api_key="none", timeout=WAIT, max_retries=0)


@pytest.fixture(scope="module")
def lm():
    return small_text_model()


class Private:
    def __init__(self, lm):
        self.stream, self.tokenizer = keras_fam.StreamingModel(lm, 1), lm.preprocessor.tokenizer

    def turn(self, prompt, count):
        return self.stream.generate(
            [self.tokenizer(prompt)], max_new_tokens=count, stop_token_ids=[self.tokenizer.end_token_id]
        )[0]


def complete(client, prompt, count, session, **options):
    options = {"model": MODEL, "temperature": 0, "max_tokens": count, **options}
    return client.completions.create(prompt=prompt, extra_body={"session": session}, **options)


def engines():
    """Statistics of the engines that can be reached, by name."""
    handle = ray.serve.get_deployment_handle(ray_app.ENGINE, app_name=ray_app.APP)
    found = handle.broadcast("statistics").results(timeout_s=WAIT, return_exceptions=True)
    return {name: part[name] for part in found if isinstance(part, dict) for name in part}  # not of one just lost


def kill(found):
    for statistics in found.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(statistics["pid"], signal.SIGKILL)


def test_sessions_of_several_clients(client, lm):
    def talk(i):
        private, session = Private(lm), "new"
        for turn in range(4):
            prompt, count = f"{i} says {turn}" * (1 + turn), 5 + i
            found = complete(client, prompt, count, session)
            assert found.choices[0].token_ids == private.turn(prompt, count)
            assert found.position == private.stream.position[0]
            session = found.session
        done.append(i)

    done, threads = [], [threading.Thread(target=talk, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert sorted(done) == list(range(5))
    assert sum(found["turns"] for found in engines().values()) == 20
    with pytest.raises(openai.NotFoundError):
        complete(client, "a", 1, "n" * 43)
    with urllib.request.urlopen(f"{str(client.base_url).removesuffix('/v1/')}/metrics") as response:
        turns = re.findall(r'keras_fam_turns_total\{engine="\w+"\} (\d+)', response.read().decode())
    assert len(turns) == REPLICAS and sum(map(int, turns)) == 20


def test_a_session_goes_on_in_another_replica(client, lm):
    private, before = Private(lm), engines()
    session = complete(client, "Twice", 9, "new").session
    private.turn("Twice", 9)
    (holder,) = (name for name, found in engines().items() if found["turns"] > before[name]["turns"])
    kill({holder: before[holder]})
    found = complete(client, " upon", 12, session)
    assert found.choices[0].token_ids == private.turn(" upon", 12)
    assert holder not in engines()


def test_a_turn_goes_on_when_all_replicas_are_killed(client, lm):
    while len(known := engines()) < REPLICAS:  # the one that was killed is replaced
        time.sleep(0.2)
    private, found = Private(lm), complete(client, "Once", 9, "new")
    assert found.choices[0].token_ids == private.turn("Once", 9)
    expected, given = private.turn(" upon", 400), []
    for chunk in complete(client, " upon", 400, found.session, stream=True):
        given += chunk.choices[0].token_ids
        if len(given) > 30 and known:
            kill(known)
            known = {}
    assert given == expected and chunk.position == private.stream.position[0]
    assert sum(found["resumed"] for found in engines().values()) == 1, "not from the start of the turn"
    assert complete(client, " a", 5, found.session).choices[0].token_ids == private.turn(" a", 5)


def test_sessions_stay_when_the_server_shrinks(server, client, lm):
    """Both of two sessions, one of which moves; the turn that runs meanwhile ends where it is."""
    while len(engines()) < REPLICAS:
        time.sleep(0.2)
    private = [Private(lm) for _ in range(2)]
    found = [complete(client, text, 5, "new") for text in ("One", "Two")]
    for answer, own, text in zip(found, private, ("One", "Two"), strict=True):
        assert answer.choices[0].token_ids == own.turn(text, 5)
    given, shrinking, count = [], None, 1000  # tokens that take longer than Serve waits by default (20 s)
    for chunk in complete(client, " more", count, found[0].session, stream=True):
        given += chunk.choices[0].token_ids
        if shrinking is None and len(given) > 10:
            server.replicas = 1
            shrinking = threading.Thread(target=deploy, args=(server,))
            shrinking.start()
    assert given == private[0].turn(" more", count)
    shrinking.join(WAIT)
    while len(engines()) > 1:
        time.sleep(0.2)
    for answer, own in zip(found, private, strict=True):
        assert complete(client, " so", 4, answer.session).choices[0].token_ids == own.turn(" so", 4)


# Without a cluster ----------------------------------------------------------------------------------------------


def test_a_slow_start_is_waited_for():
    calls = []

    def start():
        calls.append(None)
        if len(calls) < 3:
            raise TimeoutError("HTTP proxies not available after 60s.")
        return "started"

    assert patiently(start, TimeoutError) == "started" and len(calls) == 3
    calls.clear()
    with pytest.raises(TimeoutError, match="60s"):
        patiently(start, (TimeoutError, OSError), attempts=2)
    assert len(calls) == 2


class Handle:
    """A handle whose replicas give out these events; an exception among them is raised."""

    def __init__(self, *replicas):
        self.replicas, self.turn, self.calls = list(replicas), self, []

    def options(self, **options):
        self.given = options
        return self

    def remote(self, call):
        self.calls.append(call)
        events = self.replicas.pop(0)

        async def give():
            for event in events:
                if isinstance(event, Exception):
                    raise event
                yield event

        return Events(give())


class Events:
    """What a streaming call returns: events that can be cancelled."""

    def __init__(self, events):
        self.events = events

    def __aiter__(self):
        return self.events

    def cancel(self):
        pass


def tokens(index, *ids):
    return {"index": index, "tokens": list(ids), "pieces": [f"<{i}>" for i in ids]}


DONE = {"done": "length", "text": "", "tokens": [], "position": 9, "prompt_tokens": 1, "completion_tokens": 5}


def collect(handle, session="n" * 43):
    call = parse("completion", {"model": "m", "prompt": [1], "session": session, "stream": True}, "m")

    async def run():
        return [event async for event in ray_app.Replicas(handle).turn(call)]

    return asyncio.run(run())


def test_tokens_are_given_out_once(monkeypatch):
    monkeypatch.setattr(ray_app, "PAUSE", 0)
    lost = ray.exceptions.ActorDiedError()
    closed = {"error": {"message": "closed"}, "status": 503}
    handle = Handle(
        [tokens(0, 5, 6), tokens(2, 7), lost],
        [lost],
        [tokens(0, 5), closed],
        [tokens(0, 5, 6, 7, 8), tokens(4, 9), DONE],
    )
    assert collect(handle) == [tokens(0, 5, 6), tokens(2, 7), tokens(3, 8), tokens(4, 9), DONE]
    assert len({call["request_id"] for call in handle.calls}) == 1 and len(handle.calls) == 4
    assert handle.given["multiplexed_model_id"] not in ("", "n" * 43), "the name of a session is a key"
    assert collect(Handle([{"error": {}, "status": 404}])) == [{"error": {}, "status": 404}]


def test_a_turn_that_nobody_takes_up_is_an_error(monkeypatch):
    monkeypatch.setattr(ray_app, "PAUSE", 0.01)
    monkeypatch.setattr(ray_app, "PATIENCE", 0.05)
    (event,) = collect(Handle(*[[ray.exceptions.ActorDiedError()]] * 100))
    assert event["status"] == 503 and "Idempotency-Key" in event["error"]["message"]
    (event,) = collect(Handle([ray.serve.exceptions.BackPressureError(1, 1)]))
    assert event["status"] == 429


@pytest.mark.parametrize("address", [None, "ray://there:10001"])
def test_ray_is_started_unless_there_is_an_address(monkeypatch, address):
    """Without one, the server must not join a cluster that happens to run on this machine, and end what is there."""
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options["address"]))
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # another server runs here
    monkeypatch.setattr(ray.serve, "start", lambda **options: started.append(1 / 0))
    started, address_option = [], [] if address is None else ["--address", address]
    with pytest.raises(ZeroDivisionError), running(make_parser().parse_args(["m", "--store", "s", *address_option])):
        pass
    assert started == [address or "local"]


def test_what_cannot_be_served_is_refused(tmp_path):
    with pytest.raises(BadRequest, match="memory://"):
        ray_app.make_application("model.keras", "memory://here")
    with pytest.raises(BadRequest, match="no such file"):
        ray_app.load_model(str(tmp_path / "model.keras"))
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]).save(tmp_path / "other.keras")
    with pytest.raises(BadRequest, match="Sequential"):
        ray_app.load_model(str(tmp_path / "other.keras"))
    lm = ray_app.load_model("examples.serving.small_model:small_model")
    assert lm.built and lm.backbone.vocabulary_size == VOCABULARY
    lm.save(tmp_path / "model.keras")
    lm.save_to_preset(tmp_path / "preset")
    for source in ("model.keras", "preset"):
        assert ray_app.load_model(str(tmp_path / source)).built
