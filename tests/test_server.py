"""The HTTP face, talked to by OpenAI's client: texts of private streams, sessions, errors, metrics. No cluster."""

import contextlib
import json
import re
import threading
import time
import urllib.error
import urllib.request

import pytest
import support

import keras_fam
from examples.serving.small_model import Characters
from keras_fam.serve import Before, SessionEngine, SessionStore
from keras_fam.serve.http import make_app
from keras_fam.serve.protocol import parse
from keras_fam.serve.text import CHATML, ChatFormat, TurnText
from keras_fam.serve.worker import Worker

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytest.importorskip("fsspec")

MODEL, WAIT = "tiny", 120
WORDS = " abcdefghi"  # the texts of a vocabulary of 11: these, and an end


class Letters(Characters):
    end_token_id, special_token_ids, alphabet = 10, (10,), WORDS

    def __call__(self, text):
        return [self.alphabet.find(letter) % 10 for letter in text]


@pytest.fixture(scope="module")
def lm():
    import types

    lm = support.tiny(num_layers=2)
    lm.preprocessor = types.SimpleNamespace(tokenizer=Letters(), add_start_token=False)
    return lm


@contextlib.contextmanager
def serving(engine, **options):
    """The address of a server on a free port."""
    app = make_app(Worker(engine, ChatFormat("{role} {content} ", "a "), "one", **options), MODEL)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(WAIT)


@pytest.fixture(scope="module")
def engine(lm):
    with SessionEngine(lm, SessionStore("memory://test-server"), rows=2, max_waiting=1, save_every=50) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=WAIT, max_retries=0)


def complete(client, prompt, count, session=None, stream=False, **options):
    body = {"session": session} if session else {}
    options = {"model": MODEL, "temperature": 0, "max_tokens": count, "extra_body": body, "stream": stream, **options}
    return client.completions.create(prompt=prompt, **options)


def endless(lm, count):
    """A prompt of two letters after which the model does not end its text for so many tokens."""
    prompts = (a + b for a in WORDS for b in WORDS)
    stream = keras_fam.StreamingModel(lm, 1)
    for prompt in prompts:
        stream.reset_state()
        if 10 not in stream.generate([Letters()(prompt)], max_new_tokens=count)[0]:
            return prompt
    raise AssertionError("every text ends")


def private(lm, *turns):
    """`(tokens, position)` of the last of some turns `(prompt, count)` of one stream alone."""
    stream = keras_fam.StreamingModel(lm, 1)
    for prompt, count in turns:
        tokens = stream.generate([Letters()(prompt)], max_new_tokens=count, stop_token_ids=[10])[0]
    return tokens, stream.position[0]


def idle(engine):
    deadline = time.monotonic() + WAIT
    while engine.snapshot()["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def fetch(url, method="GET", body=None, headers=()):
    """`(status, headers, text)`."""
    request = urllib.request.Request(url, method=method, data=body, headers=dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=WAIT) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


# Texts ----------------------------------------------------------------------------------------------------------


def test_turns_of_a_session_are_those_of_a_private_stream(lm, client):
    stream, session, ends = keras_fam.StreamingModel(lm, 1), "new", lm.preprocessor.tokenizer.end_token_id
    for turn, prompt in enumerate(["abc", [3, 1, 4, 1, 5] * 3, "h", None, "bad cafe"]):
        ids = [Letters()(prompt) if isinstance(prompt, str) else prompt or []]
        expected = stream.generate(ids, max_new_tokens=9, stop_token_ids=[ends])[0]
        text = Letters().detokenize([i for i in expected if i != ends])
        reason = "stop" if expected[-1] == ends else "length"
        if turn % 2:
            chunks = list(complete(client, prompt, 9, session, stream=True, stream_options={"include_usage": True}))
            *pieces, usage = chunks
            assert [i for chunk in pieces for i in chunk.choices[0].token_ids] == expected
            assert "".join(chunk.choices[0].text for chunk in pieces) == text
            reasons = [chunk.choices[0].finish_reason for chunk in pieces]
            assert reasons[-1] == reason and not any(reasons[:-1]) and usage.choices == []
            found = usage
        else:
            found = complete(client, prompt, 9, session)
            (choice,) = found.choices
            assert (choice.token_ids, choice.text, choice.finish_reason) == (expected, text, reason)
        assert (found.object, found.model) == ("text_completion", MODEL)
        assert found.usage.prompt_tokens == len(ids[0]) and found.usage.completion_tokens == len(expected)
        assert found.position == stream.position[0]
        session = found.session
        assert len(session) == 43


def test_chat_sends_new_messages_only(lm, client):
    stream, session = keras_fam.StreamingModel(lm, 1), "new"
    for turn, messages in enumerate(
        [
            [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}],
            [{"role": "user", "content": [{"type": "text", "text": "ea"}, {"type": "text", "text": "d"}]}],
            [{"role": "user", "content": "fig"}],
        ]
    ):
        text = ["system be user hi a ", "\nuser ead a ", "\nuser fig a "][turn]
        expected = stream.generate([Letters()(text)], max_new_tokens=7, stop_token_ids=[10])[0]
        said = Letters().detokenize([i for i in expected if i != 10])
        options = {"model": MODEL, "messages": messages, "temperature": 0, "max_completion_tokens": 7}
        if turn == 1:
            chunks = list(client.chat.completions.create(stream=True, extra_body={"session": session}, **options))
            assert chunks[0].choices[0].delta.role == "assistant"
            assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
            assert "".join(chunk.choices[0].delta.content for chunk in chunks) == said
        else:
            found = client.chat.completions.create(extra_body={"session": session}, **options)
            message = found.choices[0].message
            assert (found.object, message.role, message.content) == ("chat.completion", "assistant", said)
            assert found.position == stream.position[0]
            session = found.session


