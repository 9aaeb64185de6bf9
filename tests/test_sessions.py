"""Sessions on disk: exact round trips, other backends, damaged and foreign files, killed and failing writers."""

import errno
import hashlib
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
import support
from keras import ops
from support import close, numpy

import keras_fam
from keras_fam.state import StreamState, check_finite, check_structure, map_specs, named_leaves
from keras_fam.streaming import session
from keras_fam.utils import atomic, safetensors_file

HERE = pathlib.Path(__file__).parent
V = 11
SETTINGS = {"vocabulary_size": V, "num_layers": 2, "hidden_dim": 16, "num_query_heads": 4, "num_key_value_heads": 2,
            "intermediate_dim": 24, "block_size": 4, "memory_segments": 1, "fam_length": 3,
            "attention_sinks": 2}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, V, (2, 23)).astype("int32")
OTHER_BACKEND = {"jax": "torch", "torch": "tensorflow", "tensorflow": "jax"}


def make(seed=0, dtype="float32", **changes):
    keras.utils.set_random_seed(seed)
    backbone = keras_fam.TransformerFAMBackbone(**{**SETTINGS, **changes}, dtype=dtype)
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.build()
    return lm


def random_state(model, rows=2, seed=0):
    """A state of random numbers in which rows stand at different places."""
    rng = np.random.default_rng(seed)

    def draw(spec):
        values = rng.integers(0, 2, spec.shape) if spec.dtype in ("bool", "int32") else rng.normal(size=spec.shape)
        return ops.convert_to_tensor(values, dtype=spec.dtype)

    state = map_specs(draw, model.state_spec(rows))
    most = 0 if isinstance(state.layers[0].fam, tuple) else 1
    visible = ops.convert_to_tensor(np.minimum(numpy(state.position.visible_memories), most))
    blocks = ops.convert_to_tensor(np.array([2**20 + 7, 0] * rows)[:rows].astype("int32"))
    return state._replace(position=state.position._replace(visible_memories=visible, block_index=blocks))


def same_bits(actual, expected):
    pairs = list(zip(named_leaves(actual), named_leaves(expected), strict=True))
    for (name, a), (other, b) in pairs:
        a, b = numpy(a), numpy(b)
        assert (name, a.shape, a.dtype) == (other, b.shape, b.dtype)
        assert a.tobytes() == b.tobytes(), name
    return len(pairs)


@pytest.fixture(scope="module")
def base():
    return make()


@pytest.fixture
def saved(base, tmp_path):
    """`(path, model, state)` of a session of two rows; all tests share the model."""
    model = base
    state, path = random_state(model), tmp_path / "session.safetensors"
    session.save(path, model, state, {"position": np.array([4194333, 1]), "next_logits": np.ones((2, V), "float32")})
    return path, model, state


def reseal(data):
    """Gives changed bytes a right digest, written from the description of the format."""
    size = 8 + int.from_bytes(data[:8], "little")
    start = data.index(b'"digest":"', 8, size) + 10
    blank = data[:start] + b"0" * 64 + data[start + 64 :]
    return blank[:start] + hashlib.blake2b(blank, digest_size=32).hexdigest().encode() + blank[start + 64 :]


