"""A dataset's place keeps step with training."""

import keras


class DatasetPosition(keras.callbacks.Callback):
    """Moves the `position` of a `keras_fam.data` dataset on with the batches that `fit` takes.

    `StreamingModel.fit` does so by itself; `keras.Model.fit` needs this callback (or `SaveProgress`), or every epoch
    and every `fit` reads the same batches.

    Args:
        dataset: the `ResumableDataset` that `fit` reads.

    Raises:
        ValueError: when training begins, if `fit` was given `steps_per_epoch` beside the dataset's own.
    """

    def __init__(self, dataset):
        super().__init__()
        self.dataset, self._before, self._taken = dataset, 0, 0

    @property
    def taken(self):
        """int, batches taken since the dataset's position."""
        return self._before + self._taken

    def on_train_begin(self, logs=None):
        self._before = self._taken = 0
        steps = (self.params or {}).get("steps")
        if self.dataset.num_batches is not None and steps not in (None, self.dataset.num_batches):
            raise ValueError(
                f"An epoch is the dataset's: {self.dataset.num_batches} batches are left in this one. Received "
                f"steps_per_epoch={steps}: leave it out of `fit`, or out of the dataset."
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
    """`callbacks` with one that follows the dataset `x`, if it has a place and none does yet."""
    known = any(isinstance(c, DatasetPosition) and c.dataset is x for c in callbacks)
    return callbacks if known or not hasattr(x, "load_state_dict") else [DatasetPosition(x), *callbacks]
