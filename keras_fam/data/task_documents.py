"""Texts of a task as a sequence of documents, for `DocumentRows`: each is written when it is read."""

import numpy as np

from keras_fam.data.document_rows import Document


class TaskDocuments:
    """A sequence of `Document`s from a task in natural text; `documents[i]` depends on i and the seed alone.

    Args:
        task: a `keras_fam.tasks.ProseTask`, or any object with such a `text`.
        count: int, how many documents there are.
        tokens: int, tokens of each document that have a next token, or a pair `(low, high)`: uniform between them, both
            included.
        multiple: int, lengths are rounded down to a multiple of it, but not to 0: the block size, or the chunk of
            `DocumentRows`, so that no padding is needed.
        seed: int.
        split: `"train"` or `"held_out"`, see the task.

    Raises:
        ValueError: for sizes that are not positive, or a pair that does not increase.

    Example:

    ```python
    documents = keras_fam.data.TaskDocuments(task, count=10_000, tokens=(512, 4096), multiple=512)
    rows = keras_fam.data.DocumentRows(documents, batch_size=8, chunk_tokens=512, steps_per_epoch=100)
    stream.fit(rows, epochs=10)
    ```
    """

    def __init__(self, task, count, tokens, *, multiple=1, seed=0, split="train"):
        low, high = (tokens, tokens) if np.ndim(tokens) == 0 else tokens
        if not 1 <= low <= high or count < 1 or multiple < 1:
            raise ValueError(
                "`tokens` must be a positive integer or a pair (low, high) of them that does not decrease, and `count` "
                f"and `multiple` positive integers. Received: tokens={tokens}, count={count}, multiple={multiple}"
            )
        self.task, self.count, self.low, self.high = task, int(count), int(low), int(high)
        self.multiple, self.seed, self.split = int(multiple), int(seed), split

    def __len__(self):
        return self.count

    def length(self, index):
        """int, tokens of document `index` that have a next token."""
        drawn = int(np.random.default_rng([self.seed, index]).integers(self.low, self.high + 1))
        return max(drawn // self.multiple, 1) * self.multiple

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(f"There are {self.count} documents. Received: index={index}")
        text = self.task.text(self.length(index) + 1, seed=(self.seed, int(index)), split=self.split)
        return Document(text.token_ids, text.weights)