def test_calls_without_a_session_leave_nothing(lm, client, engine):
    before = engine.store.list()
    expected = private(lm, ("abc", 4))[0]
    for _ in range(2):
        found = complete(client, "abc", 4)
        assert found.choices[0].token_ids == expected and found.session is None
    assert engine.store.list() == before


def test_stop_strings_end_the_text_and_are_read(lm, client):
    prompt = endless(lm, 30)
    text = complete(client, prompt, 30).choices[0].text
    stop = text[4:6]
    place = text.find(stop)
    for stream in (False, True):
        found = complete(client, prompt, 30, "new", stream=stream, stop=[stop, "zz"])
        parts = list(found) if stream else [found]
        assert "".join(part.choices[0].text for part in parts) == text[:place]
        assert parts[-1].choices[0].finish_reason == "stop" and parts[-1].position == 2 + place + len(stop)
        following = complete(client, [], 5, parts[-1].session)
        assert following.choices[0].text == text[place + len(stop) :][:5], "the session has read the stop string"


def test_text_up_to_a_stop_string(lm):
    def pieces(text, stops):
        turn = TurnText(lm, stops)
        found = [turn.add(i) for i in Letters()(text)]
        return found, turn.finish(), turn.stopped

    assert pieces("abcd", ["bce"]) == (["a", "", "", "bcd"], "", False)
    assert pieces("abce", ["bce"]) == (["a", "", "", ""], "", True)
    assert pieces("aab", ["ab"]) == (["", "a", ""], "", True)
    assert pieces("ab", ["bc"]) == (["a", ""], "b", False)
    assert pieces("abcdef", ["f", "cd"]) == (["a", "b", "", "", "", ""], "", True)
    assert pieces("abc", []) == (["a", "b", "c"], "", False)
    ids = TurnText(support.tiny(), [])
    assert [ids.add(7), ids.add(10), ids.finish()] == ["7", " 10", ""]


def test_chat_formats():
    messages = [{"role": "user", "content": "{hi}"}]
    for before, start in ((Before(), ""), (Before(5, "stop"), "\n"), (Before(5, "length"), "<|im_end|>\n")):
        text = CHATML.write(messages, before)
        assert text == start + "<|im_start|>user\n{hi}<|im_end|>\n<|im_start|>assistant\n"


# Once, whole, or not at all --------------------------------------------------------------------------------------


def test_a_repeated_request_is_answered_and_not_done_again(client):
    session = complete(client, "abc", 3, "new").session
    first = complete(client, "de", 6, session, extra_headers={"Idempotency-Key": "once"})
    again = complete(client, "de", 6, session, extra_headers={"Idempotency-Key": "once"})
    streamed = list(complete(client, "de", 6, session, stream=True, extra_headers={"Idempotency-Key": "once"}))
    assert first.choices[0].token_ids == again.choices[0].token_ids and first.position == again.position
    assert [i for chunk in streamed for i in chunk.choices[0].token_ids] == first.choices[0].token_ids
    assert complete(client, "de", 6, session).position > first.position


