"""Base of the tasks with statements and questions.

All return batches as PassKey does: a dict of `token_ids` and `targets` int32 `[B, T]`, `loss_weights` float32 `[B, T]`,
`answer_positions` int32 `[B, A]` (the positions whose *outputs* predict the answers' tokens), `answers` int32 `[B, A]`
(those tokens, for `keras_fam.tasks.accuracy`), and what each task adds.
"""

import numpy as np

from keras_fam.tasks.documents import check_split, task_generator


class RecallTask:
    """Statements at some positions of a sequence, and questions about them at its end.

    Subclasses implement `draw` and `template_tokens`, and set `filler_weight` (the loss weight of all tokens but the
    answers') and `_rng`.
    """

    @property
    def template_tokens(self):
        """int, tokens of the shortest sequence, which has no filler."""
        raise NotImplementedError

    def batch(self, batch_size, total_tokens=None, *, seed=None, split="train"):
        """One batch of B sequences of T tokens.

        Args:
            batch_size: int, B.
            total_tokens: int, T, at least `template_tokens` (the default); the rest is filler.
            seed: int (the same batch every time), `numpy.random.Generator`, or None (the task's own generator).
            split: `"train"` or `"held_out"`, the part of the prose, where the filler is prose. One int seed gives
                different sequences in the two.

        Returns:
            dict of `token_ids` int32 `[B, T]`; `targets` int32 `[B, T]`, the next tokens; `loss_weights` float32
            `[B, T]`, 1 where the target is part of an answer; `answer_positions` int32 `[B, A]`, the positions whose
            *outputs* predict the answers' tokens; `answers` int32 `[B, A]`, those tokens; and what the class adds.

        Raises:
            ValueError: for fewer than `template_tokens` tokens, or an unknown split.
        """
        total = self.template_tokens if total_tokens is None else int(total_tokens)
        check_split(split)
        if total < self.template_tokens:
            raise ValueError(
                f"A sequence has at least {self.template_tokens} tokens. Received: total_tokens={total_tokens}"
            )
        rng = task_generator(self._rng, seed, split)
        ids, asked, more = self.draw(rng, batch_size, total, split)
        weights = np.full(ids.shape, self.filler_weight, "float32")
        np.put_along_axis(weights, asked, 1.0, axis=1)
        weights[:, -1] = 0  # nothing follows the last token
        targets = np.concatenate([ids[:, 1:], np.zeros_like(ids[:, :1])], axis=1)
        answers = np.take_along_axis(targets, asked, axis=1)
        return {
            "token_ids": ids,
            "targets": targets,
            "loss_weights": weights,
            "answer_positions": asked.astype("int32"),
            "answers": answers,
            **more,
        }

    def draw(self, rng, batch_size, total, split):
        """Draws a batch: `(token_ids int32 [B, T], answer_positions [B, A], dict of further entries)`."""
        raise NotImplementedError


def random_positions(rng, batch_size, count, size, room):
    """Sorted starts int64 `[B, count]` of pieces of `size` tokens that do not overlap within `room` tokens."""
    free = np.sort(rng.integers(0, room - count * size + 1, (batch_size, count)), axis=1)
    return free + size * np.arange(count)


def write(ids, pieces, starts):
    """Writes pieces `[B, n, P]` into `ids` `[B, T]` at `starts` `[B, n]`."""
    positions = starts[:, :, None] + np.arange(pieces.shape[2])
    np.put_along_axis(ids, positions.reshape(len(ids), -1), pieces.reshape(len(ids), -1), axis=1)


def answer_positions(total, batch_size, count, question, answer):
    """Positions `[B, count · answer]` that predict the answers of `count` questions at the end of `total` tokens."""
    first = total - count * (question + answer)
    at = first + (question + answer) * np.arange(count)[:, None] + question - 1 + np.arange(answer)
    return np.repeat(at.reshape(1, -1), batch_size, axis=0)


class SymbolTask(RecallTask):
    """Tasks over a small alphabet: the special tokens, then `symbols` symbols. The filler is token 0."""

    specials = ()

    def _set(self, symbols, filler_weight, seed):
        if symbols < 2:
            raise ValueError(f"`symbols` must be at least 2. Received: symbols={symbols}")
        self.symbols, self.filler_weight, self._rng = symbols, filler_weight, np.random.default_rng(seed)

    @property
    def vocabulary_size(self):
        """int, V: the vocabulary size of a model for this task."""
        return len(self.specials) + self.symbols

    def _draw_symbols(self, rng, *shape):
        return rng.integers(len(self.specials), self.vocabulary_size, shape).astype("int32")
