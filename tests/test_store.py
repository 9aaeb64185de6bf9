"""Sessions in a store: round trips, one owner at a time, deletion, expiry, damage, stores that fail now and then."""

import contextlib
import os
import pathlib
import random
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from support import TINY_VOCABULARY, tiny

import keras_fam
from keras_fam.serve import BadRequest, DamagedSession, NoSuchSession, SessionStore, StaleOwner
from keras_fam.serve import object_log as object_logs

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("safetensors")

TOKENS = np.random.default_rng(0).integers(0, TINY_VOCABULARY, (3, 23)).astype("int32")


@pytest.fixture(scope="module")
def lm():
    return tiny()


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    return str(tmp_path / "sessions") if request.param == "file" else f"memory://{tmp_path.name}/sessions"


def arrays(value):
    return {"x": np.full(4, value, "int32")}


def value(store, name):
    return int(store.read(name).arrays["x"][0])


# Round trips ----------------------------------------------------------------------------------------------------


def test_a_row_continues_elsewhere(lm, url):
    store = SessionStore(url)
    stream, other = keras_fam.StreamingModel(lm, 3), keras_fam.StreamingModel(lm, 2)
    stream.predict(TOKENS, lengths=[23, 9, 0])
    name = store.new_name()
    assert store.put(name, stream, 1) == 1
    assert SessionStore(url).get(name, other, 1) == 1
    assert other.position.tolist() == [0, 9]
    expected = stream.generate(max_new_tokens=6, lengths=[1, 0, 1], prompt=TOKENS[:, :1])[1]
    assert other.generate([[1], []], max_new_tokens=6)[1] == expected
    assert store.put(name, other, 1, token=1) == 2
    assert store.get(name, stream, 0) == 2 and stream.position[0] == 15
    assert store.list() == [name]


def test_names_cannot_be_guessed(url):
    store = SessionStore(url)
    names = {store.new_name() for _ in range(100)}
    assert len(names) == 100 and {len(name) for name in names} == {43}
    for wrong in ("", "1", "a" * 21, "../" + "a" * 22, "a" * 129, None, 7):
        with pytest.raises(BadRequest, match="22 to 128 letters"):
            store.read(wrong)
        with pytest.raises(BadRequest, match="22 to 128 letters"):
            store.write(wrong, arrays(0), {}, token=0)
    with pytest.raises(NoSuchSession, match="none named"):
        store.read(store.new_name())
    with pytest.raises(NoSuchSession):
        store.delete(store.new_name())
    assert store.list() == []


def test_old_versions_go_and_those_to_be_kept_stay(url):
    store, name = SessionStore(url), "n" * 22
    token = 0
    for i in range(1, 4):
        token = store.write(name, arrays(i), {}, token=token)
    assert store.log.versions(name) == [2, 3]
    for i in range(4, 8):
        token = store.write(name, arrays(i), {}, token=token, keep=(3,), record={"turn": i})
    assert store.log.versions(name) == [3, 6, 7]
    found = store.read(name)
    assert (found.version, found.token, found.record) == (7, 7, {"turn": 7})
    before = store.read(name, 3)
    assert (before.version, before.token, before.record, int(before.arrays["x"][0])) == (3, 7, None, 3)
    store.write(name, arrays(8), {}, token=7)
    assert store.log.versions(name) == [7, 8]


# Owners ---------------------------------------------------------------------------------------------------------


def test_a_stale_owner_is_refused_and_changes_nothing(url):
    first, second, name = SessionStore(url), SessionStore(url), "n" * 22
    one = first.write(name, arrays(1), {}, token=0)
    two = second.write(name, arrays(2), {}, token=second.read(name).token)
    for token in (0, one):
        with pytest.raises(StaleOwner, match="no longer"):
            first.write(name, arrays(9), {}, token=token)
    assert value(first, name) == 2
    first.write(name, arrays(3), {}, token=first.read(name).token)
    with pytest.raises(StaleOwner):
        second.write(name, arrays(9), {}, token=two)
    assert value(second, name) == 3 and first.log.versions(name) == [2, 3]


def test_an_owner_that_slept_while_its_number_was_used_and_freed_is_refused(url):
    store, sleeper, name = SessionStore(url), SessionStore(url), "n" * 22
    token = store.write(name, arrays(1), {}, token=0)
    stale = sleeper.read(name).token
    for i in range(2, 6):
        token = store.write(name, arrays(i), {}, token=token)
    assert stale + 1 not in store.log.versions(name), "the name is free again"
    with pytest.raises(StaleOwner):
        sleeper.write(name, arrays(99), {}, token=stale)
    with pytest.raises(StaleOwner):
        sleeper.write(name, arrays(99), {}, token=0)
    assert store.log.versions(name) == [4, 5] and value(store, name) == 5
    assert store.write(name, arrays(6), {}, token=token) == 6


