"""Loops over successive chunks with carried state: Keras' `fit`, `evaluate` and callbacks, for streams.

The state is held in non-trainable variables of a small model around the user's, so that Keras' own compiled steps carry
it from batch to batch, on every backend.
"""

import contextlib
import itertools

import keras
import numpy as np
from keras import ops

from keras_fam.distribution.state_sharding import state_variables
from keras_fam.layers.recurrent import check_padding_mask
from keras_fam.ops.backend import wait_for
from keras_fam.state import map_specs, where_rows
from keras_fam.training.dataset_position import following

INPUTS = ("token_ids", "lengths", "padding_mask", "reset")


def unpack(inputs):
    """`(tokens, lengths, padding_mask, reset)` of one chunk: an array, or a dict of `INPUTS`."""
    if not isinstance(inputs, dict):
        return inputs, None, None, None
    unknown = sorted(set(inputs) - set(INPUTS))
    if unknown or "token_ids" not in inputs:
        raise ValueError(
            f"A chunk is an array, or a dict of 'token_ids' and perhaps {INPUTS[1:]}; received the keys "
            f"{sorted(inputs)}."
        )
    if inputs.get("lengths") is not None and inputs.get("padding_mask") is not None:
        raise ValueError("A chunk has 'lengths' or a 'padding_mask'; received both. Leave one out.")
    return tuple(inputs.get(name) for name in INPUTS)


class StatefulTrainer(keras.Model):
    """A Keras model whose rows go on where the last batch left them.

    Inputs are `[B, T]` chunks (`[B, T, D]` for a layer), or a dict of `"token_ids"`, `"lengths"` int `[B]` or
    `"padding_mask"` bool `[B, T]`, and `"reset"` bool `[B]`: rows that start anew before the chunk. Outputs are those
    of the wrapped model. Gradients stop where a chunk starts: back-propagation is truncated to one chunk, a model with
    `remat=True` keeps the memory of a long one small, and one with `backpropagation_steps` truncates within it.

    Args:
        model: a built TransformerFAM model or layer.
        batch_size: B.
        aligned: whether all chunks are whole blocks, which saves work: None lets the first chunk decide. A later chunk
            that breaks the promise raises ValueError.
    """

    def __init__(self, model, batch_size, block_size, aligned=None):
        super().__init__(name=f"{model.name}_with_state")
        self.wrapped, self.rows, self.block_size, self.aligned = model, batch_size, block_size, aligned
        self._spec = lambda: model.state_spec(batch_size)  # hidden from the tracking of tuples
        self.held = state_variables(self._spec())
        self.built = True
        self.assign_state(model.get_initial_state(batch_size))

    def call(self, inputs, training=None):
        outputs, state = self.read(inputs, training)
        self.assign_state(keras.tree.map_structure(ops.stop_gradient, state))
        return outputs

    def read(self, inputs, training=None):
        """Outputs of a chunk and the state behind it, which gradients still pass; what is held stays as it is.

        For subclasses that look at the state before they `hold` it, for example to ask questions on the side.
        """
        tokens, lengths, padding_mask, reset = unpack(inputs)
        length = tokens.shape[1]
        if self.aligned is None:
            self.aligned = lengths is padding_mask is None and length is not None and length % self.block_size == 0
        self.check(tokens, lengths, padding_mask)
        state = self.state
        # Rows that start here take F_0 from the weights of this step, so that gradients reach the memory prompt.
        starts = ops.logical_and(state.position.block_index == 0, state.position.offset == 0)
        if reset is not None:
            starts = ops.logical_or(starts, ops.cast(reset, "bool"))
        state = where_rows(starts, self.wrapped.get_initial_state(self.rows), state)
        if padding_mask is None:
            aligned = self.aligned and length is not None  # TensorFlow: a length known at run time may be any
            outputs, state = self.wrapped.advance(
                tokens, state, lengths=lengths, aligned=aligned, training=bool(training)
            )
        else:
            check_padding_mask(padding_mask, tokens)
            outputs, state = self.wrapped(
                tokens, padding_mask=padding_mask, initial_state=state, return_state=True, training=training
            )
        return outputs, state

    def train_step(self, *args):
        with wait_for(args):
            return super().train_step(*args)

    def test_step(self, *args):
        with wait_for(args):
            return super().test_step(*args)

    def check(self, tokens, lengths=None, padding_mask=None):
        """Raises ValueError unless a chunk has a row for each stream, and whole blocks if they were promised."""
        if tokens.shape[0] not in (None, self.rows):
            raise ValueError(
                f"There are {self.rows} streams, and each batch has a row for each; received {tokens.shape[0]} rows. "
                "Rows without new tokens take part with lengths=0."
            )
        length = tokens.shape[1]
        ragged = lengths is not None or padding_mask is not None
        if self.aligned and (ragged or (length is not None and length % self.block_size)):
            raise ValueError(
                f"The first chunk was a whole number of blocks, so all are (block_size {self.block_size}, no lengths, "
                f"no padding); received {length} tokens. Pass aligned=False to `compile` for chunks of any length."
            )

    @property
    def state(self):
        """The `StreamState` held; the values are copies, since steps may reuse the variables' memory."""
        held = iter(self.held)
        return map_specs(lambda _: ops.copy(next(held).value), self._spec())

    def assign_state(self, state):
        """Puts a `StreamState` in place of the one held."""
        for held, new in zip(self.held, keras.tree.flatten(state), strict=True):
            held.assign(new)


