"""`SaveProgress`: training that resumes at any batch."""

import itertools
import json
import os

import keras
import numpy as np
from keras import ops

from keras_fam.distribution.processes import agree_on_file, gather_position, gather_rows, own_rows
from keras_fam.ops.processes import (
    in_first_process,
    process_shard,
    scope_of,
    share_of_process,
    sum_of_processes,
    whole_value,
)
from keras_fam.training.dataset_position import DatasetPosition
from keras_fam.training.process_training import ProcessTraining
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

    Where several processes train together, all of them make one and call it alike; process 0 writes. The file holds the
    carried state of all rows and the position of one whole dataset, so that another number of processes, which divides
    the rows, may resume from it, as far as the dataset allows (`DocumentRows` does). All processes read the file.

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
        with scope_of(trainer):
            own = _own_rows(trainer)
            rows = dict(zip(map(id, own), gather_rows([v.value for v in own]), strict=True))
            known, arrays = {**rows, **self._trained_weights}, {}
            for group, variables in groups.items():
                for i, v in enumerate(variables):
                    value = known[id(v)] if id(v) in known else _value(v)
                    arrays[f"{group}.{i:04d}"] = value if group == "model" else sum_of_processes(value)
            place = json.dumps(gather_position(self.dataset, self.taken))
            fields = {"content": _CONTENT, "epoch": str(self._epoch), "dataset": place}
            in_first_process(lambda: self._write(arrays, fields))

    def _write(self, arrays, fields):
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        safetensors_file.write(self.path, arrays, fields)

    # Resuming ---------------------------------------------------------------------------------------------------

    def restore(self):
        """Assigns what the file holds to the model, its optimizer, the streams and the dataset.

        Returns:
            int, the epoch to resume with (`initial_epoch` of `fit`); 0 without a file.

        Raises:
            ValueError: if the file is damaged, not written by `SaveProgress`, of another model or dataset, or there
                for some of the processes only.
        """
        with scope_of(self._trainer):
            return self._restore()

    def _restore(self):
        if not agree_on_file(os.path.exists(self.path), self.path):
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
        variables = _variables(trainer)
        groups["model"] = _parts(variables, groups["model"], {id(v) for v in _own_rows(trainer)})
        _check(variables, groups["model"], self.path)
        self.dataset.load_state_dict(json.loads(fields["dataset"]))
        _assign(variables, groups["model"], self.path)
        if trainer is not self._trained:
            self._trained.set_state(trainer.state)
        self._metrics = [share_of_process(value) for value in groups["metrics"]] or None
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
    return whole_value(variable.value)


def _own_rows(trainer):
    """Variables that hold the rows of this process."""
    return trainer.own_variables() if isinstance(trainer, ProcessTraining) else []


def _parts(variables, values, own):
    """`values`, with this process's rows of those that belong to rows, if as many processes have as many rows each."""
    _, count = process_shard()
    return [
        own_rows(value) if id(v) in own and len(value) == count * v.shape[0] else value
        for v, value in itertools.zip_longest(variables, values)
        if value is not None
    ]


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
