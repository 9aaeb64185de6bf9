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
from keras_fam.export.saved_model.session_table import SessionTable
from keras_fam.export.saved_model.signatures import stateless_signatures
from keras_fam.export.saved_model.warmup import write_warmup
from keras_fam.models.transformer_fam_backbone import TransformerFAMBackbone
from keras_fam.models.transformer_fam_causal_lm import TransformerFAMCausalLM
from keras_fam.utils.atomic import replace_folder


def export_serving(
    model, path, sessions: int | None = None, version: int = 1, *, blocks_per_step: int = 4, overwrite: bool = False
):
    """Writes a model for TF Serving, from any of the three backends.

    ```python
    keras_fam.export_serving(lm, "served", sessions=64)  # writes served/1
    ```

    Every signature takes and gives flat, named tensors; B, T, R, N and K may differ from call to call.

    | signature | inputs | outputs |
    | --- | --- | --- |
    | `serving_default` | `token_ids` `[B, T]` | `logits` `[B, T, V]` of whole sequences |
    | `padded` | `token_ids`, `padding_mask` bool `[B, T]` | `logits`, zeros at padding |
    | `init_state` | `batch_size` | `state_…`, of B streams that start anew |
    | `step` | `token_ids`, `lengths` `[B]`, `state_…` | `logits`, zeros behind a row's length; `state_…` |
    | `generate` | `token_ids`, `lengths`, options, `state_…` | `tokens` `[B, N]`, `lengths` `[B]`, `state_…` |
    | `open` | `count` | `sessions` int64 `[count]`, their numbers |
    | `list` | `count` | `sessions`, the numbers of the first `count` open sessions |
    | `append` | `sessions` `[R]`, `token_ids` `[R, T]`, `lengths` `[R]` | `logits`, `positions` int64 `[R]` |
    | `append_last` | the same | `logits` `[R, V]` behind each session's last token, `positions` |
    | `session_generate` | the same and options | `tokens`, `lengths`, `positions` |
    | `reset`, `close` | `sessions` | `positions`; `free`, the sessions that can be opened |

    Numbers are int32 where nothing else is said, logits float32. Options of generation: `max_new_tokens` N,
    `temperature` (float32, 0 takes the best token), `top_k` (0 leaves all tokens in), `seed` `[B]` (what a row draws
    follows from its seed and position alone), `stop_tokens` `[K]` (a row ends with the first of them). Generated
    tokens are read like any others, so a stream goes on behind them; a row with `lengths` 0 goes on without a prompt.
    A backbone has `hidden` `[B, T, D]` in place of logits, and nothing that generates.

    A session is one stream whose state stays on the server. Calls for different sessions run side by side. Of two
    calls for the same session at the same time one is refused. A call that fails, for whatever reason, leaves its
    sessions as they were; a number that is not open, or that a call names twice, is an InvalidArgument error.

    On JAX and torch the model is saved, and written by a second Python process with TensorFlow as its backend.

    Args:
        model: a `TransformerFAMCausalLM` or a `TransformerFAMBackbone`.
        path: base folder of the served model; the export is `path/<version>`, which appears whole or not at all.
        sessions: None (no sessions), or how many can be open at a time. Their table is allocated by the first `open`.
        version: number of the version, at least 1; TF Serving serves the largest.
        blocks_per_step: how many blocks of a prompt are read at a time by `generate`, `session_generate` and
            `append_last`; no result changes.
        overwrite: whether an existing version is replaced.

    Returns:
        `pathlib.Path` of the version's folder.

    Raises:
        ValueError: for a model, a number or a version that does not fit.
        ImportError: if TensorFlow is missing.
        RuntimeError: if the second process fails, with what it said.
    """
    if not isinstance(model, TransformerFAMCausalLM | TransformerFAMBackbone):
        raise ValueError(
            "`export_serving` takes a TransformerFAMCausalLM or a TransformerFAMBackbone; received "
            f"{type(model).__name__}. Export other Keras models with `model.export(path)`."
        )
    for name, value in (("sessions", sessions), ("blocks_per_step", blocks_per_step)):
        if value is None and name == "sessions":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` is a whole number of at least 1; received {value!r}.")
    folder = check_version(path, version, overwrite)
    if not model.built:
        model.build()
    if keras.backend.backend() != "tensorflow":
        settings = {"sessions": sessions, "blocks_per_step": blocks_per_step, "overwrite": overwrite}
        _export_elsewhere(model, path, {**settings, "version": version})
        return folder
    tf = tensorflow()
    reader = Reader(model, blocks_per_step * getattr(model, "backbone", model).block_size)
    signatures = stateless_signatures(reader)
    module = tf.Module()
    module.weights = [variable.value for variable in model.variables]
    if sessions is not None:
        table = SessionTable(reader, sessions)
        module.sessions = [table.numbers, table.rows]
        signatures |= table.signatures()
    with replace_folder(folder) as new:  # a server takes folders with numbers for names alone, so not this one
        tf.saved_model.save(module, str(new), signatures=signatures)
        write_warmup(new, reader, pathlib.Path(path).name, sessions)
    return folder


def _export_elsewhere(model, path, settings):
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
            "CUDA_VISIBLE_DEVICES": "-1",  # writing a graph needs no accelerator, and this process may hold it
        }
        environment.pop("XLA_FLAGS", None)  # another library's compiler may not know them
        command = [sys.executable, "-m", "keras_fam.export", str(saved), str(path), json.dumps(settings)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(
            "The export in a process with KERAS_BACKEND=tensorflow failed. A model with custom layers has to be "
            f"importable there. It said:\n{done.stderr[-4000:]}"
        )
