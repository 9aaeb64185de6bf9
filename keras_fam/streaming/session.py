"""Sessions on disk: the streams of a model in one safetensors file.

The header holds the model's signature and a fingerprint of its weights, so a session continues only under the model
that wrote it, on any backend. A digest covers every byte of the file, the header too. A file is replaced in one step: a
reader, or a process that is killed, finds the old session or the new one, whole. Nothing is pickled.
"""

import contextlib
import hashlib
import json

import keras
import numpy as np
from keras import ops

from keras_fam.layers.random_state_passing import RandomStatePassing
from keras_fam.layers.recurrent_layer import RecurrentLayer
from keras_fam.state import check_finite, check_structure, map_specs, named_leaves
from keras_fam.utils import safetensors_file

SAMPLE = 4096  # elements of a weight that the fingerprint reads, at most
_EXTRAS = "extras."
# Settings that change no output of a stream.
_FREE = {
    "name", "trainable", "dtype", "stateful", "kernel_initializer", "blocks", "layer_settings", "dropout",
    "stop_memory_gradient", "remat", "blocks_per_step", "backpropagation_steps", "random_state_passing",
    "scan_layers",
}  # fmt: skip


def save(path, model, state, extras=None):
    """Writes streams to one file, in the place of what is there.

    Args:
        path: the file, `*.safetensors` by convention; its folder exists.
        model: the built model that the state belongs to.
        state: `StreamState` of R ≥ 1 rows.
        extras: None, or a dict of NumPy arrays to keep beside the streams, such as `next_logits` float32 `[R, V]`.

    Raises:
        ValueError: if the state does not fit the model or holds NaN, or an extra cannot be stored.
        OSError: if the file cannot be written; an existing file is left unchanged.
        ImportError: without the safetensors package.
    """
    safetensors_file.write(path, *pack(model, state, extras))


def pack(model, state, extras=None, identity=None):
    """What a session file holds: `(arrays, fields)`, a dict of NumPy arrays and a dict of str for the header.

    Args:
        model, state, extras: see `save`.
        identity: None, or the `model_identity`, where many sessions of unchanged weights are written.

    Raises:
        ValueError: see `save`.
    """
    own, weights = identity or model_identity(model)
    rows = getattr(getattr(getattr(state, "position", None), "offset", None), "shape", (None,))[0]
    check_structure(state, model.state_spec(rows), model.name)
    if not rows:
        raise ValueError("A session holds at least one stream; received a state of 0 rows. Select the rows to save.")
    check_finite(state, model.name)
    arrays = {name: ops.convert_to_numpy(leaf) for name, leaf in named_leaves(state)}
    for name, value in (extras or {}).items():
        array = np.asarray(value)
        if not isinstance(name, str) or not name or array.dtype.name not in safetensors_file.DTYPES.values():
            raise ValueError(
                f"Extras are arrays of numbers or bools under names; received {name!r} of dtype {array.dtype}. "
                "Convert it, or leave it out."
            )
        arrays[_EXTRAS + name] = array
    phase = arrays["position.offset"].astype("int64")
    position = arrays["position.block_index"].astype("int64") * own["block_size"] + phase
    fields = {
        "rows": str(rows),
        "phase": json.dumps(phase.tolist()),
        "position": json.dumps(position.tolist()),
        "signature": json.dumps(own),
        "weights": weights,
    }
    return arrays, fields


def load(path, model, *, check_weights=True):
    """Reads the streams of a file, for the model that wrote it, under any backend.

    Args:
        path: a file that `save` wrote.
        model: a built model with the settings and weights of the one that wrote it.
        check_weights: whether the weights have to be those of the writing model. False lets streams go on under
            other weights; what their memory then means is up to the caller.

    Returns:
        `(state, extras)`: a `StreamState` of tensors, and a dict of NumPy arrays.

    Raises:
        ValueError: for a file that is truncated, changed, no session, of another version of the format, or of a model
            with other settings or weights.
        FileNotFoundError: without a file.
        ImportError: without the safetensors package.
    """
    _check_built(model)
    return unpack(*safetensors_file.read(path), path, model, check_weights=check_weights)


