"""Datasets whose place is one number: so `fit` reads on, and a resumed run goes on where the last one was."""

import itertools

import keras
import numpy as np


class ResumableDataset(keras.utils.PyDataset):
    """A `keras.utils.PyDataset` of batches that follow from their number alone, with a place that can be saved.

    Index i of Keras is batch `position + i`. Nothing moves by being read, since Keras may look ahead: `position` is
    moved by `StreamingModel.fit`, by the callback `keras_fam.training.DatasetPosition` for other models, or by
    `advance`. Subclasses write `batch_at`, and put what else their batches depend on into `settings` (which has to be
    the same when a saved place is loaded) or into `saved` and `restore` (which may change).

    Args:
        steps_per_epoch: batches in an epoch; None for no end (`fit` then takes `steps_per_epoch`).
        **kwargs: `workers`, `use_multiprocessing`, `max_queue_size` of `PyDataset`.

    Attributes:
        position: int, batches that training has taken.
    """

    def __init__(self, steps_per_epoch=None, **kwargs):
        super().__init__(**kwargs)
        if steps_per_epoch is not None and (not isinstance(steps_per_epoch, int) or steps_per_epoch < 1):
            raise ValueError(f"`steps_per_epoch` is None or a number of batches; received {steps_per_epoch!r}.")
        self.steps_per_epoch, self.position = steps_per_epoch, 0

    def batch_at(self, number):
        """Batch `number`, counted from the start of training."""
        raise NotImplementedError

    def settings(self):
        """JSON-able dict of what the batches depend on and what never changes."""
        return {"steps_per_epoch": self.steps_per_epoch}

    def saved(self, number):
        """JSON-able dict of what the batches from `number` on depend on and what may change."""
        return {}

    def restore(self, number, saved):
        """Takes over what `saved(number)` gave."""

    # Keras ------------------------------------------------------------------------------------------------------

    @property
    def epoch(self):
        """int, the epoch that `position` lies in (0 without end)."""
        return self.position // self.steps_per_epoch if self.steps_per_epoch else 0

    @property
    def num_batches(self):
        """Batches left in this epoch; None without end. A new epoch is whole again."""
        return self.steps_per_epoch and self.steps_per_epoch - self.position % self.steps_per_epoch

    def __len__(self):
        if self.steps_per_epoch is None:
            raise TypeError("A dataset without end has no length; give it `steps_per_epoch`.")
        return self.num_batches

    def __getitem__(self, index):
        if self.steps_per_epoch and not 0 <= index < self.num_batches:
            raise IndexError(f"This epoch has {self.num_batches} batches left; received index {index}.")
        return self.batch_at(self.position + int(index))

    def __iter__(self):
        number = self.num_batches
        for i in itertools.count() if number is None else range(number):
            yield self[i]

    # Place ------------------------------------------------------------------------------------------------------

    def advance(self, batches):
        """Moves on by `batches` (int) batches."""
        self.load_state_dict(self.state_dict(batches))

    def state_dict(self, batches=0):
        """The place `batches` batches behind `position`, as a dict that JSON can hold."""
        number = self.position + int(batches)
        return {"position": number, "settings": self.settings(), **self.saved(number)}

    def load_state_dict(self, state):
        """Takes a place that `state_dict` gave.

        Raises:
            ValueError: if it is the place of a dataset with other settings; this one is then as it was.
        """
        own, theirs = self.settings(), state.get("settings")
        if own != theirs:
            raise ValueError(
                f"A place belongs to a dataset with its settings; this one has {own}, the saved one {theirs}. Make the "
                "dataset as it was."
            )
        self.restore(state["position"], {k: v for k, v in state.items() if k not in ("position", "settings")})
        self.position = int(state["position"])

    def to_tf_dataset(self, fixed_length=True):
        """The batches from `position` on, to the end of the epoch, as a `tf.data.Dataset`.

        It is read from where `position` stands then, and has as many batches as are left now: within a broken epoch,
        make one for the rest of it, and another for whole epochs.

        Args:
            fixed_length: whether all batches have the first one's number of tokens; False leaves axis 1 open.

        Raises:
            ImportError: without TensorFlow.
        """
        from keras_fam.ops.backend import tf_dataset

        def shape(x):
            return x.shape if fixed_length or x.ndim < 2 else (x.shape[0], None, *x.shape[2:])

        first = keras.tree.map_structure(np.asarray, self[0])
        signature = keras.tree.map_structure(lambda x: (x.dtype.name, shape(x)), first)
        return tf_dataset(lambda: iter(self), signature, self.num_batches)


def check_shard(shard):
    """`(index, count)` of a shard; ValueError unless 0 ≤ index < count."""
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"`shard` is (index, count) with 0 ≤ index < count; received {tuple(shard)}.")
    return int(index), int(count)
