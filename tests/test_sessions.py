"""Sessions on disk: exact round trips, and other backends that go on."""

import json
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import support
from keras import ops
from session_support import TOKENS, V, make, random_state, same_bits, save_two_rows
from support import close, numpy

import keras_fam
from keras_fam.state import StreamState, check_finite, check_structure
from keras_fam.streaming import session
from keras_fam.utils import safetensors_file

HERE = pathlib.Path(__file__).parent
OTHER_BACKEND = {"jax": "torch", "torch": "tensorflow", "tensorflow": "jax"}


@pytest.fixture(scope="module")
def base():
    return make()


@pytest.fixture
def saved(base, tmp_path):
    """`(path, model, state)` of a session of two rows; all tests share the model."""
    return save_two_rows(base, tmp_path)


# Round trips ----------------------------------------------------------------------------------------------------


def test_every_shape_of_state_comes_back_bit_for_bit(tmp_path):
    path, shapes = tmp_path / "session.safetensors", {}
    sizes = ("memory_segments", "num_key_value_heads", "fam_length", "num_visible_memories", "fam_query")
    for variant, changes in support.VARIANTS.items():
        shapes.setdefault(tuple(changes.get(name) for name in sizes), variant)
    assert len(shapes) >= 10
    for variant in shapes.values():
        block, *_ = support.make(variant)
        state = random_state(block)
        session.save(path, block, state)
        again, extras = session.load(path, block)
        assert isinstance(again, StreamState) and extras == {}
        assert same_bits(again, state) >= 6, variant
        check_structure(again, block.state_spec(2), variant)
        check_finite(again, variant)


@pytest.mark.parametrize("case", ["bswa_m0", "static_memories_2", "bfloat16"])
def test_continuing_is_never_having_stopped(case, tmp_path):
    path = tmp_path / "session.safetensors"
    model = support.make("fam", dtype=case)[0] if case == "bfloat16" else support.make(case)[0]
    chunk = np.random.default_rng(1).normal(size=(2, 4, support.HIDDEN_DIM)).astype("float32")
    stream = keras_fam.StreamingModel(model, 2)
    stream.predict(chunk, lengths=[4, 3])
    session.save(path, model, stream.state, {"position": stream.position})
    described = session.describe(path)
    assert described["position"] == [4, 3] and described["phase"] == [0, 3]
    assert described["tensors"]["layers[0].key"][0] == ("BF16" if case == "bfloat16" else "F32")
    before = stream.state
    expected, last = stream.predict(chunk[::-1], lengths=[2, 4]), stream.state
    state, extras = session.load(path, model)
    same_bits(state, before)
    assert extras["position"].dtype == "int64" and extras["position"].tolist() == [4, 3]
    stream.set_state(state)
    assert stream.position.tolist() == [4, 3]
    np.testing.assert_array_equal(stream.predict(chunk[::-1], lengths=[2, 4]), expected)
    same_bits(stream.state, last)


def test_streams_are_saved_and_loaded_by_row(tmp_path):
    """A row goes on in another row of another stream; a row that has read nothing is saved, too."""
    path, model = tmp_path / "rows.safetensors", make()
    stream, other = keras_fam.StreamingModel(model, 3), keras_fam.StreamingModel(model, 2)
    stream.predict(TOKENS[[0, 1, 0], :7], lengths=[7, 6, 0])
    stream.save_state(path, rows=[2, 1])
    other.predict(TOKENS[:, :3])
    before = [numpy(x) for x in keras.tree.flatten(other.state)]
    with pytest.raises(ValueError, match="Name 2 rows"):
        other.load_state(path, rows=[0])
    for a, b in zip(keras.tree.flatten(other.state), before, strict=True):
        np.testing.assert_array_equal(numpy(a), b)
    other.load_state(path)
    assert other.position.tolist() == [0, 6]
    np.testing.assert_array_equal(numpy(other.next_logits)[1], numpy(stream.next_logits)[1])
    assert np.isnan(numpy(other.next_logits)[0]).all()
    close(other.predict(TOKENS[:, :4])[1], stream.predict(TOKENS[[0, 1, 1], :4])[1], support.SPLIT)
    close(other.predict(TOKENS[:, 4:9])[0], numpy(model(TOKENS[:1, :9]))[0, 4:], support.SPLIT)


def test_half_precision_is_stored_as_such(tmp_path):
    model, path = make(dtype="mixed_bfloat16", num_layers=1), tmp_path / "session.safetensors"
    state = random_state(model)
    session.save(path, model, state)
    tensors = session.describe(path)["tensors"]
    assert tensors["layers[0].key"] == ("BF16", (2, 8, 2, 4)) and tensors["layers[0].fam"] == ("F32", (2, 3, 16))
    same_bits(session.load(path, model)[0], state)


def test_extras_of_all_dtypes(saved):
    path, model, state = saved
    extras = {
        name: np.arange(6).reshape(2, 3).astype(name) for name in safetensors_file.DTYPES.values() if name[0] != "b"
    }
    extras |= {"bool": np.array([[True], [False]]), "empty": np.zeros((0, 3), "float32"), "scalar": np.array(7)}
    extras["not contiguous"] = np.arange(12.0).reshape(3, 4).T[::2]
    session.save(path, model, state, extras)
    _, again = session.load(path, model)
    assert set(again) == set(extras)
    for name, value in extras.items():
        assert again[name].dtype == value.dtype and again[name].shape == value.shape
        np.testing.assert_array_equal(again[name], value)


