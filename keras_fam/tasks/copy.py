"""Copy: a sequence of symbols, repeated after a gap."""

import numpy as np

from keras_fam.tasks.recall_task import SymbolTask, answer_positions


class Copy(SymbolTask):
    """Symbols, a gap of blanks, and the symbols again.

    Ids: 0 `<blank>`, 1 `<start>`, 2 `<copy>`, then the symbols. A sequence reads `<start> symbols blanks <copy>
    symbols`. Batches (see `batch`) add `distances` int32 `[B, length]`, tokens from each symbol to its copy.

    Args:
        length: int, symbols to copy.
        symbols: int, size of the alphabet.
        filler_weight, seed: see `AssociativeRecall`.

    Raises:
        ValueError: for options outside their range.

    Example:

    ```python
    task = keras_fam.tasks.Copy(length=8)
    batch = task.batch(8, total_tokens=128)
    batch["answers"].shape  # (8, 8)
    ```
    """

    specials = ("<blank>", "<start>", "<copy>")

    def __init__(self, length=8, symbols=16, filler_weight=0.0, seed=0):
        self._set(symbols, filler_weight, seed)
        if length < 1:
            raise ValueError(f"`length` must be a positive integer. Received: length={length}")
        self.length = length

    @property
    def chance(self):
        """float, the exact accuracy of random symbols."""
        return float(self.symbols) ** -self.length

    @property
    def template_tokens(self):
        """int, tokens of the shortest sequence, which has no gap."""
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
