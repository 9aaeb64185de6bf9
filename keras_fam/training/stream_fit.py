"""`compile`, `fit`, `evaluate` and `train_on_batch` of a `StreamingModel`."""

import contextlib

import keras
from keras import ops

from keras_fam.ops.processes import for_worker
from keras_fam.training.batches import as_arrays, in_order, unpack
from keras_fam.training.callback_model import callbacks_see
from keras_fam.training.dataset_position import following
from keras_fam.training.stateful import ResetEveryEpoch, StatefulTrainer, ValidationState


class StreamTraining:
    """Training on a state carried from batch to batch; a mixin of `StreamingModel`."""

    _trainer = None
    _trains = False

    def compile(self, optimizer=None, loss="auto", *, weighted_metrics="auto", aligned=None, **kwargs):
        """As `keras.Model.compile`, for training on successive chunks.

        The model's own compilation stays as it is. For a model of dtype `"mixed_float16"` the loss is scaled, as in
        `fit` of the model.

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
        self._trainer = StatefulTrainer(model, self.batch_size, self.block_size, aligned)
        self._trainer.compile(optimizer=optimizer, loss=loss, weighted_metrics=weighted_metrics, **kwargs)

    def fit(self, x=None, y=None, *, sample_weight=None, reset_every_epoch=False, callbacks=None, **kwargs):
        """As `keras.Model.fit`, but every batch continues from the state that the last one left.

        A batch is `(chunk, targets)` or `(chunk, targets, weights)`; a chunk is int `[B, T]`, or a dict of
        `"token_ids"`, `"lengths"` int `[B]` or `"padding_mask"` bool `[B, T]`, and `"reset"` bool `[B]` (rows where
        another document starts). Row b of one batch continues row b of the batch before, so nothing is ever shuffled.
        Gradients stop at the start of a chunk.

        ```python
        stream = keras_fam.StreamingModel(lm, batch_size=4)
        stream.compile(keras.optimizers.Adam(1e-3))
        stream.fit([(tokens[:, i : i + 64], targets[:, i : i + 64]) for i in range(0, 1024, 64)], epochs=2)
        ```

        Args:
            x: a `PyDataset` without worker threads or processes, a `tf.data.Dataset`, torch `DataLoader` or grain
                dataset, a sequence of batches, an iterator of batches (for one epoch, or with `steps_per_epoch`), or
                chunks `[n · B, T]` with `y`. The position of a `keras_fam.data` dataset advances with training, so
                that the next `fit` reads on.
            y: targets `[n · B, T]`, if `x` has chunks alone.
            sample_weight: loss weights, if `x` has chunks alone.
            reset_every_epoch: whether all rows are reset when an epoch begins.
            callbacks: Keras callbacks. Their `model` is the model itself (for a layer, the `StatefulTrainer` around
                it), with the optimizer, loss and metrics of this training; `state` of the stream is the state after
                the last batch.
            **kwargs: `epochs`, `steps_per_epoch`, `validation_data`, … of `keras.Model.fit`. Validation data are
                `(x, y)` or `(x, y, sample_weight)`, or what `x` may be. Each validation reads from the initial state,
                and training continues from its own: it does not change training.

        Returns:
            Keras' `History`. The streams are then after the last chunk; after an exception they are as before.

        Raises:
            ValueError: for batches or chunks that do not fit, for a dataset that Keras would not read in order, and
                for one that has fewer batches left than the epochs take.
        """
        x, y, sample_weight = self._data(x, y, sample_weight, kwargs)
        callbacks = _listed(callbacks)
        place = x.state_dict() if hasattr(x, "state_dict") and hasattr(x, "load_state_dict") else None
        with self._borrow_state() as trainer, callbacks_see(self.model, trainer, callbacks):
            own = [ResetEveryEpoch(trainer)] if reset_every_epoch else []
            callbacks = [*own, ValidationState(trainer), *following(x, callbacks)]
            given = {**kwargs, "shuffle": False, "callbacks": callbacks, "batch_size": self.batch_size}
            try:
                return trainer.fit(for_worker(x, trainer), y, sample_weight=sample_weight, **given)
            except BaseException:
                if place is not None:  # as the streams, the data are as before
                    x.load_state_dict(place)
                raise

    def evaluate(self, x=None, y=None, *, sample_weight=None, callbacks=None, **kwargs):
        """As `keras.Model.evaluate`, over successive chunks, from and to the state of the streams; see `fit`."""
        x, y, sample_weight = self._data(x, y, sample_weight, {})
        callbacks = _listed(callbacks)
        with self._borrow_state() as trainer, callbacks_see(self.model, trainer, callbacks):
            given = {**kwargs, "callbacks": callbacks, "batch_size": self.batch_size}
            return trainer.evaluate(for_worker(x, trainer), y, sample_weight=sample_weight, **given)

    def train_on_batch(self, x, y=None, sample_weight=None, **kwargs):
        """As `keras.Model.train_on_batch`, from the state that the last call left; see `fit` for `x`."""
        x, y, sample_weight = map(as_arrays, (x, y, sample_weight))
        with self._borrow_state() as trainer:
            trainer.check(*map(as_arrays, unpack(x)[:3]))
            return trainer.train_on_batch(x, y, sample_weight=sample_weight, **kwargs)

    def _data(self, x, y, sample_weight, kwargs):
        """`x`, `y` and weights as Keras takes them; `validation_data` in `kwargs` likewise."""
        epochs = kwargs.get("epochs", 1) - kwargs.get("initial_epoch", 0)
        validation = kwargs.get("validation_data")
        if validation is not None and not isinstance(validation, tuple):
            kwargs["validation_data"] = in_order(validation, name="validation_data", epochs=epochs)
        if y is not None:
            return tuple(map(as_arrays, (x, y, sample_weight)))
        return in_order(x, epochs=epochs, steps=kwargs.get("steps_per_epoch")), None, sample_weight

    @contextlib.contextmanager
    def _borrow_state(self):
        """The compiled trainer with the state of the streams, which is taken over afterwards unless it fails."""
        if self._trainer is None:
            self.compile()
        # Copies: a compiled step may reuse the memory of the variables.
        self._trainer.assign_state(keras.tree.map_structure(ops.copy, self.state))
        self._trains = True
        try:
            with _values_kept(self._trainer):
                yield self._trainer
        finally:
            self._trains = False
        self.set_state(self._trainer.state)

    def _trained_state(self):
        """The state within `fit`, for `state` of the stream: after the last batch."""
        getattr(self._trainer, "jax_state_sync", lambda: None)()
        return self._trainer.state


@contextlib.contextmanager
def _values_kept(trainer):
    """JAX: Keras takes the values out of all variables while `fit` and `evaluate` run, and loses them where an
    exception comes before the first step (in `evaluate`, at any time). Here they are put back."""
    if not hasattr(trainer, "jax_state_sync"):
        yield
        return
    groups = trainer.variables, trainer.optimizer.variables, trainer.metrics_variables
    variables, seen = [variable for group in groups for variable in group], set()
    for variable in variables:  # a step donates each buffer once: averaged weights share theirs with the average
        if id(variable.value) in seen:
            variable.assign(ops.copy(variable.value))
        seen.add(id(variable.value))
    values = [(variable, variable.value) for variable in variables]

    def sync():
        type(trainer).jax_state_sync(trainer)
        for variable, value in values:
            if variable._value is None and not value.is_deleted():
                variable.assign(value)

    vars(trainer)["jax_state_sync"] = sync
    try:
        yield
    except BaseException:
        sync()
        raise
    finally:
        del vars(trainer)["jax_state_sync"]


def _listed(callbacks):
    if isinstance(callbacks, keras.callbacks.CallbackList):
        raise ValueError("`callbacks` are a list of Keras callbacks; received a CallbackList. Pass its callbacks.")
    return keras.tree.flatten(callbacks) if callbacks else []