def test_describe_reads_no_tensors(saved, monkeypatch):
    path, model, _ = saved
    monkeypatch.setitem(sys.modules, "safetensors", None)
    os.truncate(path, path.stat().st_size - 1)  # a lost tensor byte does not matter here
    found = session.describe(path)
    assert found["rows"] == 2 and found["position"] == [4 * (2**20 + 7) + found["phase"][0], found["phase"][1]]
    assert found["format_version"] == 1 and found["keras_fam_version"] == keras_fam.__version__
    assert found["weights"] == session.weights_fingerprint(model)
    assert found["signature"] == session.signature(model)
    assert found["signature"]["class"] == "TransformerFAMCausalLM" and found["signature"]["vocabulary_size"] == V
    assert ["layers[0].key", [8, 2, 4], "float32"] in found["signature"]["leaves"]
    assert found["signature"]["settings"]["rope_wavelength"] == 10_000.0
    assert found["tensors"]["extras.position"] == ("I64", (2,))


def test_nothing_is_pickled(saved):
    text = (HERE.parent / "keras_fam/streaming/session.py").read_text() + (
        HERE.parent / "keras_fam/utils/safetensors_file.py"
    ).read_text()
    assert not re.search(r"import (pickle|marshal|shelve)|allow_pickle|np\.load|\beval\b|\bexec\b", text)
    import safetensors.numpy

    tensors = safetensors.numpy.load(saved[0].read_bytes())  # any reader of safetensors reads it
    assert tensors["layers[0].key"].shape == (2, 8, 2, 4)


# Other backends -------------------------------------------------------------------------------------------------


def go_on(folder):
    """Run in a process with another backend: loads weights and session, goes on, and saves."""
    folder = pathlib.Path(folder)
    model = make(seed=7, num_layers=1)
    model.load_weights(folder / "lm.weights.h5")
    state, extras = session.load(folder / "session.safetensors", model)
    stream = keras_fam.StreamingModel(model, 2)
    stream.set_state(state)
    assert (stream.position == extras["position"]).all()
    np.save(folder / "outputs.npy", stream.predict(TOKENS[:, 4:8], lengths=[4, 3]))
    session.save(folder / "back.safetensors", model, stream.state)
    (folder / "report.json").write_text(
        json.dumps({"backend": keras.backend.backend(), "weights": session.weights_fingerprint(model)})
    )


def test_another_backend_goes_on_and_hands_back(tmp_path):
    pytest.importorskip(OTHER_BACKEND[keras.backend.backend()])
    model = make(num_layers=1)
    model.save_weights(tmp_path / "lm.weights.h5")
    stream = keras_fam.StreamingModel(model, 2)
    stream.predict(TOKENS[:, :4], lengths=[4, 3])
    session.save(tmp_path / "session.safetensors", model, stream.state, {"position": stream.position})
    other = OTHER_BACKEND[keras.backend.backend()]
    environment = {**os.environ, "KERAS_BACKEND": other, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    command = [sys.executable, "-c", "import sys, test_sessions; test_sessions.go_on(sys.argv[1])", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == {"backend": other, "weights": session.weights_fingerprint(model)}
    close(np.load(tmp_path / "outputs.npy"), stream.predict(TOKENS[:, 4:8], lengths=[4, 3]), support.SPLIT)
    state, _ = session.load(tmp_path / "back.safetensors", model)
    support.states_close(state, stream.state, support.SPLIT)
    stream.set_state(state)
    assert stream.position.tolist() == [8, 6]


def test_fingerprint_covers_weights_and_nothing_else():
    model = make(random_state_passing=0.8, dropout=0.1)
    first = session.weights_fingerprint(model)
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert session.weights_fingerprint(make(random_state_passing=0.8, dropout=0.1)) == first
    passing = model.backbone.random_state_passing
    passing.memory.assign(ops.ones(passing.memory.shape))
    passing.filled.assign(True)
    model.backbone.seed_generator.next()
    model.compile()
    model.optimizer.build(model.trainable_variables)
    assert session.weights_fingerprint(model) == first
    seen, weights = {first}, model.trainable_variables
    for i, weight in enumerate(weights):
        before = numpy(weight)
        changed = before.copy()
        changed.flat[(97 * i) % changed.size] += 1e-3
        weight.assign(changed)
        seen.add(session.weights_fingerprint(model))
        weight.assign(before)
    assert len(seen) == 1 + len(weights)
    assert session.weights_fingerprint(model) == first
    model.backbone.blocks[0].attention.query.enable_lora(2)
    seen.add(session.weights_fingerprint(model))
    assert len(seen) == 2 + len(weights)


def test_fingerprint_samples_large_weights_evenly():
    layer = keras.layers.Dense(64, use_bias=False)
    layer.build((None, 1024))
    first, kernel = session.weights_fingerprint(layer), numpy(layer.kernel)
    for column in range(64):
        changed = kernel.copy()
        changed[:, column] += 1
        layer.kernel.assign(changed)
        assert session.weights_fingerprint(layer) != first, column
    layer.kernel.assign(kernel)
    assert session.weights_fingerprint(layer) == first


def test_stream_of_a_stateful_layer_is_no_weight():
    block = keras_fam.TransformerFAMBlock(2, 4, 8, block_size=4, memory_segments=1, fam_length=2, stateful=True)
    block.build((2, None, 8))
    before = session.weights_fingerprint(block)
    for variable in [*block._state_variables, block._needs_reset]:
        variable.assign(ops.ones(variable.shape, variable.dtype))
    assert session.weights_fingerprint(block) == before
