"""Associative recall: pairs of keys and values, to be remembered or rewritten."""

import numpy as np

from keras_fam.tasks.recall_task import SymbolTask, answer_positions, random_positions, write


class AssociativeRecall(SymbolTask):
    """Pairs of keys and values, and questions for the values of some keys: remember and rewrite (arXiv 2407.04841).

    Ids: 0 `<blank>`, 1 `<pair>`, 2 `<ask>`, 3 `<is>`, then the symbols. A pair reads `<pair> key <is> value`, a
    question `<ask> key <is> value`, with blanks between them. Batches (see `batch`) add `distances` int32
    `[B, num_questions]`, tokens from the valid value to its answer; `updates` int32 `[B, num_questions]`, how often the
    requested key was stated; `pair_positions` int32 `[B, num_pairs]`.

    Args:
        num_pairs: int, pairs in a sequence.
        num_keys: None (remember: all keys of a sequence differ), or int, the number of different keys (rewrite: a
            repeated key gets a new value, and its last one is valid).
        num_questions: int, how many different keys are requested.
        key_length, value_length: int, symbols in each key and value.
        symbols: int, size of the alphabet.
        spread: `"random"` (pairs at random positions), or int: pair i starts at token i · spread, so that the block
            size puts one pair into each block.
        filler_weight: float, loss weight of all tokens but the answers'.
        seed: int, seed of the batches that are drawn without one.

    Raises:
        ValueError: for options outside their range.

    Example:

    ```python
    task = keras_fam.tasks.AssociativeRecall(num_pairs=8, num_keys=4)
    batch = task.batch(8, total_tokens=128)
    batch["answers"].shape  # (8, 1)
    ```
    """

    specials = ("<blank>", "<pair>", "<ask>", "<is>")

    def __init__(
        self,
        num_pairs=4,
        num_keys=None,
        num_questions=1,
        key_length=1,
        value_length=1,
        symbols=16,
        spread="random",
        filler_weight=0.0,
        seed=0,
    ):
        self._set(symbols, filler_weight, seed)
        self.num_pairs, self.num_keys = num_pairs, num_pairs if num_keys is None else num_keys
        self.num_questions, self.key_length, self.value_length = num_questions, key_length, value_length
        self.spread = spread
        if min(key_length, value_length) < 1:
            raise ValueError(
                "`key_length` and `value_length` must be positive integers. Received: "
                f"key_length={key_length}, value_length={value_length}"
            )
        if not 1 <= num_questions <= self.num_keys <= num_pairs:
            raise ValueError(
                "1 <= `num_questions` <= `num_keys` <= `num_pairs` must hold. Received: "
                f"num_questions={num_questions}, num_keys={self.num_keys}, num_pairs={num_pairs}"
            )
        if self.num_keys > symbols**key_length:
            raise ValueError(
                f"There are only symbols ** key_length = {symbols**key_length} different keys. Received: "
                f"num_keys={self.num_keys}. Raise `symbols` or `key_length`, or lower `num_keys`."
            )
        if spread != "random" and (not isinstance(spread, int) or spread < self._size):
            raise ValueError(f'`spread` must be "random" or an integer >= {self._size}. Received: spread={spread!r}')

    @property
    def _size(self):
        return 2 + self.key_length + self.value_length

    @property
    def chance(self):
        """float, the exact accuracy of random symbols."""
        return float(self.symbols) ** -(self.value_length * self.num_questions)

    @property
    def template_tokens(self):
        """int, tokens of the shortest sequence, which has no filler."""
        pairs = self.num_pairs * (self._size if self.spread == "random" else self.spread)
        return pairs + self.num_questions * self._size

    def draw(self, rng, batch_size, total, split):
        n, size, tail = self.num_pairs, self._size, self.num_questions * self._size
        keys = np.stack([self._distinct_keys(rng) for _ in range(batch_size)])  # [B, num_keys, key_length]
        # Every key is stated at least once, in random order.
        which = np.concatenate(
            [
                np.tile(np.arange(self.num_keys), (batch_size, 1)),
                rng.integers(0, self.num_keys, (batch_size, n - self.num_keys)),
            ],
            axis=1,
        )
        which = np.take_along_axis(which, np.argsort(rng.random((batch_size, n)), axis=1), axis=1)
        values = self._draw_symbols(rng, batch_size, n, self.value_length)
        if self.spread == "random":
            starts = random_positions(rng, batch_size, n, size, total - tail)
        else:
            starts = np.tile(self.spread * np.arange(n), (batch_size, 1))
        ids = np.zeros((batch_size, total), "int32")
        stated = np.take_along_axis(keys, which[:, :, None], axis=1)
        write(ids, self._sentence("<pair>", stated, values), starts)
        asked_keys = np.argsort(rng.random((batch_size, self.num_keys)), axis=1)[:, : self.num_questions]
        same = which[:, None] == asked_keys[:, :, None]  # [B, Q, n]
        last = n - 1 - np.argmax(same[:, :, ::-1], axis=2)
        answers = np.take_along_axis(values, last[:, :, None], axis=1)
        questions = self._sentence("<ask>", np.take_along_axis(keys, asked_keys[:, :, None], axis=1), answers)
        ids[:, total - tail :] = questions.reshape(batch_size, tail)
        asked = answer_positions(total, batch_size, self.num_questions, size - self.value_length, self.value_length)
        at = np.take_along_axis(starts, last, axis=1) + 2 + self.key_length
        more = {
            "pair_positions": starts,
            "distances": asked[:, :: self.value_length] + 1 - at,
            "updates": same.sum(axis=2),
        }
        return ids, asked, {name: part.astype("int32") for name, part in more.items()}

    def _distinct_keys(self, rng):
        numbers = rng.choice(self.symbols**self.key_length, self.num_keys, replace=False)
        powers = self.symbols ** np.arange(self.key_length)
        return (numbers[:, None] // powers % self.symbols + len(self.specials)).astype("int32")

    def _sentence(self, start, keys, values):
        def word(name):
            return np.full((*keys.shape[:2], 1), self.specials.index(name), "int32")

        return np.concatenate([word(start), keys, word("<is>"), values], axis=2)
