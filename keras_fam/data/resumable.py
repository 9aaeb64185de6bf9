"""Datasets whose position is one number, so that `fit` and a resumed run continue where the last call stopped."""

import itertools

import keras
import numpy as np

from keras_fam.training.batches import check_workers


class ResumableDataset(keras.utils.PyDataset):
    """A `keras.utils.PyDataset` whose batches depend on their number alone, with a position that can be saved.

    Index i of Keras is batch `position + i`. Reading does not move the position, since Keras may look ahead: it is
    moved by `StreamingModel.fit`, by the callback `keras_fam.training.DatasetPosition` for other models, or by
    `advance`. Subclasses implement `batch_at`, and list what else their batches depend on in `settings` (which must be
    equal when a saved position is loaded) or in `saved` and `restore` (which may change).

    Batches are read in order, by one worker: Keras' worker threads and processes lose the order (after the trial batch
    that JAX and torch read, the batches prefetched with it come first). `to_tf_dataset` prefetches in order.

    Args:
        steps_per_epoch: None (no end; `fit` then needs `steps_per_epoch`), or int, batches per epoch.
        **kwargs: `workers` (at most 1), `use_multiprocessing` (False) and `max_queue_size` of `PyDataset`.

    Attributes:
        position: int, batches that training has used.

    Raises:
        ValueError: for `steps_per_epoch` below 1, or several workers.
    """

    def __init__(self, steps_per_epoch=None, **kwargs):
        super().__init__(**kwargs)
        check_workers(self.workers, self.use_multiprocessing, type(self).__name__)
        if steps_per_epoch is not None and (not isinstance(steps_per_epoch, int) or steps_per_epoch < 1):
            raise ValueError(
                f"`steps_per_epoch` must be None or a positive integer. Received: steps_per_epoch={steps_per_epoch!r}"
            )
        self.steps_per_epoch, self.position = steps_per_epoch, 0

    def batch_at(self, number):
        """Batch `number`, counted from the start of training (from 0)."""
        raise NotImplementedError

    def settings(self):
        """Everything constant that the batches depend on, as a JSON-serializable dict."""
        return {"steps_per_epoch": self.steps_per_epoch}

    def saved(self, number):
        """Everything variable that the batches from `number` on depend on, as a JSON-serializable dict."""
        return {}

    def restore(self, number, saved):
        """Sets what `saved(number)` returned."""

    # Keras ------------------------------------------------------------------------------------------------------

    @property
    def epoch(self):
        """int, the epoch of `position` (0 without `steps_per_epoch`)."""
        return self.position // self.steps_per_epoch if self.steps_per_epoch else 0

    @property
    def num_batches(self):
        """int, batches left in this epoch; None without `steps_per_epoch`."""
        return self.steps_per_epoch and self.steps_per_epoch - self.position % self.steps_per_epoch

    @property
    def batches_left(self):
        """int, batches from `position` on that have data; None without end."""
        return None

    def __len__(self):
        if self.steps_per_epoch is None:
            raise TypeError("A dataset without `steps_per_epoch` has no length. Set `steps_per_epoch`.")
        return self.num_batches

    def __getitem__(self, index):
        if self.steps_per_epoch and not 0 <= index < self.num_batches:
            raise IndexError(f"This epoch has {self.num_batches} batches left. Received: index={index}")
        return self.batch_at(self.position + int(index))

    def __iter__(self):
        number = self.num_batches
        for i in itertools.count() if number is None else range(number):
            yield self[i]

    # Position ---------------------------------------------------------------------------------------------------

    def advance(self, batches):
        """Moves the position by `batches` (int) batches."""
        self.load_state_dict(self.state_dict(batches))

    def state_dict(self, batches=0):
        """The position after `batches` more batches, as a JSON-serializable dict."""
        number = self.position + int(batches)
        return {"position": number, "settings": self.settings(), **self.saved(number)}

    def load_state_dict(self, state):
        """Moves to a position that `state_dict` or `keras_fam.distribution.gather_position` returned.

        Raises:
            ValueError: if it belongs to a dataset with other settings. This dataset is then unchanged.
        """
        state = self.part_of(state)
        own, theirs = self.settings(), state.get("settings")
        if own != theirs:
            raise ValueError(
                f"The position belongs to a dataset with other settings. Expected: {own}. Received: {theirs}. Create "
                "the dataset with the settings that it was saved with."
            )
        self.restore(state["position"], {k: v for k, v in state.items() if k not in ("position", "settings")})
        self.position = int(state["position"])

    @staticmethod
    def merge_states(states):
        """The position of one whole dataset, from `state_dict` of each of its shards in order.

        Here, that of shard 0, without its number: it can be loaded by as many shards. `DocumentRows` can do more.
        """
        first = states[0]
        settings = first["settings"]
        if len(states) == 1 or "shard" not in settings:
            return first
        return {**first, "settings": {**settings, "shard": [None, settings["shard"][1]]}}

    def part_of(self, state):
        """The part of a merged position that belongs to this shard; another position as it is."""
        settings, own = state.get("settings") or {}, self.settings().get("shard")
        if own is None or settings.get("shard") != [None, own[1]]:
            return state
        return {**state, "settings": {**settings, "shard": own}}

    def to_tf_dataset(self, fixed_length=True):
        """The batches from `position` to the end of the epoch, as a `tf.data.Dataset`.

        Each iteration starts at the current `position` and has as many batches as are left now. To resume within an
        epoch, make one dataset for the rest of that epoch, and another one for the epochs that follow.

        Args:
            fixed_length: bool, whether all batches have as many tokens as the first one; False leaves axis 1 open.

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
    """`(index, count)` of a shard, as ints; ValueError unless 0 <= index < count."""
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"`shard` must be (index, count) with 0 <= index < count. Received: shard={tuple(shard)}")
    return int(index), int(count)
