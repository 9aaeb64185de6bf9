"""`Curriculum`: an attribute of a dataset that grows during training."""

import keras
import numpy as np


class Curriculum(keras.callbacks.Callback):
    """Trains on longer and longer sequences: sets an attribute of a dataset at the start of an epoch.

    ```python
    batches = keras_fam.data.TaskBatches(task, 32, block_size=32, blocks=2, steps_per_epoch=100)
    model.fit(batches, epochs=20, callbacks=[
        keras_fam.training.Curriculum(batches, (2, 3, 4, 6, 8), monitor="loss", threshold=0.1),
        keras_fam.training.DatasetPosition(batches),
    ])
    ```

    In a resumed run the stage follows from the number of the epoch if `epochs` is given, and from the attribute's value
    if `monitor` is.

    Args:
        dataset: `TaskBatches`, `DocumentRows`, or any object with the attribute.
        values: the attribute's values, one per stage.
        attribute: str, `"blocks"` (`TaskBatches`) or `"longest"` (`DocumentRows`, in tokens), for example.
        epochs: int, or a sequence of ints, the epochs of each stage; None with `monitor`.
        monitor: None, or a key of the logs such as `"loss"`: the next stage starts after an epoch at the end of which
            it has reached `threshold`.
        threshold: float, or one per stage (the last one is needed with `stop` only).
        mode: `"min"` (a stage ends at or below its threshold) or `"max"` (at or above).
        stop: bool, whether training stops when the last stage has reached its threshold.

    Raises:
        ValueError: unless exactly one of `epochs` and `monitor` is given with what it needs.
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
            raise ValueError(
                f"`values` must hold at least one value of the dataset's attribute {attribute!r}; received {values!r} "
                f"and a {type(dataset).__name__}."
            )
        if (epochs is None) == (monitor is None) or (monitor is None) != (threshold is None):
            raise ValueError(
                "A stage ends after `epochs`, or when `monitor` reaches `threshold`: give the one or the other two. "
                f"Received: epochs={epochs!r}, monitor={monitor!r}, threshold={threshold!r}"
            )
        if mode not in ("min", "max"):
            raise ValueError(f'`mode` must be "min" or "max". Received: mode={mode!r}')
        self.ends = None
        if epochs is not None:
            lengths = [epochs] * len(self.values) if isinstance(epochs, int) else list(epochs)
            if len(lengths) < len(self.values) - 1 or min(lengths) < 1:
                raise ValueError(
                    f"`epochs` needs a positive integer for each of {len(self.values)} stages; received {epochs!r}."
                )
            self.ends = np.cumsum(lengths)
        self.thresholds = None
        if monitor is not None:
            self.thresholds = list(threshold) if np.ndim(threshold) else [threshold] * len(self.values)
            if len(self.thresholds) < len(self.values) - (not stop):
                raise ValueError(
                    f"`threshold` needs a number for each of {len(self.values)} stages; received {threshold!r}."
                )
        elif stop:
            raise ValueError("`stop` ends training at a threshold; received stop=True with `epochs`. Use `monitor`.")
        self.monitor, self.mode, self.stop = monitor, mode, stop
        self._done = False

    @property
    def stage(self):
        """int, the index in `values` of the dataset's current value; 0 if it is none of them."""
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
            raise ValueError(f"`monitor` must be a name in the logs, {sorted(logs or {})}; received {self.monitor!r}.")
        threshold = (*self.thresholds, None)[self.stage]
        if threshold is not None:  # None: the last stage does not end
            self._done = bool(found <= threshold if self.mode == "min" else found >= threshold)
        if self._done and self.stop and self.stage == len(self.values) - 1:
            self.model.stop_training = True
