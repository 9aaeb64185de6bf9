"""Batches of a task, generated on demand, each from its own seed."""

import numpy as np

from keras_fam.data.resumable import ResumableDataset, check_shard


class TaskBatches(ResumableDataset):
    """Batches `(token_ids, targets, loss_weights)` of a task, `[B, T]` each, for `fit`.

    Batch n of shard i is `task.batch(batch_size, total_tokens=blocks * block_size, seed=...)` with a seed derived from
    `seed`, i and n alone.

    Args:
        task: a task of `keras_fam.tasks`, or any object with such a `batch`.
        batch_size: int, B.
        block_size: int, S.
        blocks: int, blocks per sequence: T is `blocks · block_size`. May be changed between epochs, as
            `keras_fam.training.Curriculum` does. On TensorFlow, Keras fixes T to that of the first batches of a
            `PyDataset`: pass `to_tf_dataset(fixed_length=False)` to `fit` there.
        seed: int.
        shard: `(index, count)`, see `DocumentRows`.
        split: `"train"` or `"held_out"`, see the task.
        steps_per_epoch, **kwargs: see `ResumableDataset`.

    Example:

    ```python
    task = keras_fam.tasks.AssociativeRecall(num_pairs=4)
    batches = keras_fam.data.TaskBatches(task, batch_size=8, block_size=16, blocks=4, steps_per_epoch=100)
    lm.fit(batches)
    ```
    """

    def __init__(
        self,
        task,
        batch_size,
        *,
        block_size,
        blocks,
        seed=0,
        shard=(0, 1),
        split="train",
        steps_per_epoch=None,
        **kwargs,
    ):
        super().__init__(steps_per_epoch, **kwargs)
        self.task, self.batch_size, self.block_size, self.blocks = task, batch_size, block_size, blocks
        self.seed, self.shard, self.split = seed, check_shard(shard), split

    def batch_at(self, number):
        rng = np.random.default_rng([self.seed, self.shard[0], number])
        total = self.blocks * self.block_size
        batch = self.task.batch(self.batch_size, total_tokens=total, seed=rng, split=self.split)
        return batch["token_ids"], batch["targets"], batch["loss_weights"]

    def settings(self):
        own = {"batch_size": self.batch_size, "block_size": self.block_size, "seed": self.seed}
        return {**super().settings(), **own, "shard": list(self.shard), "split": self.split}

    def saved(self, number):
        return {"blocks": self.blocks}

    def restore(self, number, saved):
        self.blocks = saved["blocks"]
