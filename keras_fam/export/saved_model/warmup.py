"""Warm-up requests: the server runs them before a version takes calls, so that no client waits for the first run."""

import numpy as np

from keras_fam.export.saved_model.prediction_log import prediction_log
from keras_fam.export.saved_model.serving_functions import tensorflow


def write_warmup(folder, reader, model_name, sessions):
    """Writes `assets.extra/tf_serving_warmup_requests`: one request per signature (`list`, which needs a secret, none).

    No request can fail, whatever their order or number, and none opens a session: requests for sessions have no rows.

    Args:
        folder: the version's folder.
        reader: `Reader` of the model.
        model_name: name under which the model is served; the server ignores it here.
        sessions: None, or the size of the session table.
    """
    tf = tensorflow()
    target = folder / "assets.extra" / "tf_serving_warmup_requests"
    target.parent.mkdir()
    with tf.io.TFRecordWriter(str(target)) as writer:
        for signature, inputs in warmup_requests(reader, sessions):
            writer.write(prediction_log(model_name, signature, inputs))


def warmup_requests(reader, sessions):
    """Pairs of a signature and its inputs, NumPy arrays by name."""
    token, one = np.zeros((1, 1), "int32"), np.ones(1, "int32")
    block = np.zeros((1, reader.backbone.block_size), "int32")
    # The options have the signature's dtypes; a row that ends at its first token has run every part of the program.
    options = {
        "max_new_tokens": np.int32(1),
        "temperature": np.float32(1),
        "top_k": np.int32(1),
        "seed": one,
        "stop_tokens": one,
    }
    state = dict(zip(reader.names, [np.asarray(x) for x in reader.flatten(reader.initial(1))], strict=True))
    found = [
        ("serving_default", {"token_ids": block}),
        ("padded", {"token_ids": block, "padding_mask": block == 0}),
        ("init_state", {"batch_size": np.int32(1)}),
        ("step", {"token_ids": token, "lengths": one, **state}),
        ("step", {"token_ids": block, "lengths": one * block.shape[1], **state}),
    ]
    if reader.generates:
        found.append(("generate", {"token_ids": block, "lengths": one, **options, **state}))
    if sessions is None:
        return found
    none, empty = np.zeros(0, "int64"), np.zeros(0, "int32")
    chunk = {"sessions": none, "token_ids": np.zeros((0, 1), "int32"), "lengths": empty}
    found += [("open", {"count": np.int32(0)}), ("append", chunk)]
    if reader.generates:
        found += [("append_last", chunk), ("session_generate", {**chunk, **options, "seed": empty})]
    return [*found, ("reset", {"sessions": none}), ("close", {"sessions": none})]