def unpack(fields, arrays, path, model, *, check_weights=True, identity=None):
    """`load` of what `pack` returned; `path` is what errors call it."""
    found, (own, fingerprint) = _described(fields, path), identity or model_identity(model)
    _check_signature(found["signature"], own, path, model.name)
    if check_weights and found["weights"] != fingerprint:
        raise ValueError(
            f"A session continues only under the weights that wrote it; the fingerprint of the weights in {path} "
            f"is {found['weights']:.16}…, that of {model.name} is {fingerprint:.16}…. Load those weights first, or "
            "pass `check_weights=False` to continue under other weights."
        )
    extras = {name.removeprefix(_EXTRAS): arrays[name] for name in arrays if name.startswith(_EXTRAS)}
    arrays = {name: array for name, array in arrays.items() if not name.startswith(_EXTRAS)}
    _check_arrays(arrays, found, path, model.name)
    spec = model.state_spec(found["rows"])
    tensors = iter([ops.convert_to_tensor(arrays[name], dtype=dtype) for name, _, dtype in own["leaves"]])
    state = map_specs(lambda _: next(tensors), spec)
    check_structure(state, spec, model.name)
    check_finite(state, model.name)
    return state, extras


def model_identity(model):
    """`(signature, fingerprint of the weights)` of a built model: what ties sessions to it."""
    _check_built(model)
    return signature(model), weights_fingerprint(model)


def describe(path):
    """What a session file says of itself. Reads the header alone; the digest is checked by `load`.

    Args:
        path: a file that `save` wrote.

    Returns:
        A dict: `rows` (int), `position` (tokens read by each row) and `phase` (tokens in its unfinished block), both
        lists of ints, `signature` (see `signature`), `weights` (their fingerprint), `format_version` (int),
        `keras_fam_version` (str) and `tensors` (a dict of names to `(dtype, shape)`).

    Raises:
        ValueError: if the file is no session, or of another version of the format.
        FileNotFoundError: without a file.
    """
    fields, tensors = safetensors_file.read_header(path)
    return {**_described(fields, path), "tensors": tensors}


def signature(model):
    """What a session and its model have in common, in JSON's types.

    Returns:
        A dict: `class`, `block_size`, `memory_segments`, `fam_length`, `vocabulary_size` (or None), `leaves` (lists of
        name, shape of one row, dtype) and `settings` (those that matter to a stream; layer 0's under their own names,
        of later layers only what differs, as `layers[2].rope_wavelength`).
    """
    core = getattr(model, "backbone", model)
    layers = list(getattr(core, "blocks", None) or [core])
    reader = getattr(layers[0], "attention", layers[0])
    first = _settings(layers[0])
    settings = {**_settings(core), **first}
    for i, layer in enumerate(layers[1:], 1):
        for name, value in _settings(layer).items():
            if value != first.get(name):
                settings[f"layers[{i}].{name}"] = value
    leaves = map_specs(lambda spec: keras.KerasTensor(spec.shape, spec.dtype), model.state_spec(None))
    found = {
        "class": type(model).__name__,
        "block_size": reader.block_size,
        "memory_segments": getattr(reader, "memory_segments", None),
        "fam_length": getattr(reader, "fam_length", None),
        "vocabulary_size": getattr(core, "vocabulary_size", None),
        "leaves": [(name, leaf.shape[1:], leaf.dtype) for name, leaf in named_leaves(leaves)],
        "settings": settings,
    }
    return json.loads(json.dumps(found))


