"""Callbacks for long trainings: progress that can be resumed at any batch, and curricula."""

import json
import os

import keras
import numpy as np
from keras import ops

from keras_fam import session_file
from keras_fam.follow import FollowDataset as FollowDataset

_CONTENT = "training progress"


class SaveProgress(FollowDataset):
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
        session_file.write(self.path, arrays, fields)

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
        fields, arrays = session_file.read(self.path)
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


class Curriculum(keras.callbacks.Callback):
    """Lets sequences grow while training: sets a number of a dataset when an epoch begins.

    ```python
    batches = keras_fam.data.TaskBatches(task, 32, block_size=32, blocks=2, steps_per_epoch=100)
    model.fit(batches, epochs=20, callbacks=[
        keras_fam.training.Curriculum(batches, (2, 3, 4, 6, 8), monitor="loss", threshold=0.1),
        keras_fam.training.FollowDataset(batches),
    ])
    ```

    A resumed run goes on where it was: with `epochs`, the stage follows from the epoch's number; with `monitor`, from
    what the dataset has.

    Args:
        dataset: `TaskBatches`, `DocumentRows`, or any object with the attribute.
        values: the attribute's values, one a stage; the last one stays.
        attribute: `"blocks"` (`TaskBatches`), or `"longest"` (`DocumentRows`, in tokens).
        epochs: epochs of each stage, an int or one per stage; None where `monitor` is given.
        monitor: None, or a name in the logs such as `"loss"`: the next stage begins after an epoch at whose end it has
            reached `threshold`.
        threshold: float, or one number per stage (the last one's is not needed without `stop`).
        mode: `"min"` (at most `threshold`) or `"max"` (at least).
        stop: whether training ends once the last stage has reached its threshold.

    Raises:
        ValueError: unless one of `epochs` and `monitor` is given, and all that belongs to it.
    """

    def __init__(
        self,
        dataset,
        values,
        *,
        attribute="blocks",
        epochs=None,
        monitor=None,
        threshold=None,
        mode="min",
        stop=False,
    ):
        super().__init__()
        self.dataset, self.values, self.attribute = dataset, tuple(values), attribute
        if not self.values or not hasattr(dataset, attribute):
            raise ValueError(f"`values` are those of the dataset's {attribute!r}, at least one; received {values!r}.")
        if (epochs is None) == (monitor is None) or (monitor is None) != (threshold is None):
            raise ValueError(
                "A stage ends after `epochs`, or when `monitor` reaches `threshold`; received "
                f"epochs={epochs!r}, monitor={monitor!r}, threshold={threshold!r}."
            )
        if mode not in ("min", "max"):
            raise ValueError(f'`mode` is "min" or "max"; received {mode!r}.')
        self.ends = None
        if epochs is not None:
            lengths = [epochs] * len(self.values) if isinstance(epochs, int) else list(epochs)
            if len(lengths) < len(self.values) - 1 or min(lengths) < 1:
                raise ValueError(f"`epochs` has a number for each of {len(self.values)} stages; received {epochs!r}.")
            self.ends = np.cumsum(lengths)
        self.thresholds = None
        if monitor is not None:
            self.thresholds = list(threshold) if np.ndim(threshold) else [threshold] * len(self.values)
            if len(self.thresholds) < len(self.values) - (not stop):
                raise ValueError(
                    f"`threshold` has a number for each of {len(self.values)} stages; received {threshold!r}."
                )
        elif stop:
            raise ValueError("`stop` ends training at a threshold; received it with `epochs`. Give `monitor` instead.")
        self.monitor, self.mode, self.stop = monitor, mode, stop
        self._done = False

    @property
    def stage(self):
        """int, the number of the value that the dataset has now; 0 where it has none of them."""
        value = getattr(self.dataset, self.attribute)
        return self.values.index(value) if value in self.values else 0

    def on_epoch_begin(self, epoch, logs=None):
        if self.ends is not None:
            stage = int(np.searchsorted(self.ends, epoch, side="right"))
        else:
            stage = self.stage + self._done
            self._done = False
        value = self.values[min(stage, len(self.values) - 1)]
        if value != getattr(self.dataset, self.attribute):
            setattr(self.dataset, self.attribute, value)

    def on_epoch_end(self, epoch, logs=None):
        if self.monitor is None:
            return
        found = (logs or {}).get(self.monitor)
        if found is None:
            raise ValueError(f"`monitor` is a name in the logs, {sorted(logs or {})}; received {self.monitor!r}.")
        threshold = (*self.thresholds, None)[self.stage]
        if threshold is not None:  # None: the last stage, which nothing ends
            self._done = bool(found <= threshold if self.mode == "min" else found >= threshold)
        if self._done and self.stop and self.stage == len(self.values) - 1:
            self.model.stop_training = True
