"""Accuracy of the answers to a task's questions."""

import typing

import numpy as np


class PassKeyAccuracy(typing.NamedTuple):
    """Accuracy of answers of several tokens each.

    Attributes:
        exact: float, share of rows in which every token of the answer is right.
        digit: float, share of the answers' tokens that are right.
    """

    exact: float
    digit: float


def accuracy(predictions, keys):
    """Accuracy of greedy answers over the whole vocabulary.

    Teacher-forced logits serve as well as generated ids for `exact`: a row is right under teacher forcing if and only
    if greedy decoding gets it right. (`digit` may differ between the two.)

    Args:
        predictions: `[B, A, V]` logits at `answer_positions`, or `[B, A]` integer token ids.
        keys: `[B, A]` integer token ids: a batch's `keys` (PassKey) or `answers` (the other tasks). Where answers
            differ in length, negative ids fill them up and are left out; so are rows without an answer.

    Returns:
        A `PassKeyAccuracy`.

    Raises:
        ValueError: if the shapes do not match, if there are no answers, or if logits are NaN.

    Example:

    ```python
    task = keras_fam.tasks.PassKey(digits=3)
    batch = task.batch(2, total_tokens=64)
    keras_fam.tasks.accuracy(batch["keys"], batch["keys"])  # PassKeyAccuracy(exact=1.0, digit=1.0)
    ```
    """
    predictions, keys = np.asarray(predictions), np.asarray(keys)
    if predictions.ndim == 3:
        if np.isnan(predictions).any():
            raise ValueError("The logits contain NaN.")
        predictions = predictions.argmax(-1)
    if predictions.shape != keys.shape or keys.ndim != 2 or not keys.size:
        raise ValueError(
            "`predictions` must be [B, A, V] or [B, A] and `keys` [B, A], not empty. "
            f"Received shapes (after argmax): {predictions.shape} and {keys.shape}"
        )
    told = keys >= 0
    if not told.any():
        raise ValueError("There must be a token to answer with. Received: `keys` with negative ids alone")
    right = predictions == keys
    exact = (right | ~told).all(-1)[told.any(-1)]
    return PassKeyAccuracy(exact=float(exact.mean()), digit=float(right[told].mean()))
