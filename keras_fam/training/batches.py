"""What `StreamingModel.fit`, `evaluate` and `predict` accept as data, in the form that Keras reads in order."""

import itertools

import keras
import numpy as np
from keras import ops

INPUTS = ("token_ids", "lengths", "padding_mask", "reset")
KERAS_READS = ("tensorflow", "torch", "grain")  # packages whose datasets Keras iterates by itself


def unpack(inputs):
    """`(tokens, lengths, padding_mask, reset)` of one chunk: an array, or a dict of `INPUTS`."""
    if not isinstance(inputs, dict):
        return inputs, None, None, None
    unknown = sorted(set(inputs) - set(INPUTS))
    if unknown or "token_ids" not in inputs:
        raise ValueError(
            f"A chunk is an array, or a dict of 'token_ids' and optionally {INPUTS[1:]}; received the keys "
            f"{sorted(inputs)}."
        )
    if inputs.get("lengths") is not None and inputs.get("padding_mask") is not None:
        raise ValueError("A chunk has 'lengths' or a 'padding_mask'; received both. Leave one out.")
    return tuple(inputs.get(name) for name in INPUTS)


class BatchList(keras.utils.PyDataset):
    """A sequence of batches `(chunk, targets)` or `(chunk, targets, weights)` as a dataset; lists become arrays."""

    def __init__(self, batches, name="x"):
        super().__init__()
        self.batches, self.name = batches, name

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return as_batch(self.batches[index], self.name)


def as_batch(batch, name="x"):
    """One batch as a tuple of arrays; ValueError unless it has a chunk and targets."""
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        found = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        raise ValueError(
            f"Each batch of `{name}` is a tuple (chunk, targets) or (chunk, targets, weights); received {found}. Pass "
            "arrays as `x` and `y`, and a single batch to `train_on_batch`."
        )
    return tuple(as_arrays(part) for part in batch)


def as_arrays(x):
    """An array, or a dict of arrays, from what may be nested lists."""
    if isinstance(x, dict):
        return {key: as_arrays(value) for key, value in x.items()}
    return np.asarray(x) if isinstance(x, (list, tuple)) else x


def in_order(x, *, name="x", epochs=1, steps=None):
    """Batches of a dataset, a sequence or an iterator as something that Keras reads in order.

    Args:
        x: what the user passed, without targets beside it.
        name: of the argument, for messages.
        epochs: how often it is read.
        steps: None, or how many batches are read each time from where the last time ended.

    Raises:
        ValueError: for a `PyDataset` with several workers, and for an iterator that would be read more than once.
    """
    if isinstance(x, keras.utils.PyDataset):
        check_workers(x.workers, x.use_multiprocessing, type(x).__name__)
        return x
    if x is None or hasattr(x, "shape") or isinstance(x, dict):
        return x
    if {kind.__module__.split(".")[0] for kind in type(x).__mro__} & set(KERAS_READS):
        return x
    if hasattr(x, "__len__") and hasattr(x, "__getitem__"):
        batches = BatchList(x, name)
        if not len(batches):
            raise ValueError(f"`{name}` has at least one batch; received an empty {type(x).__name__}.")
        return batches
    if not hasattr(x, "__iter__"):
        raise ValueError(
            f"`{name}` is an array with targets, a PyDataset, tf.data.Dataset, torch DataLoader or grain dataset, or a "
            f"sequence or iterator of batches; received {type(x).__name__}."
        )
    if epochs > 1 and steps is None:
        raise ValueError(
            f"An iterator of batches is read once, and would be empty after the first of {epochs} epochs. Pass "
            f"`{name}` as a list or a dataset{', or give `steps_per_epoch`' if name == 'x' else ''}."
        )
    return (as_batch(batch, name) for batch in x)


def check_workers(workers, use_multiprocessing, owner):
    """ValueError unless Keras reads a `PyDataset` in the thread that trains."""
    if workers > 1 or use_multiprocessing:
        raise ValueError(
            f"A stream is read in order, which Keras does not keep with worker threads or processes; {owner} has "
            f"workers={workers} and use_multiprocessing={bool(use_multiprocessing)}. Use workers=1. To prepare batches "
            "in the background, pass a tf.data.Dataset with `prefetch` (`to_tf_dataset` of a keras_fam.data dataset)."
        )


def chunks_of(dataset, steps=None):
    """Chunks of a `PyDataset`, a `tf.data.Dataset` or any iterable as NumPy arrays; targets and weights are dropped."""
    if isinstance(dataset, keras.utils.PyDataset):
        source, number = dataset, dataset.num_batches
        dataset = (source[i] for i in (itertools.count() if number is None else range(number)))
    for batch in itertools.islice(dataset, steps):
        chunk = batch[0] if isinstance(batch, (tuple, list)) else batch
        yield keras.tree.map_structure(_to_numpy, chunk)


def _to_numpy(x):
    return x if isinstance(x, np.ndarray) else np.asarray(ops.convert_to_numpy(x) if hasattr(x, "shape") else x)


def predict_chunks(stream, dataset, *, steps=None, verbose=0, callbacks=None, collect=True):
    """Reads chunk after chunk through a `StreamingModel`, with Keras' callbacks; see `StreamingModel.predict`."""
    total = dataset.num_batches if isinstance(dataset, keras.utils.PyDataset) else getattr(dataset, "__len__", None)
    total = total() if callable(total) else total
    total = steps if total is None else min(total, steps or total)
    verbose = 1 if verbose == "auto" else verbose
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = keras.callbacks.CallbackList(
            callbacks,
            add_progbar=verbose != 0,
            verbose=verbose,
            epochs=1,
            steps=total,
            model=stream.model if isinstance(stream.model, keras.Model) else keras.Model(),
        )
    collected = []
    callbacks.on_predict_begin()
    for i, chunk in enumerate(chunks_of(dataset, steps)):
        tokens, lengths, padding_mask, reset = unpack(chunk)
        if padding_mask is not None:
            raise ValueError("`predict` over chunks takes 'lengths'; received a 'padding_mask'.")
        callbacks.on_predict_batch_begin(i)
        if reset is not None and np.any(reset):
            stream.reset_state(np.flatnonzero(reset))
        outputs = stream.predict(tokens, lengths)
        if collect:
            collected.append(outputs)
        callbacks.on_predict_batch_end(i, {"outputs": outputs})
    callbacks.on_predict_end()
    if not collect or not collected:
        return None
    return np.concatenate(collected, axis=1)
