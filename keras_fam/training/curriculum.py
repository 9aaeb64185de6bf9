"""`Curriculum`: a number of a dataset that grows while a model is trained."""

import keras
import numpy as np


class Curriculum(keras.callbacks.Callback):
    """Lets sequences grow while training: sets a number of a dataset when an epoch begins.

    ```python
    batches = keras_fam.data.TaskBatches(task, 32, block_size=32, blocks=2, steps_per_epoch=100)
    model.fit(batches, epochs=20, callbacks=[
        keras_fam.training.Curriculum(batches, (2, 3, 4, 6, 8), monitor="loss", threshold=0.1),
        keras_fam.training.DatasetPosition(batches),
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
