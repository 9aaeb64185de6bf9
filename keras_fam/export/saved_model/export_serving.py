"""Export for TF Serving: a SavedModel with flat, named signatures, and sessions that live on the server."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import keras

from keras_fam.export.saved_model.folder import check_version
from keras_fam.export.saved_model.serving_functions import Reader, tensorflow
from keras_fam.export.saved_model.session_table import SessionLimits, SessionTable
from keras_fam.export.saved_model.signatures import stateless_signatures
from keras_fam.export.saved_model.warmup import write_warmup
from keras_fam.models.transformer_fam_backbone import TransformerFAMBackbone
from keras_fam.models.transformer_fam_causal_lm import TransformerFAMCausalLM
from keras_fam.utils.atomic import replace_folder


def export_serving(
    model,
    path,
    sessions: int | None = None,
    version: int = 1,
    *,
    session_seconds: float | None = None,
    session_calls: int | None = None,
    admin_secret: str | None = None,
    blocks_per_step: int = 4,
    overwrite: bool = False,
):
    """Writes a model as a SavedModel for TF Serving, from any of the three backends.

    ```python
    keras_fam.export_serving(lm, "served", sessions=64)  # writes served/1
    ```

    The export needs neither keras_fam nor Keras to run. In Python:

    ```python
    signatures = tf.saved_model.load("served/1").signatures
    session = signatures["open"](count=tf.constant(1))["sessions"]
    for chunk in ([[5, 6, 7]], [[8, 9]]):  # the server remembers: send new tokens only
        results = signatures["append_last"](
            sessions=session, token_ids=tf.constant(chunk), lengths=tf.constant([len(chunk[0])])
        )
    results["logits"]  # float32 [1, V] after all five tokens
    ```

    Every signature takes and returns flat, named tensors; B, T, R, N and K may differ from call to call.

    | signature | inputs | outputs |
    | --- | --- | --- |
    | `serving_default` | `token_ids` `[B, T]` | `logits` `[B, T, V]` of whole sequences |
    | `padded` | `token_ids`, `padding_mask` bool `[B, T]` | `logits`, zeros at padding |
    | `init_state` | `batch_size` | `state_…`, the initial state of B streams |
    | `step` | `token_ids`, `lengths` `[B]`, `state_…` | `logits`, zeros past each row's length; `state_…` |
    | `generate` | `token_ids`, `lengths`, options, `state_…` | `tokens` `[B, N]`, `lengths` `[B]`, `state_…` |
    | `open` | `count` | `sessions` int64 `[count]`, their numbers |
    | `append` | `sessions` `[R]`, `token_ids` `[R, T]`, `lengths` `[R]` | `logits`, `positions` int64 `[R]` |
    | `append_last` | the same | `logits` `[R, V]` after each session's last token, `positions` |
    | `session_generate` | the same and options | `tokens`, `lengths`, `positions` |
    | `reset`, `close` | `sessions` | `positions`; `free`, how many sessions can be opened |
    | `list` (with `admin_secret`) | `count`, `secret` | `sessions`, the first `count` open sessions |

    Numbers are int32 unless stated otherwise, logits float32. Options of generation: `max_new_tokens` N,
    `temperature` (float32, 0 is greedy), `top_k` (0 keeps all tokens), `seed` `[B]` (a row's draws depend on its seed
    and position only), `stop_tokens` `[K]` (a row ends with the first of them). Generated tokens are read like any
    others, so a stream continues after them; a row with `lengths` 0 continues without a prompt. A backbone has
    `hidden` `[B, T, D]` instead of logits, and no signatures that generate.

    A session is one stream whose state stays on the server. Calls for different sessions run concurrently, if the
    server has at least two inter-op threads (by default one per core). Of two concurrent calls for the same session
    one is refused. A call that fails, for whatever reason, leaves its sessions as they were; a number that is not
    open, or that a call names twice, is an InvalidArgument error. Session numbers are random 63-bit integers: a client
    that knows a number can use, reset and close that session, and nothing lets it find the numbers of others.

    On JAX and torch the model is saved, and exported by a second Python process with TensorFlow as its backend.
    Quantized models (int8, int4, float8) export as they are.

    Args:
        model: a `TransformerFAMCausalLM` or a `TransformerFAMBackbone`.
        path: base folder of the served model; the export is `path/<version>`, which appears complete or not at all.
        sessions: None (no sessions), or how many can be open at a time. Their table is allocated by the first `open`.
        version: positive integer; TF Serving serves the largest.
        session_seconds: None, or idle seconds after which a session expires. The place of an expired session is free
            for the next `open`; calls for it fail like those for a closed one.
        session_calls: None, or after how many calls (`append`, `append_last`, `session_generate`, `reset`) a session
            expires.
        admin_secret: None (no `list`), or the string that `list` requires. Whoever has it can close any session, by
            its number. The export contains keyed hashes of it, not the string.
        blocks_per_step: how many blocks of a prompt are read at a time by `generate`, `session_generate` and
            `append_last`; no result changes.
        overwrite: whether an existing version is replaced.

    Returns:
        `pathlib.Path` of the version's folder.

    Raises:
        ValueError: for an unsupported model or an invalid argument.
        ImportError: if TensorFlow is missing.
        RuntimeError: if the second process fails, with its error output.
    """
    settings = {
        "sessions": sessions,
        "session_seconds": session_seconds,
        "session_calls": session_calls,
        "admin_secret": admin_secret,
        "blocks_per_step": blocks_per_step,
    }
    _check(model, settings)
    folder = check_version(path, version, overwrite)
    if not model.built:
        model.build()
    if keras.backend.backend() != "tensorflow":
        _export_in_tensorflow_process(model, path, {**settings, "version": version, "overwrite": overwrite})
        return folder
    tf = tensorflow()
    reader = Reader(model, blocks_per_step * getattr(model, "backbone", model).block_size)
    signatures = stateless_signatures(reader)
    module = tf.Module()
    module.weights = [variable.value for variable in model.variables]
    if sessions is not None:
        table = SessionTable(reader, sessions, SessionLimits(session_seconds, session_calls), admin_secret)
        module.sessions = table.variables()
        signatures |= table.signatures()
    with replace_folder(folder) as new:  # whose temporary name is no number: servers ignore it
        tf.saved_model.save(module, str(new), signatures=signatures)
        write_warmup(new, reader, pathlib.Path(path).name, sessions)
    return folder


def _check(model, settings):
    if not isinstance(model, TransformerFAMCausalLM | TransformerFAMBackbone):
        raise ValueError(
            "`export_serving` takes a TransformerFAMCausalLM or a TransformerFAMBackbone; received "
            f"{type(model).__name__}. Export other Keras models with `model.export(path)`."
        )
    for name in ("sessions", "session_calls", "blocks_per_step"):
        value = settings[name]
        if value is None and name != "blocks_per_step":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer; received {value!r}.")
    seconds, secret = settings["session_seconds"], settings["admin_secret"]
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0):
        raise ValueError(f"`session_seconds` must be a positive number; received {seconds!r}.")
    if secret is not None and (not isinstance(secret, str) or not secret):
        raise ValueError(f"`admin_secret` must be a non-empty string; received a {type(secret).__name__}.")
    if settings["sessions"] is None:
        for name in ("session_seconds", "session_calls", "admin_secret"):
            if settings[name] is not None:
                raise ValueError(f"`{name}` needs sessions; received sessions=None. Pass `sessions=N`.")


def _export_in_tensorflow_process(model, path, settings):
    """Saves the model and exports it in a process whose backend is TensorFlow."""
    if importlib.util.find_spec("tensorflow") is None:
        tensorflow()  # says what to install
    with tempfile.TemporaryDirectory() as temporary:
        saved = pathlib.Path(temporary) / "model.keras"
        model.save(saved)
        package = str(pathlib.Path(__file__).parents[3])
        known = os.environ.get("PYTHONPATH")
        environment = {
            **os.environ,
            "KERAS_BACKEND": "tensorflow",
            "PYTHONPATH": package if not known else os.pathsep.join([package, known]),
            "CUDA_VISIBLE_DEVICES": "-1",  # writing a graph needs no accelerator, and this process may occupy it
        }
        environment.pop("XLA_FLAGS", None)  # TensorFlow's XLA refuses flags of another version
        command = [sys.executable, "-m", "keras_fam.export", str(saved), str(path), "-"]
        done = subprocess.run(
            command, env=environment, input=json.dumps(settings), capture_output=True, text=True, errors="replace"
        )
    if done.returncode:
        raise RuntimeError(
            "The export runs in a second process with KERAS_BACKEND=tensorflow, which loads the saved model, and "
            "that process failed. If the model has custom layers, register them and make them importable there; "
            f"otherwise its last lines name the cause:\n{done.stderr[-4000:]}"
        )
