"""Token ids outside the vocabulary: an error where values can be read, and never part of a state where they cannot."""

import numpy as np
from keras import ops

from keras_fam.ops.backend import is_eager


def check_token_ids(ids, vocabulary_size, lengths=None, padding_mask=None):
    """Raises ValueError for a token id outside the vocabulary, if the values can be read now; padding may hold any.

    Args:
        ids: int `[B, T]`: an array, a list, or a tensor. What is symbolic or being traced passes.
        vocabulary_size: V.
        lengths: None, or int `[B]`: how many of the T tokens exist in each row.
        padding_mask: None, or bool `[B, T]`, True at real tokens.
    """
    ids, lengths, padding_mask = _values(ids), _values(lengths), _values(padding_mask)
    if ids is None or ids.dtype.kind not in "iu" or not ids.size:
        return
    if ids.min() >= 0 and ids.max() < vocabulary_size:
        return
    if padding_mask is not None and padding_mask.shape == ids.shape:
        ids = ids[padding_mask.astype("bool")]
    elif lengths is not None and lengths.shape == ids.shape[:1] and ids.ndim == 2:
        ids = ids[np.arange(ids.shape[1]) < lengths[:, None]]
    if ids.size and (ids.min() < 0 or ids.max() >= vocabulary_size):
        raise ValueError(
            f"Token ids must be from 0 to {vocabulary_size - 1}; received {ids.min()} to {ids.max()}. Use the model's "
            "own tokenizer. Rows without a new token (−1 in `generate_stream`) take part with `lengths` 0."
        )


def check_ids_of(model, ids, lengths=None, padding_mask=None):
    """`check_token_ids` for the vocabulary of a model; layers, which read no ids, have none."""
    vocabulary_size = getattr(getattr(model, "backbone", model), "vocabulary_size", None)
    if vocabulary_size is not None:
        check_token_ids(ids, vocabulary_size, lengths, padding_mask)


def clip_token_ids(ids, vocabulary_size):
    """Ids inside the vocabulary, for compiled programs: an id outside would read as NaN on some backends, and a NaN
    would stay in the state."""
    if str(ids.dtype).rpartition(".")[2] in ("int8", "uint8", "int16", "uint16"):
        ids = ops.cast(ids, "int32")  # V may be larger than these hold
    return ops.clip(ids, 0, vocabulary_size - 1)


def _values(x):
    """`x` as a NumPy array, or None where its values cannot be read."""
    if x is None or isinstance(x, np.ndarray):
        return x
    if ops.is_tensor(x):
        return ops.convert_to_numpy(x) if is_eager(x) else None
    return np.asarray(x) if isinstance(x, list | tuple | int | np.generic) else None
