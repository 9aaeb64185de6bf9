"""`SaveProgress`: training that resumes at any batch."""

import json
import os

import keras
import numpy as np
from keras import ops

from keras_fam.training.dataset_position import DatasetPosition
from keras_fam.utils import safetensors_file

_CONTENT = "training progress"


class SaveProgress(DatasetPosition):
    """Saves everything that training depends on, so that an interrupted run resumes as if it had never stopped.

    ```python
    progress = keras_fam.training.SaveProgress("out/progress.safetensors", stream, rows, every=100)
    progress.fit(epochs=10)     # resumes, if the file exists
    ```

    One file holds the weights (before an optimizer with `use_ema=True` replaces them by their averages at the end of
    `fit`), the optimizer with loss scale and accumulated gradients, the carried state, seed generators, the running
    means of the metrics, the epoch and the position of the dataset. It is replaced atomically, so a complete one exists
    at any time. (Keras' `BackupAndRestore` resumes at an epoch, with neither the states of seed generators nor the
    position of the data.) Not saved: what other callbacks hold, such as the average of `SwapEMAWeights` or the patience
    of `EarlyStopping`, and the state of generators that the model does not own.

    Args:
        path: the file; its folder is created if necessary.
        model: a compiled `StreamingModel` or built `keras.Model`.
        dataset: the `ResumableDataset` to train on.
        every: None (save once per epoch), or the number of batches of an epoch after which it is saved as well.

    Raises:
        ValueError: if the model is not compiled or not built.
        ImportError: when saving, without the safetensors package.
    """

    def __init__(self, path, model, dataset, every=None):
        super().__init__(dataset)
        self.path, self.every, self._trained = str(path), every, model
        self._metrics, self._epoch, self._due, self._trained_weights = None, 0, False, {}
        trainer = self._trainer
        if trainer is None or not trainer.compiled or not trainer.built:
            raise ValueError(
                f"Progress is saved of a model that is built and compiled; received {model!r}. Call `compile` first."
            )

    @property
    def _trainer(self):
        """The model whose `fit` runs: the one around the streams, or the model itself."""
        return getattr(self._trained, "_trainer", self._trained)

    # Saving -----------------------------------------------------------------------------------------------------

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._trained_weights = {}
        optimizer = self._trainer.optimizer

        def finalize(variables):
            # Keras replaces weights by their averages at the end of `fit`; training resumes from the weights.
            del vars(optimizer)["finalize_variable_values"]  # the optimizer's own method again
            self._trained_weights = {id(v): _value(v) for v in variables}
            optimizer.finalize_variable_values(variables)
            for variable in variables:  # JAX: they would share the buffers of the averages, which a step donates once
                variable.assign(ops.copy(variable.value))

        if _averages(optimizer):
            vars(optimizer)["finalize_variable_values"] = finalize

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self._epoch = epoch
        if self._metrics is not None:  # Keras has just reset them
            trainer = self._trainer
            if len(trainer.metrics_variables) < len(self._metrics):  # TensorFlow creates them in the first step
                trainer._symbolic_build(data_batch=self.dataset[0])
            _assign(trainer.metrics_variables, self._metrics, "metrics")
            self._metrics = None

    def on_train_batch_begin(self, batch, logs=None):
        if self._due:  # by now other callbacks have begun the epoch, so the dataset has the curriculum's stage
            self.save(metrics=False)

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        if self.every and (batch + 1) % self.every == 0:
            self.save()

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        self._epoch, self._due = epoch + 1, True

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        self.save(metrics=False)

    def save(self, metrics=True):
        """Writes the file now; within an epoch with the running means of the metrics."""
        self._due = False
        trainer = self._trainer
        getattr(trainer, "jax_state_sync", lambda: None)()
        groups = {"model": _variables(trainer), "metrics": trainer.metrics_variables if metrics else []}
        arrays = {}
        for group, variables in groups.items():
            for i, v in enumerate(variables):
                kept = self._trained_weights.get(id(v))
                arrays[f"{group}.{i:04d}"] = _value(v) if kept is None else kept
        place = json.dumps(self.dataset.state_dict(self.taken))
        fields = {"content": _CONTENT, "epoch": str(self._epoch), "dataset": place}
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        safetensors_file.write(self.path, arrays, fields)

    # Resuming ---------------------------------------------------------------------------------------------------

    def restore(self):
        """Assigns what the file holds to the model, its optimizer, the streams and the dataset.

        Returns:
            int, the epoch to resume with (`initial_epoch` of `fit`); 0 without a file.

        Raises:
            ValueError: if the file is damaged, not written by `SaveProgress`, or of another model or dataset.
        """
        if not os.path.exists(self.path):
            return 0
        fields, arrays = safetensors_file.read(self.path)
        if fields.get("content") != _CONTENT:
            raise ValueError(
                f"Training resumes from a file that SaveProgress wrote; {self.path} is another. Name another path."
            )
        groups = {"model": [], "metrics": []}
        for name in sorted(arrays):
            groups[name.split(".")[0]].append(arrays[name])
        trainer = self._trainer
        if not trainer.optimizer.built:
            trainer.optimizer.build(trainer.trainable_variables)
        _check(_variables(trainer), groups["model"], self.path)
        self.dataset.load_state_dict(json.loads(fields["dataset"]))
        _assign(_variables(trainer), groups["model"], self.path)
        if trainer is not self._trained:
            self._trained.set_state(trainer.state)
        self._metrics = groups["metrics"] or None
        return int(fields["epoch"])

    def fit(self, epochs, callbacks=(), **kwargs):
        """Resumes if the file exists, and trains until `epochs` epochs are complete.

        Keras gives all epochs of one `fit` the same number of batches, so the rest of an interrupted epoch is a `fit`
        of its own.

        Args:
            epochs: int, counted from the start of training, not of this call.
            callbacks: more Keras callbacks.
            **kwargs: see `fit` of the model.

        Returns:
            A list of Keras' `History` objects, one per `fit`.
        """
        epoch, histories = self.restore(), []
        trainer = self._trainer
        while epoch < epochs:
            for variable in trainer.trainable_variables if self._trained_weights else ():
                variable.assign(self._trained_weights[id(variable)])
            whole = self.dataset.steps_per_epoch in (None, self.dataset.num_batches)
            until = epochs if whole else epoch + 1
            given = {"initial_epoch": epoch, "epochs": until, "callbacks": [self, *callbacks], **kwargs}
            if isinstance(self._trained, keras.Model):
                given.setdefault("shuffle", False)
            histories.append(self._trained.fit(self.dataset, **given))
            if trainer.stop_training:
                break
            epoch = until
        if not histories and _averages(trainer.optimizer) and trainer.optimizer.built:
            trainer.optimizer.finalize_variable_values(trainer.trainable_variables)  # as the `fit` that is complete did
        return histories


def _averages(optimizer):
    """Whether the optimizer replaces weights by their averages when `fit` ends."""
    return getattr(getattr(optimizer, "inner_optimizer", optimizer), "use_ema", False)


def _value(variable):
    return ops.convert_to_numpy(variable.value)


def _variables(model):
    """All variables of a model and its optimizer, each once."""
    found = {id(v): v for v in (*model.variables, *model.optimizer.variables)}
    return list(found.values())


def _check(variables, values, path):
    own, theirs = [tuple(v.shape) for v in variables], [v.shape for v in values]
    if own != theirs:
        at = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), min(len(own), len(theirs)))
        name = variables[at].path if at < len(variables) else "none"
        raise ValueError(
            f"Training resumes with the model and optimizer that were saved; this one has {len(own)} variables, "
            f"{path} has {len(theirs)}, and number {at} ({name}) differs first. Make both as they were."
        )


def _assign(variables, values, path):
    _check(variables, values, path)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(np.asarray(value))
