"""What `export_serving` writes, what it refuses, and an export in a process without Keras."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import served as export
import support
from served import SESSIONS, STATELESS, Served, make_model, on_tensorflow

from keras_fam.export import export_serving

FRESH = """
import sys
sys.modules["keras"] = sys.modules["keras_fam"] = None  # an import of either fails
import numpy as np
import tensorflow as tf
signatures = tf.saved_model.load(sys.argv[1]).signatures
given = np.load(sys.argv[2])
logits = signatures["serving_default"](token_ids=tf.constant(given["tokens"]))["logits"].numpy()
difference = np.abs(logits - given["whole"]).max() / np.abs(given["whole"]).max()
assert difference <= 1e-5, difference
session = signatures["open"](count=tf.constant(1))["sessions"]
for i in range(0, 48, 16):
    chunk = tf.constant(given["tokens"][:1, i : i + 16])
    logits = signatures["append"](sessions=session, token_ids=chunk, lengths=tf.constant([16]))["logits"].numpy()
    assert np.abs(logits - given["whole"][:1, i : i + 16]).max() <= 1e-5 * np.abs(given["whole"]).max()
print("same")
"""


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


def test_a_fresh_process_without_keras(folder, tokens, whole, tmp_path):
    np.savez(tmp_path / "given.npz", tokens=tokens, whole=whole)
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder), str(tmp_path / "given.npz")], capture_output=True, text=True
    )
    assert done.stdout == "same\n", done.stderr[-2000:]


def test_warmup_requests(served, folder):
    """Each can be run any number of times, in any order, and leaves the table as it is."""
    logs = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    tf, seen = served.tf, []
    path = folder / "assets.extra" / "tf_serving_warmup_requests"
    for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        request = logs.PredictionLog.FromString(record).predict_log.request
        inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
        for name, spec in served.signatures[request.model_spec.signature_name].structured_input_signature[1].items():
            assert inputs[name].dtype == spec.dtype.as_numpy_dtype
        served(request.model_spec.signature_name, **inputs)
        seen.append(request.model_spec.signature_name)
    assert set(seen) == STATELESS | SESSIONS  # `list` needs a secret
    assert not len(served.open_sessions())


def test_what_does_not_fit_is_refused(lm, folder, monkeypatch):
    base = folder.parent
    with pytest.raises(ValueError, match="exists already"):
        export_serving(lm, base)
    with pytest.raises(ValueError, match="received Dense"):
        export_serving(keras.layers.Dense(3), base, version=2)
    for name in ("sessions", "version", "blocks_per_step", "session_calls"):
        for value in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match=f"`{name}` must be a positive integer"):
                export_serving(lm, base, **{"sessions": 1, "version": 2, name: value})
    for name, value in (("session_seconds", 0), ("session_seconds", "1"), ("admin_secret", ""), ("admin_secret", 1)):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            export_serving(lm, base, version=2, sessions=1, **{name: value})
    with pytest.raises(ValueError, match="`session_calls` needs sessions"):
        export_serving(lm, base, version=2, session_calls=1)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match=r"keras-fam\[tensorflow\]"):
        export_serving(lm, base, version=2)
    assert [path.name for path in base.iterdir()] == ["1"]


def test_a_version_appears_whole_or_not_at_all(tmp_path):
    from keras_fam.export.saved_model.folder import check_version
    from keras_fam.utils.atomic import replace_folder

    folder = check_version(tmp_path, 3, overwrite=False)
    with pytest.raises(RuntimeError), replace_folder(folder) as new:
        (new / "half").write_text("")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    for text in ("first", "second"):
        with replace_folder(folder) as new:
            (new / "whole").write_text(text)
            numbers = [path.name for path in tmp_path.iterdir() if path.name.isdigit()]
            assert numbers == (["3"] if text == "second" else [])
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    assert (folder / "whole").read_text() == "second"


def test_a_failing_second_process_says_why(lm, tmp_path, monkeypatch):
    from keras_fam.export.saved_model import export_serving as module

    monkeypatch.setattr(sys, "executable", sys.executable + "-missing")
    with pytest.raises(OSError):
        module._export_in_tensorflow_process(lm, tmp_path, {})
    script = tmp_path / "fails.sh"
    script.write_text('#!/bin/sh\necho "$KERAS_BACKEND cannot: $*" >&2\nexit 3\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(RuntimeError, match="tensorflow cannot: -m"):
        module._export_in_tensorflow_process(lm, tmp_path, {})


@on_tensorflow
def test_words_keep_every_bit():
    import tensorflow as tf

    from keras_fam.export.saved_model.float32_packing import PackedTensor

    rng = np.random.default_rng(0)
    for dtype in ("float32", "int32", "bool", "float16", "bfloat16", "float64"):
        for shape in ((), (3,), (2, 3), (5, 1)):
            x = tf.cast(rng.normal(size=(4, *shape)) * 100, dtype)
            words = PackedTensor(shape, dtype)
            encoded = tf.function(words.encode)(x)
            assert encoded.shape == (4, words.count) and encoded.dtype == tf.float32
            decoded = words.decode(encoded)
            assert decoded.dtype == x.dtype and bool(tf.reduce_all(decoded == x)), (dtype, shape)


@pytest.fixture(scope="module")
def backbone():
    return make_model(dtype="mixed_bfloat16", num_layers=1).backbone


@pytest.fixture(scope="module")
def expiring(backbone, tmp_path_factory):
    """A backbone with two sessions that expire."""
    path = tmp_path_factory.mktemp("backbone")
    return Served(export_serving(backbone, path, sessions=2, session_seconds=1000, session_calls=5))


@on_tensorflow
def test_backbones_and_half_precision(backbone, expiring, tokens):
    assert set(expiring.signatures) == (STATELESS | SESSIONS) - {"generate", "append_last", "session_generate"}
    expected = np.asarray(backbone(tokens[:2, :20])).astype("float32")
    found = expiring("serving_default", token_ids=tokens[:2, :20])["hidden"]
    assert found.dtype == np.float32
    support.close(found, expected, 5e-2)  # a bfloat16 has 8 bits, and compiled graphs round in other places
    sessions = expiring("open", count=2)["sessions"]
    parts = [expiring.append(sessions, tokens[:2, i : i + 5])["hidden"] for i in range(0, 20, 5)]
    support.close(np.concatenate(parts, axis=1), expected, 5e-2)
    assert expiring("close", sessions=sessions)["free"] == 2


@on_tensorflow
def test_sessions_expire(expiring, tokens):
    first, second = expiring("open", count=2)["sessions"]
    for _ in range(5):
        expiring.append([first], tokens[:1, :1])
    for signature in ("reset", "close"):
        expiring.refuses("may have expired", signature, sessions=[first])
    expiring.refuses("may have expired", "append", sessions=[first], token_ids=[[1]], lengths=[1])
    (third,) = expiring("open", count=1)["sessions"]  # takes the place of the first
    expiring.refuses("close some first", "open", count=1)

    _, used, *_ = expiring.module.sessions
    used.assign_sub([2000.0, 2000.0])
    expiring.refuses("may have expired", "append", sessions=[second, third], token_ids=[[1]] * 2, lengths=[1, 1])
    used.assign_add([1500.0, 1500.0])
    assert expiring.append([second], tokens[:1, :3])["positions"] == [3]  # a call counts as use
    used.assign_sub([800.0, 800.0])
    assert expiring.append([second], tokens[:1, :1])["positions"] == [4]
    expiring.refuses("may have expired", "append", sessions=[third], token_ids=[[1]], lengths=[1])
    assert expiring("close", sessions=[second])["free"] == 2


def test_quantized_models_are_exported_as_they_are(tmp_path, tokens):
    model = make_model(num_layers=1).backbone
    exact = model.predict(tokens[:2, :9], verbose=0)
    model.quantize("int8")
    expected = model.predict(tokens[:2, :9], verbose=0)
    found = Served(export_serving(model, tmp_path))("serving_default", token_ids=tokens[:2, :9])["hidden"]
    support.close(found, expected, support.INT8)
    error = support.relative(found, expected)
    assert error < support.relative(exact, expected) / 2, "the export computes with the rounded weights"
