"""Files of sessions appear whole or not at all: failing, concurrent and killed writers."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from support import on_one_backend

from keras_fam.utils import atomic, safetensors_file

pytestmark = on_one_backend
OLD, NEW = ({"x": np.full(20_000, value, "int32")} for value in (1, 2))


@pytest.fixture(params=[True, False], ids=["locks", "no locks"])
def target(request, tmp_path, monkeypatch):
    """A session file of `OLD`, where the machine has locks or not."""
    if not request.param:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    safetensors_file.write(tmp_path / "s", OLD, {})
    return tmp_path / "s"


@pytest.mark.parametrize("call", ["ftruncate", "write", "write half", "fsync", "replace"])
def test_failing_calls_leave_the_old_file(call, target, monkeypatch):
    name, real = call.split()[0], getattr(os, call.split()[0])

    def fail(*args, **kwargs):
        if call == "write half" and len(args[1]) > 1000:
            return real(args[0], args[1][:1000])
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="injected"):
        safetensors_file.write(target, NEW, {})
    monkeypatch.setattr(os, name, real)
    np.testing.assert_array_equal(safetensors_file.read(target)[1]["x"], OLD["x"])
    assert os.listdir(target.parent) == ["s"]
    safetensors_file.write(target, NEW, {})
    np.testing.assert_array_equal(safetensors_file.read(target)[1]["x"], NEW["x"])


def test_short_writes_are_taken_up(target, monkeypatch):
    real = os.write
    monkeypatch.setattr(safetensors_file.os, "write", lambda handle, data: real(handle, data[:777]))
    safetensors_file.write(target, NEW, {})
    np.testing.assert_array_equal(safetensors_file.read(target)[1]["x"], NEW["x"])


def test_a_full_disk_leaves_the_old_file(target):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        with pytest.raises(OSError):
            safetensors_file.write(target, NEW, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    np.testing.assert_array_equal(safetensors_file.read(target)[1]["x"], OLD["x"])
    assert os.listdir(target.parent) == ["s"]


def test_leftovers_are_taken_over(tmp_path):
    (tmp_path / ".s.partial").write_bytes(bytes(500_000))  # of a process that was killed
    safetensors_file.write(tmp_path / "s", NEW, {})
    np.testing.assert_array_equal(safetensors_file.read(tmp_path / "s")[1]["x"], NEW["x"])
    assert os.listdir(tmp_path) == ["s"]


def test_links(tmp_path):
    (tmp_path / "real").mkdir()
    safetensors_file.write(tmp_path / "real/s", OLD, {})
    (tmp_path / "link").symlink_to(tmp_path / "real/s")
    safetensors_file.write(tmp_path / "link", NEW, {})
    assert (tmp_path / "link").is_symlink()
    np.testing.assert_array_equal(safetensors_file.read(tmp_path / "real/s")[1]["x"], NEW["x"])
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".t.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):  # a planted link is not followed
        safetensors_file.write(tmp_path / "t", NEW, {})
    assert (tmp_path / "precious").read_text() == "mine"


def test_writers_and_readers_at_once(target):
    failures, running = [], True

    def guarded(work):
        try:
            work()
        except BaseException as error:
            failures.append(error)

    def write(value):
        for i in range(15):
            safetensors_file.write(target, {"x": np.full(3000 * (1 + i % 3), value, "int32")}, {"value": str(value)})

    def read():
        while running:
            fields, arrays = safetensors_file.read(target)
            assert (arrays["x"] == int(fields.get("value", 1))).all()

    writers = [threading.Thread(target=guarded, args=(lambda v=v: write(v),)) for v in range(3, 7)]
    reader = threading.Thread(target=guarded, args=(read,))
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    running = False
    reader.join()
    assert not failures and os.listdir(target.parent) == ["s"]


KILLED = """
import importlib.util, sys, types
import numpy as np
sys.modules["keras_fam"] = types.SimpleNamespace(__version__="test")  # the files' modules alone: they start at once
sys.modules["keras_fam.utils"] = types.SimpleNamespace()
for name, path in (("keras_fam.utils.atomic", sys.argv[3]), ("session_file", sys.argv[1])):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
print("ready", flush=True)
i = 0
while True:
    i += 1
    module.write(sys.argv[2], {"x": np.full(200_000, 1 + i % 2, "int32")}, {"value": str(1 + i % 2)})
"""


def test_killed_writers_leave_a_whole_file(tmp_path):
    path, rng, seen = tmp_path / "s", np.random.default_rng(5), set()
    safetensors_file.write(path, OLD, {"value": "1"})
    for _ in range(10):
        command = [sys.executable, "-c", KILLED, safetensors_file.__file__, str(path), atomic.__file__]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0, 0.05))
            child.kill()
        assert child.returncode == -signal.SIGKILL
        fields, arrays = safetensors_file.read(path)
        assert (arrays["x"] == int(fields["value"])).all()
        seen.add(fields["value"])
        assert set(os.listdir(tmp_path)) <= {"s", ".s.partial"}
    safetensors_file.write(path, OLD, {})
    assert os.listdir(tmp_path) == ["s"]