def test_a_client_that_goes_away_undoes_its_turn(lm, client, engine):
    stream, prompt = keras_fam.StreamingModel(lm, 1), endless(lm, 300)
    session = complete(client, prompt, 3, "new").session
    stream.generate([Letters()(prompt)], max_new_tokens=3)
    answer = complete(client, "", 3000, session, stream=True)
    next(iter(answer))
    answer.close()
    idle(engine)
    expected = stream.generate([Letters()("e")], max_new_tokens=3, stop_token_ids=[10])[0]
    found = complete(client, "e", 3, session)
    assert found.choices[0].token_ids == expected and found.position == stream.position[0]


def test_a_fault_within_a_stream_is_an_error_and_undone(lm, client, engine, monkeypatch):
    prompt = endless(lm, 30)
    session = complete(client, prompt, 3, "new").session
    read, count = engine.tensors.read, iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(engine.tensors, "read", lambda tokens: read(tokens) if next(count) < 4 else 1 / 0)
        given = []
        with pytest.raises(openai.APIError, match="ZeroDivisionError"):
            for chunk in complete(client, "", 20, session, stream=True):
                given += chunk.choices[0].token_ids
        assert len(given) <= 5
    monkeypatch.undo()
    found, (tokens, position) = complete(client, "d", 3, session), private(lm, (prompt, 3), ("d", 3))
    assert found.choices[0].token_ids == tokens
    assert json.loads(fetch(f"{client.base_url!s}sessions/{session}")[2])["position"] == position


# Errors ---------------------------------------------------------------------------------------------------------


def test_errors_have_the_status_and_the_form_of_the_interface(client, url):
    wrong = [
        ({"session": "short"}, 400, "session"), ({"session": 7}, 400, "session"),
        ({"session": "n" * 43}, 404, "session"),
        ({"temperature": -1}, 400, "temperature"), ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"), ({"max_tokens": -1}, 400, "max_tokens"), ({"n": 2}, 400, "n"),
        ({"logprobs": 3}, 400, "logprobs"), ({"stop": ["a"] * 5}, 400, "stop"), ({"stop": [""]}, 400, "stop"),
        ({"stream": "yes"}, 400, "stream"), ({"prompt": ["a", "b"]}, 400, "prompt"), ({"prompt": 5}, 400, "prompt"),
        ({"prompt": [99]}, 400, "token_ids"), ({"prompt": ""}, 400, "prompt"), ({"banana": 1}, 400, "banana"),
        ({"model": "gpt"}, 404, "model"), ({"seed": -1}, 400, "seed"),
    ]  # fmt: skip
    for change, status, param in wrong:
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model=MODEL, prompt="a", extra_body={"max_tokens": 2, **change})
        error = caught.value
        assert (error.status_code, error.body["param"]) == (status, param), (change, error.body)
        assert error.body["code"] and len(error.body["message"]) > 20
    for messages in ([], [{"role": "tool", "content": "a"}], [{"role": "user", "content": 5}], ["a"]):
        with pytest.raises(openai.BadRequestError, match="message"):
            client.chat.completions.create(model=MODEL, messages=messages)
    for body in (b"{", b"[]", b"\xff"):
        status, _, text = fetch(f"{url}/v1/completions", "POST", body)
        assert status == 400 and "JSON" in json.loads(text)["error"]["message"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    assert client.models.list().data[0].id == client.models.retrieve(MODEL).id == MODEL


def test_neutral_values_are_taken(client):
    options = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": None, "echo": False, "user": "me"}
    assert complete(client, "a", 1, **options).choices[0].token_ids
    with pytest.raises(TypeError):
        parse("completion", {"prompt": "a"})  # a model's name is needed


def test_busy_and_full(lm, client, engine, url, monkeypatch):
    """409 for a second turn of a session, 429 once no more may wait; nothing is lost by either."""
    session = complete(client, "abc", 3, "new").session
    go, read, held = threading.Event(), engine.tensors.read, threading.Event()

    def wait(tokens):
        held.set()
        assert go.wait(WAIT)
        return read(tokens)

    with monkeypatch.context() as patch:
        patch.setattr(engine.tensors, "read", wait)
        results = []
        calls = [("d", session), ("e", None), ("f", None)]
        threads = [
            threading.Thread(target=lambda call=call: results.append(complete(client, call[0], 2, call[1])))
            for call in calls
        ]
        try:
            for i, thread in enumerate(threads):
                thread.start()
                deadline = time.monotonic() + WAIT
                while engine.snapshot()["running"] + engine.snapshot()["waiting"] <= i:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            assert held.wait(WAIT)
            with pytest.raises(openai.ConflictError) as busy:
                complete(client, "g", 2, session)
            assert busy.value.body["code"] == "session_busy"
            status, headers, text = fetch(f"{url}/v1/sessions/{session}", "DELETE")
            assert status == 409 and json.loads(text)["error"]["code"] == "session_busy"
            body = json.dumps({"model": MODEL, "prompt": "h", "max_tokens": 2}).encode()
            status, headers, text = fetch(f"{url}/v1/completions", "POST", body)
            assert status == 429 and headers["Retry-After"] and json.loads(text)["error"]["code"] == "server_full"
        finally:
            go.set()
            for thread in threads:
                thread.join(WAIT)
    found = sorted((found.choices[0].token_ids, found.position) for found in results)
    assert found == sorted([private(lm, ("abc", 3), ("d", 2)), private(lm, ("e", 2)), private(lm, ("f", 2))])
    assert complete(client, "g", 2, session).position == private(lm, ("abc", 3), ("d", 2), ("g", 2))[1]


def test_text_needs_a_tokenizer():
    with SessionEngine(support.tiny(), rows=1) as engine, serving(engine) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        found = complete(client, [1, 2], 3)
        assert found.choices[0].text == " ".join(map(str, found.choices[0].token_ids))
        with pytest.raises(openai.BadRequestError, match="list of ids"):
            complete(client, "ab", 3)
        with pytest.raises(openai.BadRequestError, match="list of ids"):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "ab"}])