def rewrite(data, change):
    """A session with another header: `change(header)` edits it in place or returns bytes; the digest is right."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = change(header)
    text = json.dumps(header, separators=(",", ":")).encode() if text is None else text
    text += b" " * (-len(text) % 8)
    return reseal(len(text).to_bytes(8, "little") + text + data[8 + size :])


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


# Files that are refused -----------------------------------------------------------------------------------------


def mutations(data, count, rng):
    """Pairs of what was done to a file, and its bytes."""
    header = 8 + int.from_bytes(data[:8], "little")
    digest = data.index(b'"digest":"') + 10
    for i in range(count):
        changed, kind = bytearray(data), ("bit", "header bit", "digest bit", "cut", "swap", "longer", "hole")[i % 7]
        if kind.endswith("bit"):
            low, high = {"bit": (0, len(data)), "header bit": (0, header), "digest bit": (digest, digest + 64)}[kind]
            changed[rng.integers(low, high)] ^= 1 << rng.integers(8)
        elif kind == "cut":
            del changed[rng.integers(len(data)) :]
        elif kind == "swap":
            a, b = rng.integers(len(data), size=2)
            changed[a], changed[b] = changed[b], changed[a]
        elif kind == "longer":
            place = int(rng.integers(len(data)))
            changed[place:place] = rng.bytes(int(rng.integers(1, 99)))
        else:
            place, size = int(rng.integers(len(data))), int(rng.integers(1, 512))
            changed[place : place + size] = bytes(len(changed[place : place + size]))
        if changed != data:
            yield kind, bytes(changed)


def test_changed_files_are_refused(saved):
    path, model, state = saved
    data, refused = path.read_bytes(), 0
    assert reseal(data) == data
    for kind, changed in mutations(data, 180, np.random.default_rng(2)):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"session\.safetensors"):
            session.load(path, model)
            pytest.fail(f"accepted: {kind}")
        refused += 1
    assert refused >= 150
    for place in range(64):  # every bit of the length that comes first
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        for read in (lambda: session.load(path, model), lambda: session.describe(path)):
            with pytest.raises(ValueError, match=r"session\.safetensors"):
                read()
    path.write_bytes(data)
    same_bits(session.load(path, model)[0], state)


def test_hostile_files_with_a_right_digest_do_no_harm(saved):
    path, model, _ = saved
    data, rng, refused = path.read_bytes(), np.random.default_rng(3), 0
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(150):
        changed = bytearray(data)
        changed[rng.integers(8, header)] ^= 1 << rng.integers(8)
        try:
            path.write_bytes(reseal(bytes(changed)))
        except ValueError:  # the mark of the digest itself
            continue
        try:
            state, _ = session.load(path, model)
            check_structure(state, model.state_spec(2), "what was let in")
        except ValueError:
            refused += 1
    assert refused > 100


def edit(**fields):
    return lambda header: header["__metadata__"].update(fields)


def rename(header):
    header["layers[0].kex"] = header.pop("layers[0].key")


def stretch(header):
    header["layers[0].key"]["shape"][0] = 10**15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(format_version="2", keras_fam_version="9.9"), "newer version 2, written by keras_fam 9.9"),
        (edit(format_version="0"), "unknown version 0"),
        (edit(format_version="9" * 5000), "does not"),
        (edit(format="pt"), "format 'pt'"),
        (edit(rows="3"), "3 rows, 2 positions"),
        (edit(rows="1" + "0" * 12), "2 positions"),
        (edit(phase="[0]"), "1 phases"),
        (edit(phase="[2, 2]"), "position.offset"),
        (edit(position="[" * 200_000), "lacks some"),
        (edit(signature="[]"), "`class`"),
        (edit(signature="7"), "lacks some"),
        (edit(weights=""), "fingerprint"),
        (lambda header: header["__metadata__"].pop("weights") and None, "lacks some"),
        (rename, "holds `layers"),
        (stretch, "safetensors file"),
        (lambda header: b"[" * 200_000 + b'"digest":"' + b"0" * 64 + b'"', "does not"),
        (lambda header: b'"digest":"' + b"0" * 64 + b'"', "does not"),
        (lambda header: b'{"digest":"' + b"\xff" * 64 + b'"', "does not"),
    ],
)
def test_right_digest_wrong_header(saved, change, message):
    path, model, _ = saved
    path.write_bytes(rewrite(path.read_bytes(), change))
    with pytest.raises(ValueError, match=message):
        session.load(path, model)


def test_files_of_other_kinds(saved, tmp_path):
    path, model, _ = saved
    import safetensors.numpy

    contents = [b"", b"\0" * 7, b"\0" * 8, b"\xff" * 64, b"PK\x03\x04" + bytes(500), b"{}", bytes(10_000)]
    contents += [safetensors.numpy.save({"x": np.zeros(3)}), safetensors.numpy.save({"x": np.zeros(3)}, {"a": "b"})]
    for content in contents:
        path.write_bytes(content)
        for read in (lambda: session.load(path, model), lambda: session.describe(path)):
            with pytest.raises(ValueError, match=r"session\.safetensors"):
                read()
    for read in (lambda p: session.load(p, model), session.describe):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nothing")
        with pytest.raises(ValueError, match="folder"):
            read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="device"):
        session.load(tmp_path / "pipe", model)


def test_states_that_no_stream_can_have(saved):
    path, model, state = saved
    for field, value in (("offset", 4), ("offset", -1), ("block_index", -1), ("visible_memories", 2)):
        broken = state._replace(position=state.position._replace(**{field: ops.full((2,), value, "int32")}))
        session.save(path, model, broken)
        with pytest.raises(ValueError, match=f"position.{field}"):
            session.load(path, model)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"block_size": 8}, "`block_size`"),
        ({"memory_segments": 2}, "`memory_segments`"),
        ({"fam_length": 0}, "`fam_length`"),
        ({"vocabulary_size": 12}, "`vocabulary_size`"),
        ({"num_layers": 1}, "`number of tensors`"),
        ({"num_key_value_heads": 4}, r"`layers\[0\].key`"),
        ({"dtype": "mixed_bfloat16"}, r"`layers\[0\].key`.*bfloat16"),
        ({"num_visible_memories": 2}, r"`layers\[0\].fam_key`"),
        ({"memory_update": "normalized"}, "`memory_update`.*normalized.*residual"),
        ({"rope_wavelength": 5e5}, "`rope_wavelength`"),
        ({"layer_settings": [{}, {"rope_wavelength": 5e5}]}, r"`layers\[1\].rope_wavelength`"),
        ({"logit_softcap": 3.0}, "`logit_softcap`"),
        ({"seed": 1}, "fingerprint"),
    ],
)
def test_other_models_are_refused(changes, field, saved):
    path, _, _ = saved
    with pytest.raises(ValueError, match=field):
        session.load(path, make(**changes))


def test_settings_that_change_no_output_are_free(saved):
    path, _, state = saved
    model = make(dropout=0.1, blocks_per_step=2, remat=True, random_state_passing=0.5)
    same_bits(session.load(path, model, check_weights=False)[0], state)


def test_a_part_of_the_model_is_another_model(saved):
    path, model, _ = saved
    with pytest.raises(ValueError, match=r"`class`.*Backbone.*CausalLM"):
        session.load(path, model.backbone)


def test_other_weights_on_purpose(saved):
    path, _, state = saved
    model = make()
    same_bits(session.load(path, model)[0], state)
    model.backbone.memory_prompt.assign(model.backbone.memory_prompt.value + 1.0)
    with pytest.raises(ValueError, match=r"fingerprint.*check_weights=False"):
        session.load(path, model)
    same_bits(session.load(path, model, check_weights=False)[0], state)


def test_what_save_refuses_leaves_the_old_file(saved):
    path, model, state = saved
    before = path.read_bytes()
    fam = ops.full(state.layers[1].fam.shape, float("nan"), "float32")
    bad = state._replace(layers=(state.layers[0], state.layers[1]._replace(fam=fam)))
    for broken in (bad, None, state.layers, state._replace(layers=state.layers[:1])):
        with pytest.raises(ValueError, match="state"):
            session.save(path, model, broken)
    for extras in ({"text": np.array(["a"])}, {"objects": np.array([None])}, {3: np.zeros(2)}, {"": np.zeros(2)}):
        with pytest.raises(ValueError, match="Extras"):
            session.save(path, model, state, extras)
    with pytest.raises(ValueError, match="0 rows"):
        session.save(path, model, map_specs(lambda s: ops.zeros(s.shape, s.dtype), model.state_spec(0)))
    unbuilt = keras_fam.TransformerFAMCausalLM(keras_fam.TransformerFAMBackbone(**SETTINGS))
    with pytest.raises(ValueError, match="not built"):
        session.load(path, unbuilt)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_missing_package_is_named(saved, monkeypatch):
    path, model, state = saved
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for use in (lambda: session.save(path, model, state), lambda: session.load(path, model)):
        with pytest.raises(ImportError, match=r"keras-fam\[sessions\]"):
            use()


# Writers that fail ----------------------------------------------------------------------------------------------

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
