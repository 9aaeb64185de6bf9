"""Texts without statements of our own: books as they are, and segments of them that are repeated."""

import numpy as np

from keras_fam.tasks import phrases
from keras_fam.tasks.facts import Facts
from keras_fam.tasks.layout import Answer, TaskText


class Book(Facts):
    """Consecutive tokens of the prose, all of which are learned.

    Args:
        weight: float, the loss weight of each token, times that of `Prose.weights`, where there are any.
        name: see `Facts`.

    Raises:
        ValueError: if the weight is not above 0.

    Example:

    ```python
    book = keras_fam.tasks.Book(weight=0.1)
    ```
    """

    def __init__(self, weight=1.0, name=None):
        super().__init__(name)
        if not weight > 0:
            raise ValueError(f"`weight` must be above 0. Received: weight={weight!r}")
        self.weight = weight

    def write(self, rng, total, prose, layout):
        ids, _, weights = prose.window(rng, total)
        return TaskText(ids, (self.weight * weights).astype("float32"), [])


class RepeatedSegment(Facts):
    """Prose that ends with a copy of a segment of itself (Sec. 3.1), whose first tokens say which segment it is.

    Args:
        length: int, tokens that are to be copied.
        cue: int, tokens of the copy that are given (at weight 0) before those.
        weight: float, the loss weight of the copied tokens.
        name: see `Facts`.

    Raises:
        ValueError: for options outside their range.

    Example:

    ```python
    repeated = keras_fam.tasks.RepeatedSegment(length=16)
    ```
    """

    def __init__(self, length=32, cue=8, weight=1.0, name=None):
        super().__init__(name)
        if length < 1 or cue < 1 or not weight > 0:
            raise ValueError(
                "`length` and `cue` must be positive integers and `weight` above 0. Received: "
                f"length={length}, cue={cue}, weight={weight}"
            )
        self.length, self.cue, self.weight = length, cue, weight

    def write(self, rng, total, prose, layout):
        marker = layout.encode(phrases.choose(rng, phrases.REPEAT, layout.phrasings))
        size = self.cue + self.length
        room = total - len(marker) - size
        if room < size:
            raise ValueError(
                f"A text must have room for a segment of {size} tokens, a marker and a copy. Received: "
                f"total_tokens={total}, of which {room} are left for the text. Raise the length, or lower `length`."
            )
        ids, gaps, _ = prose.window(rng, room)
        # It begins with a sentence where one begins, and ends so far before the copy as there is room for.
        last = max(room - size - layout.min_distance, 0)
        if rng.random() < layout.early:
            last = min(last, layout.early_tokens)
        starts = gaps[gaps <= last]
        start = int(starts[rng.integers(len(starts))]) if len(starts) else int(rng.integers(last + 1))
        copy = ids[start : start + size]
        weights = np.zeros(total, "float32")
        weights[total - self.length :] = self.weight
        first = start + self.cue  # where what is asked for stands in the text
        answer = Answer(total - self.length, total, total - self.length - first, self.name)
        return TaskText(np.concatenate([ids, marker, copy]).astype("int32"), weights, [answer])
