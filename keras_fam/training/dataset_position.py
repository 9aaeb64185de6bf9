"""`DatasetPosition`: a dataset's position advances with training."""

import keras


class DatasetPosition(keras.callbacks.Callback):
    """Advances the `position` of a `keras_fam.data` dataset by the batches that `fit` takes.

    `StreamingModel.fit` does so by itself; `keras.Model.fit` needs this callback (or `SaveProgress`), or every epoch
    and every `fit` reads the same batches. Pass `shuffle=False` to it where the order of batches matters.

    ```python
    rows = keras_fam.data.DocumentRows(books, batch_size=8, chunk_tokens=256, steps_per_epoch=100)
    model.fit(rows, epochs=10, shuffle=False, callbacks=[keras_fam.training.DatasetPosition(rows)])
    ```

    Args:
        dataset: the `ResumableDataset` that `fit` reads.

    Raises:
        ValueError: when training begins, if `fit` was given `steps_per_epoch` beside the dataset's own, or takes more
            batches than the dataset has left.
    """

    def __init__(self, dataset):
        super().__init__()
        self.dataset, self._before, self._taken, self._begun = dataset, 0, 0, False

    @property
    def taken(self):
        """int, batches taken since the dataset's position."""
        return self._before + self._taken

    def on_train_begin(self, logs=None):
        self._before = self._taken = 0
        self._begun = False
        steps = (self.params or {}).get("steps")
        if self.dataset.num_batches is not None and steps not in (None, self.dataset.num_batches):
            raise ValueError(
                f"An epoch is the dataset's: {self.dataset.num_batches} batches are left in this one. Received "
                f"steps_per_epoch={steps}: leave it out of `fit`, or out of the dataset."
            )

    def on_epoch_begin(self, epoch, logs=None):
        if not self._begun:
            self._begun = True
            self._check_left((self.params or {}).get("epochs", epoch + 1) - epoch)

    def _check_left(self, epochs):
        """ValueError if one of the next epochs would begin after the end of the data."""
        left, size = self.dataset.batches_left, self.dataset.steps_per_epoch
        if left is not None and size and epochs > 0 and self.dataset.num_batches + (epochs - 2) * size >= left:
            raise ValueError(
                f"A dataset with `passes` ends; {type(self.dataset).__name__} has data for {left} more batches, in "
                f"epochs of {size}. Received: {epochs} epochs, of which the last would train on padding alone. Train "
                "for fewer epochs, or use passes=None, which reads without end."
            )

    def on_train_batch_end(self, batch, logs=None):
        self._taken = batch + 1

    def on_epoch_end(self, epoch, logs=None):
        if self.dataset.num_batches is None:  # Keras reads on in one iteration
            self._before, self._taken = self.taken, 0
        else:
            self._move()

    def on_train_end(self, logs=None):
        self._move()

    def _move(self):
        self.dataset.advance(self.taken)
        self._before = self._taken = 0


def following(x, callbacks):
    """`callbacks` with a `DatasetPosition` of `x`, if that has a position and none of them advances it yet."""
    known = any(isinstance(c, DatasetPosition) and c.dataset is x for c in callbacks)
    return callbacks if known or not hasattr(x, "load_state_dict") else [DatasetPosition(x), *callbacks]