def weights_fingerprint(model):
    """A hash of a model's weights, 64 hexadecimal digits; the same on every backend for the same weights.

    Of each weight (in the order of `model.weights`, LoRA included) it covers shape, dtype and at most 4096 elements at
    equal distances, so a change of a few numbers in a large weight may go unseen; a training step does not. Seeds,
    optimizer, the streams of stateful layers and what Random State Passing keeps change no output and are left out.
    """
    held = set()
    for layer in model._flatten_layers():
        if isinstance(layer, RandomStatePassing):
            held.update(id(v) for v in layer.weights)
        elif isinstance(layer, RecurrentLayer):
            held.update(id(v) for v in [*(layer._state_variables or ()), layer._needs_reset])
    digest = hashlib.blake2b(digest_size=32)
    for weight in model.weights:
        if id(weight) in held:
            continue
        shape = tuple(weight.shape)
        stride = -(-int(np.prod(shape)) // SAMPLE) | 1  # odd, so that no column of a matrix is passed over
        sample = ops.convert_to_numpy(ops.reshape(weight.value, (-1,))[::stride])
        digest.update(f"{shape} {keras.backend.standardize_dtype(weight.dtype)}\n".encode())
        digest.update(np.ascontiguousarray(sample).tobytes())
    return digest.hexdigest()


# Checks ---------------------------------------------------------------------------------------------------------


def _check_built(model):
    if not model.built:
        raise ValueError(
            f"A session belongs to a model with weights; {model.name} is not built. Build it and load its weights."
        )


def _settings(layer):
    try:
        config = layer.get_config()
    except NotImplementedError:  # a layer of the user's own, without a config
        return {}
    found = {}
    for name, value in config.items():
        with contextlib.suppress(TypeError, ValueError):  # what JSON cannot hold
            if name not in _FREE:
                found[name] = json.loads(json.dumps(value))
    return found


def _described(fields, path):
    """The dict of `describe`, without tensors, from the fields of a header."""
    try:
        found = {
            "rows": int(fields["rows"]),
            "position": [int(n) for n in json.loads(fields["position"])],
            "phase": [int(n) for n in json.loads(fields["phase"])],
            "signature": dict(json.loads(fields["signature"])),
            "weights": fields["weights"],
            "format_version": int(fields["format_version"]),
            "keras_fam_version": fields["keras_fam_version"],
        }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"The header of a session has rows, position, phase, signature and weights; that of {path} lacks some "
            f"({error!r:.100}). Restore a copy."
        ) from error
    if not found["rows"] == len(found["position"]) == len(found["phase"]) >= 1:
        raise ValueError(
            f"A session has a position and a phase for each of its rows, at least one; {path} has {found['rows']} "
            f"rows, {len(found['position'])} positions and {len(found['phase'])} phases. Restore a copy."
        )
    return found


def _check_signature(saved, own, path, owner):
    """Raises ValueError that names the first field in which two signatures differ."""

    def differ(field, theirs, mine):
        raise ValueError(
            f"A session continues only under a model like the one that wrote it: `{field}` of {owner} is {mine!r}, "
            f"that of the session in {path} is {theirs!r:.200}. Load it with the model that wrote it, or one of the "
            "same settings."
        )

    for field in ("class", "block_size", "memory_segments", "fam_length", "vocabulary_size"):
        if saved.get(field) != own[field]:
            differ(field, saved.get(field), own[field])
    theirs, mine = saved.get("leaves"), own["leaves"]
    if not isinstance(theirs, list) or len(theirs) != len(mine):
        differ("number of tensors", len(theirs) if isinstance(theirs, list) else theirs, len(mine))
    for a, b in zip(theirs, mine, strict=True):
        if a != b:
            differ(b[0], a, b)
    theirs, mine = saved.get("settings"), own["settings"]
    if not isinstance(theirs, dict):
        differ("settings", theirs, mine)
    for name in sorted({*theirs, *mine}):
        common = name.rpartition("].")[2]  # a later layer without an entry is like layer 0
        a, b = (side.get(name, side.get(common, side)) for side in (theirs, mine))
        if a is not theirs and b is not mine and a != b:  # a setting that one version alone knows is not compared
            differ(name, a, b)


def _check_arrays(arrays, found, path, owner):
    """Raises ValueError unless the arrays are those of the signature, and the rows stand where a row can stand."""
    rows, size = found["rows"], found["signature"]["block_size"]
    expected = {name: ((rows, *shape), dtype) for name, shape, dtype in found["signature"]["leaves"]}
    given = {name: (array.shape, array.dtype.name) for name, array in arrays.items()}
    for name in sorted({*expected, *given}):
        if expected.get(name) != given.get(name):
            raise ValueError(
                f"A session of {owner} with {rows} rows holds `{name}` as {expected.get(name)}; {path} holds "
                f"{given.get(name)}. Restore a copy."
            )
    offset, blocks, visible = (arrays[f"position.{name}"] for name in ("offset", "block_index", "visible_memories"))
    fam, keys = (given.get(f"layers[0].{name}", ((0, 0),))[0][1] for name in ("fam", "fam_key"))
    most = keys // fam if fam else 0
    ranges = {"offset": (offset, size - 1), "visible_memories": (visible, most), "block_index": (blocks, 2**31 - 1)}
    for name, (values, last) in ranges.items():
        if values.min() < 0 or values.max() > last:
            raise ValueError(f"`position.{name}` is 0 to {last}; {path} holds {values.tolist()}. Restore a copy.")
    if found["phase"] != offset.tolist():
        raise ValueError(
            f"The header of a session tells the offset of each row; {path} has {found['phase']} there and "
            f"{offset.tolist()} in `position.offset`. Restore a copy."
        )
