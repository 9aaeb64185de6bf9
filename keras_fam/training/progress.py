"""`SaveProgress`: training that resumes at any batch."""

import json
import os

import keras
import numpy as np
from keras import ops

from keras_fam.training.dataset_position import DatasetPosition as DatasetPosition
from keras_fam.utils import safetensors_file

_CONTENT = "training progress"


class SaveProgress(DatasetPosition):
    """Saves all that training goes on from, so that an interrupted run resumes as if it had never stopped.

    ```python
    progress = keras_fam.training.SaveProgress("out/progress.safetensors", stream, rows, every=100)
    progress.fit(epochs=10)     # resumes, if the file is there
    ```

    One file holds weights, optimizer, carried state, seed generators, the running means of the metrics, the epoch and
    the dataset's place. It is replaced in one step, so there is a whole one at any time. (Keras' `BackupAndRestore`
    goes on at an epoch, and knows neither seed generators' states nor where the data stood.) Not in it: what other
    callbacks keep to themselves, and draws from generators that the model does not hold.

    Args:
        path: the file; its folder is made if need be.
        model: a compiled `StreamingModel` or built `keras.Model`.
        dataset: the `ResumableDataset` that is trained on.
        every: None (once per epoch), or after how many batches of an epoch it is saved as well.

    Raises:
        ValueError: if the model is not compiled or not built.
        ImportError: when saving, without the safetensors package.
    """

    def __init__(self, path, model, dataset, every=None):
        super().__init__(dataset)
        self.path, self.every, self._trained = str(path), every, model
        self._metrics, self._epoch, self._due = None, 0, False
        trainer = self._trainer
        if trainer is None or not trainer.compiled or not trainer.built:
            raise ValueError(f"Progress is that of a model that is built and compiled; {model!r} is not.")

    @property
    def _trainer(self):
        """The model whose `fit` runs: the one around the streams, or the model itself."""
        return getattr(self._trained, "_carried", self._trained)

    # Saving -----------------------------------------------------------------------------------------------------

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        if self._metrics is not None:  # Keras has just reset them
            if len(self.model.metrics_variables) < len(self._metrics):  # TensorFlow makes them in the first step
                self.model._symbolic_build(data_batch=self.dataset[0])
            _assign(self.model.metrics_variables, self._metrics, "metrics")
            self._metrics = None

    def on_train_batch_begin(self, batch, logs=None):
        if self._due:  # other callbacks have prepared the new epoch by now, so the dataset has the curriculum's stage
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
        model = self.model if self._model is not None else self._trainer  # Keras' property brings the weights back
        arrays = {f"model.{i:04d}": ops.convert_to_numpy(v.value) for i, v in enumerate(_variables(model))}
        if metrics:
            found = enumerate(model.metrics_variables)
            arrays.update({f"metrics.{i:04d}": ops.convert_to_numpy(v.value) for i, v in found})
        place = json.dumps(self.dataset.state_dict(self.taken))
        fields = {"content": _CONTENT, "epoch": str(self._epoch), "dataset": place}
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        safetensors_file.write(self.path, arrays, fields)

    # Resuming ---------------------------------------------------------------------------------------------------

    def restore(self):
        """Takes over what the file holds.

        Returns:
            int, the epoch to go on with (`initial_epoch` of `fit`); 0 without a file.

        Raises:
            ValueError: if the file is damaged, no progress, or that of another model or dataset.
        """
        if not os.path.exists(self.path):
            return 0
        fields, arrays = safetensors_file.read(self.path)
        if fields.get("content") != _CONTENT:
            raise ValueError(f"Training resumes from a file that SaveProgress wrote; {self.path} is not.")
        groups = {"model": [], "metrics": []}
        for name in sorted(arrays):
            groups[name.split(".")[0]].append(arrays[name])
        model = self._trainer
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        _check(_variables(model), groups["model"], self.path)
        self.dataset.load_state_dict(json.loads(fields["dataset"]))
        _assign(_variables(model), groups["model"], self.path)
        if model is not self._trained:
            self._trained.set_state(model.state)
        self._metrics = groups["metrics"] or None
        return int(fields["epoch"])

    def fit(self, epochs, callbacks=(), **kwargs):
        """Resumes if there is a file, and trains until `epochs` epochs are over.

        Keras gives all epochs of one `fit` the same number of batches, so the rest of a broken one is a `fit` of its
        own.

        Args:
            epochs: int, counted from the start of the training, not of this call.
            callbacks: more Keras callbacks.
            **kwargs: see `fit` of the model.

        Returns:
            A list of Keras' `History` objects, of those calls.
        """
        epoch, histories = self.restore(), []
        while epoch < epochs:
            whole = self.dataset.steps_per_epoch in (None, self.dataset.num_batches)
            until = epochs if whole else epoch + 1
            given = {"initial_epoch": epoch, "epochs": until, "callbacks": [self, *callbacks], **kwargs}
            if isinstance(self._trained, keras.Model):
                given.setdefault("shuffle", False)
            histories.append(self._trained.fit(self.dataset, **given))
            if self._trainer.stop_training:
                break
            epoch = until
        return histories


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
            f"Progress is resumed with the model and optimizer that saved it; this one has {len(own)} variables, "
            f"{path} has {len(theirs)}, and number {at} ({name}) differs first. Make both as they were."
        )


def _assign(variables, values, path):
    _check(variables, values, path)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(np.asarray(value))