def test_a_write_that_others_built_upon_before_it_returned_counts(url, monkeypatch):
    """Between creating a version and looking round, another owner may have taken the session up from it."""
    first, second, name = SessionStore(url), SessionStore(url), "n" * 22
    first.write(name, arrays(1), {}, token=0)
    versions = first.log.versions

    def late(name):
        monkeypatch.setattr(first.log, "versions", versions)
        second.write(name, arrays(3), {}, token=second.read(name).token)
        return versions(name)

    monkeypatch.setattr(first.log, "versions", late)
    assert first.write(name, arrays(2), {}, token=1) == 2
    assert value(first, name) == 3 and first.log.versions(name) == [2, 3]
    with pytest.raises(StaleOwner):
        first.write(name, arrays(9), {}, token=2)


def test_deletion_stands_against_an_owner_that_knows_nothing_of_it(url):
    store, owner, name = SessionStore(url), SessionStore(url), "n" * 22
    token = owner.write(name, arrays(1), {}, token=owner.write(name, arrays(0), {}, token=0))
    store.delete(name)
    assert store.list() == [] and store.token(name) == 0
    with pytest.raises(StaleOwner):
        owner.write(name, arrays(2), {}, token=token)
    with pytest.raises(NoSuchSession):
        owner.read(name)
    assert store.log.versions(name) == []


def test_what_an_owner_leaves_that_dies_on_a_deleted_session_is_no_session(url):
    store, name = SessionStore(url), "n" * 22
    for token in range(3):
        store.write(name, arrays(token), {}, token=token)
    data = store.log.read(name, 3)
    store.delete(name)
    store.log.create(store.log._path(name, 4), data)  # and it is killed before it looks round
    with pytest.raises(NoSuchSession):
        store.read(name)
    assert store.sweep() == 0 and store.log.versions(name) == []


