"""Sessions on disk: files that are damaged, foreign or of another model are refused."""

import hashlib
import json
import os
import sys

import numpy as np
import pytest
from keras import ops
from session_support import SETTINGS, make, same_bits, save_two_rows

import keras_fam
from keras_fam.state import check_structure, map_specs
from keras_fam.streaming import session


@pytest.fixture(scope="module")
def base():
    return make()


@pytest.fixture
def saved(base, tmp_path):
    """`(path, model, state)` of a session of two rows; all tests share the model."""
    return save_two_rows(base, tmp_path)


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