class StreamTraining:
    """`compile`, `fit`, `evaluate` and `train_on_batch` of a `StreamingModel`: training on carried state."""

    _carried = None

    def compile(self, optimizer=None, loss="auto", *, weighted_metrics="auto", aligned=None, **kwargs):
        """As `keras.Model.compile`, for training on successive chunks.

        Args:
            optimizer: None takes the model's own, if it is compiled, else Adam.
            loss: `"auto"` takes the model's own, if it is compiled, else next-token cross-entropy on logits.
            weighted_metrics: `"auto"` is the accuracy, weighted by the loss weights, where `loss` is `"auto"`.
            aligned: see `StatefulTrainer`.
            **kwargs: see `keras.Model.compile`.
        """
        model = self.model
        compiled = isinstance(model, keras.Model) and model.compiled
        if optimizer is None:
            optimizer = model.optimizer if compiled else "adam"
        if weighted_metrics == "auto":
            weighted_metrics = [keras.metrics.SparseCategoricalAccuracy()] if loss == "auto" else None
        if loss == "auto":
            loss = model.loss if compiled else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self._carried = StatefulTrainer(model, self.batch_size, self.block_size, aligned)
        self._carried.compile(optimizer=optimizer, loss=loss, weighted_metrics=weighted_metrics, **kwargs)

    def fit(self, x=None, y=None, *, sample_weight=None, reset_every_epoch=False, callbacks=None, **kwargs):
        """As `keras.Model.fit`, but every batch goes on from the state that the last one left.

        A batch is `(chunk, targets)` or `(chunk, targets, weights)`; a chunk is int `[B, T]`, or a dict of
        `"token_ids"`, `"lengths"` int `[B]` or `"padding_mask"` bool `[B, T]`, and `"reset"` bool `[B]` (rows whose
        document starts anew). Row b of one batch continues row b of the batch before, so nothing is ever shuffled.
        Gradients stop where a chunk starts.

        Args:
            x: a `PyDataset`, `tf.data.Dataset`, iterable of batches, or an array of chunks, B rows each. The place of
                a `keras_fam.data` dataset moves on with training, so that the next `fit` reads on.
            y: targets, if `x` is an array.
            sample_weight: loss weights, if `x` is an array.
            reset_every_epoch: whether all rows start anew with every epoch.
            callbacks: Keras callbacks.
            **kwargs: `epochs`, `steps_per_epoch`, `validation_data`, … of `keras.Model.fit`. Validation reads on from
                the training's state.

        Returns:
            Keras' `History`. The streams stand behind the last chunk; after an exception they are as they were.
        """
        callbacks = list(callbacks or [])
        if reset_every_epoch:
            callbacks.insert(0, ResetEveryEpoch())
        place = x.state_dict() if hasattr(x, "state_dict") and hasattr(x, "load_state_dict") else None
        with self._borrow_state() as carried:
            kwargs = {**kwargs, "shuffle": False, "callbacks": following(x, callbacks)}
            try:
                return carried.fit(x, y, sample_weight=sample_weight, **self._batched(x, kwargs))
            except BaseException:
                if place is not None:  # as the streams do, the data stand where they stood
                    x.load_state_dict(place)
                raise

    def evaluate(self, x=None, y=None, *, sample_weight=None, **kwargs):
        """As `keras.Model.evaluate`, over successive chunks; see `fit`."""
        with self._borrow_state() as carried:
            return carried.evaluate(x, y, sample_weight=sample_weight, **self._batched(x, kwargs))

    def train_on_batch(self, x, y=None, sample_weight=None, **kwargs):
        """As `keras.Model.train_on_batch`, from the state that the last call left; see `fit` for `x`."""
        with self._borrow_state() as carried:
            carried.check(*map(_as_array, unpack(x)[:3]))
            return carried.train_on_batch(x, y, sample_weight=sample_weight, **kwargs)

    def _batched(self, x, kwargs):
        arrays = not (isinstance(x, keras.utils.PyDataset) or hasattr(x, "element_spec") or hasattr(x, "__next__"))
        return {**kwargs, "batch_size": self.batch_size} if arrays and hasattr(x, "shape") else kwargs

    @contextlib.contextmanager
    def _borrow_state(self):
        """The compiled model with the streams' state; what it leaves is taken over unless it fails."""
        if self._carried is None:
            self.compile()
        # Copies: a compiled step may reuse the memory of the variables.
        self._carried.assign_state(keras.tree.map_structure(ops.copy, self.state))
        yield self._carried
        self.set_state(self._carried.state)


class ResetEveryEpoch(keras.callbacks.Callback):
    """Lets all rows of a `StatefulTrainer` start anew when an epoch starts."""

    def on_epoch_begin(self, epoch, logs=None):
        self.model.assign_state(self.model.wrapped.get_initial_state(self.model.rows))


def chunks_of(dataset, steps=None):
    """Chunks of a `PyDataset`, a `tf.data.Dataset` or any iterable; targets and weights are left out."""
    if isinstance(dataset, keras.utils.PyDataset):
        source, number = dataset, dataset.num_batches
        dataset = (source[i] for i in (itertools.count() if number is None else range(number)))
    for batch in itertools.islice(dataset, steps):
        chunk = batch[0] if isinstance(batch, (tuple, list)) else batch
        yield keras.tree.map_structure(_to_numpy, chunk)


def _as_array(x):
    return x if x is None or hasattr(x, "shape") else np.asarray(x)


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