def test_of_many_threads_one_writes_each_version(url):
    name, writers, rounds = "n" * 22, 6, 12
    stores = [SessionStore(url) for _ in range(writers)]
    token = stores[0].write(name, arrays(0), {}, token=0)
    won, barrier = [], threading.Barrier(writers)

    def run(store, i):
        for number in range(rounds):
            found = store.read(name)
            barrier.wait()
            with contextlib.suppress(StaleOwner):
                won.append((store.write(name, arrays(100 * i + number), {}, token=found.token), 100 * i + number))
            barrier.wait()

    threads = [threading.Thread(target=run, args=(store, i)) for i, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(version for version, _ in won) == list(range(token + 1, token + 1 + rounds))
    assert value(stores[0], name) == max(won)[1]


def test_processes_that_are_killed_leave_whole_versions(tmp_path):
    """Writers of one session count up, each from what it reads; they are killed at random moments."""
    program = textwrap.dedent("""
        import sys
        import numpy as np
        from keras_fam.serve import SessionStore, StaleOwner
        store, name = SessionStore(sys.argv[1]), "n" * 22
        print("ready", flush=True)
        while True:
            found = store.read(name)
            count = int(found.arrays["x"][0]) + 1
            try:
                store.write(name, {"x": np.full(20_000, count, "int32")}, {}, token=found.token)
            except StaleOwner:
                continue
    """)
    store, name = SessionStore(tmp_path / "s"), "n" * 22
    store.write(name, {"x": np.zeros(20_000, "int32")}, {}, token=0)
    root = str(pathlib.Path(keras_fam.__file__).parents[1])
    command, draw = [sys.executable, "-c", program, str(tmp_path / "s")], random.Random(0)
    writers = [
        subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE) for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"ready\n"
        for writer in writers:
            before = store.read(name).version
            while store.read(name).version < before + 5:
                time.sleep(draw.uniform(0, 0.1))
            writer.kill()
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            writer.stdout.close()
    found = store.read(name)
    assert set(found.arrays["x"].tolist()) == {found.version - 1}, "every version counts one more than the last"
    assert store.write(name, {"x": np.zeros(1, "int32")}, {}, token=found.token) == found.version + 1


# Expiry ---------------------------------------------------------------------------------------------------------


def test_sessions_expire(url, monkeypatch):
    now = time.time()
    store, name, other = SessionStore(url, expire_after=60), "n" * 22, "o" * 22
    token = store.write(name, arrays(1), {}, token=0)
    SessionStore(url).write(other, arrays(1), {}, token=0)
    assert store.sweep() == 0 and value(store, name) == 1
    monkeypatch.setattr(time, "time", lambda: now + 50)
    token = store.write(name, arrays(2), {}, token=token)
    monkeypatch.setattr(time, "time", lambda: now + 100)
    assert store.sweep() == 0 and value(store, name) == 2
    monkeypatch.setattr(time, "time", lambda: now + 120)
    with pytest.raises(NoSuchSession, match="expired"):
        store.read(name)
    assert store.list() == sorted([name, other])
    assert store.sweep() == 1 and store.list() == [other]
    with pytest.raises(StaleOwner):
        store.write(name, arrays(3), {}, token=token)
    for wrong in (0, -1):
        with pytest.raises(BadRequest, match="positive number of seconds"):
            SessionStore(url, expire_after=wrong)


# Faults ---------------------------------------------------------------------------------------------------------


def test_damage_is_refused(lm, url):
    store, stream, name = SessionStore(url), keras_fam.StreamingModel(lm, 1), "n" * 22
    stream.predict(TOKENS[:1])
    token = store.put(name, stream)
    path, data = store.log._path(name, token), store.log.read(name, token)
    before = stream.position.copy()
    for place in (9, len(data) // 2, len(data) - 1):
        store.log.fs.pipe_file(path, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(DamagedSession):
            store.get(name, stream)
    store.log.fs.pipe_file(path, data[:100])
    with pytest.raises(DamagedSession):
        store.get(name, stream)
    store.log.fs.pipe_file(path, data)
    with pytest.raises(DamagedSession, match="fingerprint of the weights"):
        store.get(name, keras_fam.StreamingModel(tiny(seed=1), 1))
    with pytest.raises(DamagedSession, match="block_size"):
        store.get(name, keras_fam.StreamingModel(tiny(block_size=8), 1))
    assert store.get(name, stream) == 1 and stream.position.tolist() == before.tolist() == [23]


def test_a_store_that_fails_now_and_then_loses_nothing(url, monkeypatch):
    """Calls fail before or after they had their effect, a tenth of them: writes are made once, and known."""
    store, name, draw, failed = SessionStore(url, attempts=12), "n" * 22, random.Random(0), []
    monkeypatch.setattr(object_logs.time, "sleep", lambda seconds: None)
    call = store.log._call

    def shaky(function, *args, **kwargs):
        def once(*args, **kwargs):
            chance = draw.random()
            if chance < 0.05:
                failed.append("before")
                raise OSError("the store is not there")
            result = function(*args, **kwargs)
            if chance > 0.95:
                failed.append("after")
                raise OSError("the answer was lost")
            return result

        return call(once, *args, **kwargs)

    monkeypatch.setattr(store.log, "_call", shaky)
    token = 0
    for i in range(150):
        token = store.write(name, arrays(i), {}, token=token)
        assert token == i + 1 and value(store, name) == i
    assert failed.count("before") > 20 and failed.count("after") > 20


def test_a_store_that_stays_away_is_an_error_and_writing_again_finds_out(url, monkeypatch):
    store, name = SessionStore(url, attempts=2), "n" * 22
    monkeypatch.setattr(object_logs.time, "sleep", lambda seconds: None)
    create = store.log.create

    def after(path, data):
        create(path, data)
        raise OSError("the answer was lost")

    monkeypatch.setattr(store.log, "create", after)
    token = store.write(name, arrays(1), {}, token=0)  # the second attempt finds its own bytes
    monkeypatch.setattr(store.log, "create", lambda path, data: (_ for _ in ()).throw(OSError("away")))
    with pytest.raises(OSError, match="away"):
        store.write(name, arrays(2), {}, token=token)
    assert value(store, name) == 1 and store.log.versions(name) == [1]


def test_stores_that_replace_are_refused(tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    with pytest.raises(BadRequest, match="assume_exclusive_create"):
        SessionStore(f"dir::file://{tmp_path}/x")
    pipe = MemoryFileSystem.pipe_file
    monkeypatch.setattr(
        MemoryFileSystem, "pipe_file", lambda self, path, value, mode="overwrite", **kwargs: pipe(self, path, value)
    )
    with pytest.raises(BadRequest, match="replaced it"):
        SessionStore("memory://replacing")
    assert not [path for path in fsspec.filesystem("memory").find("/replacing")]


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImportError, match=r"keras-fam\[store\]"):
        SessionStore(tmp_path)
