"""Recall over a small alphabet: associative recall, and copy."""

import numpy as np

from keras_fam.data.recall import Recall, answer_positions, random_places, write


class _Symbols(Recall):
    """Tasks over a small alphabet: special tokens, and `symbols` symbols behind them. Filler is token 0."""

    specials = ()

    def _set(self, symbols, filler_weight, seed):
        if symbols < 2:
            raise ValueError(f"`symbols` is at least 2; received {symbols}.")
        self.symbols, self.filler_weight, self._rng = symbols, filler_weight, np.random.default_rng(seed)

    @property
    def vocabulary_size(self):
        return len(self.specials) + self.symbols

    def _draw_symbols(self, rng, *shape):
        return rng.integers(len(self.specials), self.vocabulary_size, shape).astype("int32")


class AssociativeRecall(_Symbols):
    """Pairs of keys and values, and questions for the values of some keys: remember, and rewrite (arXiv 2407.04841).

    Ids: 0 `<blank>`, 1 `<pair>`, 2 `<ask>`, 3 `<is>`, then the symbols. A pair reads `<pair> key <is> value`, a
    question `<ask> key <is> value`. Blanks stand between.

    Args:
        num_pairs: pairs in a sequence.
        num_keys: None (remember: all keys of a sequence differ), or how many different keys the pairs are made of
            (rewrite: a key that comes again has a new value, and the last one counts).
        num_questions: how many of the keys are asked for, without repetition.
        key_length, value_length: symbols in each.
        symbols: size of the alphabet.
        spread: `"random"` places, or an int: pair i starts at token i · spread (a block size puts each in a block).
        filler_weight: loss weight of all tokens but the answers'.
        seed: int, of the batches for which no seed is given.

    Batches add `distances` int32 `[B, num_questions]`, tokens from the value that counts to its answer; `updates` int32
    `[B, num_questions]`, how often the asked key was stated; `pair_positions` int32 `[B, num_pairs]`.
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
        if not 1 <= num_questions <= self.num_keys <= num_pairs or self.num_keys > symbols**key_length:
            raise ValueError(
                "1 ≤ `num_questions` ≤ `num_keys` ≤ `num_pairs`, and there are symbols ** key_length keys; received "
                f"{num_questions}, {self.num_keys}, {num_pairs} and {symbols**key_length}."
            )
        if spread != "random" and (not isinstance(spread, int) or spread < self._size):
            raise ValueError(f'`spread` is "random" or at least {self._size} tokens; received {spread!r}.')

    @property
    def _size(self):
        return 2 + self.key_length + self.value_length

    @property
    def chance(self):
        """Exact accuracy of guessing symbols."""
        return float(self.symbols) ** -(self.value_length * self.num_questions)

    @property
    def template_tokens(self):
        pairs = self.num_pairs * (self._size if self.spread == "random" else self.spread)
        return pairs + self.num_questions * self._size

    def draw(self, rng, batch_size, total, split):
        n, size, tail = self.num_pairs, self._size, self.num_questions * self._size
        keys = np.stack([self._distinct_keys(rng) for _ in range(batch_size)])  # [B, num_keys, key_length]
        # Every key is stated once at least, the rest is drawn; then the order is.
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
            starts = random_places(rng, batch_size, n, size, total - tail)
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
        places = self.symbols ** np.arange(self.key_length)
        return (numbers[:, None] // places % self.symbols + len(self.specials)).astype("int32")

    def _sentence(self, start, keys, values):
        def word(name):
            return np.full((*keys.shape[:2], 1), self.specials.index(name), "int32")

        return np.concatenate([word(start), keys, word("<is>"), values], axis=2)


class Copy(_Symbols):
    """Symbols, a stretch of blanks, and the symbols again.

    Ids: 0 `<blank>`, 1 `<start>`, 2 `<copy>`, then the symbols: `<start> symbols blanks <copy> symbols`.

    Args:
        length: symbols to copy.
        symbols: size of the alphabet.
        filler_weight, seed: see `AssociativeRecall`.

    Batches add `distances` int32 `[B, length]`, tokens from each symbol to its copy.
    """

    specials = ("<blank>", "<start>", "<copy>")

    def __init__(self, length=8, symbols=16, filler_weight=0.0, seed=0):
        self._set(symbols, filler_weight, seed)
        if length < 1:
            raise ValueError(f"`length` is at least 1; received {length}.")
        self.length = length

    @property
    def chance(self):
        """Exact accuracy of guessing symbols."""
        return float(self.symbols) ** -self.length

    @property
    def template_tokens(self):
        return 2 * (1 + self.length)

    def draw(self, rng, batch_size, total, split):
        ids = np.zeros((batch_size, total), "int32")
        symbols = self._draw_symbols(rng, batch_size, self.length)
        start, copy = self.specials.index("<start>"), self.specials.index("<copy>")
        ids[:, 0], ids[:, 1 : 1 + self.length] = start, symbols
        ids[:, total - self.length - 1], ids[:, total - self.length :] = copy, symbols
        asked = answer_positions(total, batch_size, 1, 1, self.length)
        distances = np.full((batch_size, self.length), total - self.length - 1, "int32")
        return ids, asked, {"distances": distances}