# Sessions, health and metrics -----------------------------------------------------------------------------------


def test_sessions_are_looked_up_and_deleted(lm, client, url):
    session = complete(client, "abc", 4, "new").session
    status, _, text = fetch(f"{url}/v1/sessions/{session}")
    position = private(lm, ("abc", 4))[1]
    assert status == 200 and json.loads(text) == {"id": session, "object": "session", "position": position}
    assert fetch(f"{url}/v1/sessions/{session}", "DELETE")[0] == 200
    for method in ("GET", "DELETE"):
        assert fetch(f"{url}/v1/sessions/{session}", method)[0] == 404
        assert fetch(f"{url}/v1/sessions/7", method)[0] == 400
    assert fetch(f"{url}/v1/sessions")[0] == 404, "no list: names are keys"
    with pytest.raises(openai.NotFoundError):
        complete(client, "a", 1, session)


def test_health_and_metrics(client, engine, url):
    status, _, text = fetch(f"{url}/health")
    assert status == 200 and json.loads(text) == {"status": "ok", "engines": ["one"]}
    complete(client, "abc", 4, "new")
    text = fetch(f"{url}/metrics")[2]
    sample = re.compile(r'keras_fam_(\w+)\{engine="one"(?:,(?:kind|code|le)="([^"]+)")?\} ([\d.]+)$')
    found = {}
    for line in text.splitlines():
        if not line.startswith("# "):
            name, label, value = sample.match(line).groups()
            found[name, label] = float(value)
    now = engine.snapshot()
    assert found["rows", None] == 2 and found["turns_total", None] == now["turns"] > 0
    assert found["tokens_total", "generated"] == now["generated_tokens"] > 0
    assert 0 < found["rows_read_total", None] <= 2 * found["steps_total", None]
    counts = [value for (name, _), value in found.items() if name == "first_token_seconds_bucket"]
    assert counts == sorted(counts) and counts[-1] == found["first_token_seconds_count", None]
    assert found["first_token_seconds_sum", None] > 0 and found["sessions", None] <= 2
    assert not any(name in text for name in engine.store.list()), "a name is a key"
