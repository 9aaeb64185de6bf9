"""PassKey: repeat a number that was stated once, long ago, in a text about something else.

A sequence is: introduction, the key stated twice, filler, question, answer (the paper's Fig. 10, in words of our own).
One digit is one token, so an exact answer has a chance of `10 ** -digits`. Only NumPy is used here.
"""

import typing

import numpy as np

from keras_fam.data.prose import WordTokenizer, split, topics_text

INTRODUCTION = "Somewhere in this long text an important piece of information is hidden. Find it and keep it in mind."
STATEMENT = "The pass key is {key}. Do not forget it: {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
PAPER_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SPLITS = ("train", "held_out")


class PassKeyAccuracy(typing.NamedTuple):
    """`exact`: share of rows with every digit right. `digit`: share of right digits. Both are floats."""

    exact: float
    digit: float


def accuracy(predictions, keys):
    """Accuracy of greedy answers over the whole vocabulary.

    Teacher-forced logits serve as well as generated ids for `exact`: a row whose digits are all right under teacher
    forcing is the row that greedy decoding gets right, and no other (`digit` may differ between the two).

    Args:
        predictions: [B, digits, V] logits at `answer_positions`, or [B, digits] integer token ids.
        keys: [B, digits] token ids, as in a batch's `keys`.
    """
    predictions, keys = np.asarray(predictions), np.asarray(keys)
    if predictions.ndim == 3:
        if np.isnan(predictions).any():
            raise ValueError("The logits contain NaN.")
        predictions = predictions.argmax(-1)
    if predictions.shape != keys.shape or keys.ndim != 2 or not keys.size:
        raise ValueError(
            "`predictions` must be [B, digits, V] or [B, digits] and `keys` [B, digits], not empty. "
            f"Received shapes (after argmax): {predictions.shape} and {keys.shape}"
        )
    right = predictions == keys
    return PassKeyAccuracy(exact=float(right.all(-1).mean()), digit=float(right.mean()))


class _Plan(typing.NamedTuple):
    """Everything random about a set of sequences: enough to write any slice of them."""

    total: int  # T
    source: np.ndarray  # filler ids, read in a circle
    offset: np.ndarray  # [B, 1] where in `source` each row's filler starts
    lead: np.ndarray  # [B, 1] filler tokens before the key
    keys: np.ndarray  # [B, digits] token ids


class PassKey:
    """Makes PassKey batches and endless streams of them.

    The filler is a contiguous window of prose per row, at a random place, going round in a circle when a row is longer
    than the text. Every number in it reads `<num>`: the only digits in a sequence are the key's, so that nothing
    but the key can be the answer. With `filler="paper"` it is the paper's five short sentences again and again, every
    row from the first of them, the same in both splits.

    Args:
        filler: `"prose"` or `"paper"`.
        digits: length of the key. Keys are uniform over all `10 ** digits`, leading zeros included.
        key_position: `"start"` (the paper's: the key directly after the introduction) or `"anywhere"` (a uniformly
            random share of the filler stands between the introduction and the key).
        vocabulary_size: cap on the vocabulary of the tokenizer that is built here, for prose: the most frequent tokens
            of the training part. (`"paper"` needs about 50 tokens and has no more.)
        tokenizer: a `WordTokenizer` to use instead, for instance that of a trained model; it must know the template.
        documents: list of str to use as prose; default `topics_text()`.
        held_out, split_seed: see `split`; the vocabulary never sees the held-out part.
        filler_weight: loss weight of every token but the answer's, for a little language modelling on the side.
        seed: int, of the batches for which no seed is given.
    """

    def __init__(
        self,
        filler="prose",
        digits=5,
        key_position="start",
        vocabulary_size=2000,
        tokenizer=None,
        documents=None,
        held_out=0.2,
        split_seed=0,
        filler_weight=0.0,
        seed=0,
    ):
        if filler not in ("prose", "paper"):
            raise ValueError(f'`filler` must be "prose" or "paper". Received: {filler!r}')
        if key_position not in ("start", "anywhere"):
            raise ValueError(f'`key_position` must be "start" or "anywhere". Received: {key_position!r}')
        if digits < 1:
            raise ValueError(f"`digits` must be at least 1. Received: {digits}")
        self.filler, self.digits, self.key_position = filler, digits, key_position
        self.filler_weight = filler_weight
        template = [INTRODUCTION, STATEMENT.replace("{key}", ""), QUESTION]
        if filler == "prose":
            parts = split(topics_text() if documents is None else documents, held_out, split_seed)
        else:
            parts = ([PAPER_FILLER], [PAPER_FILLER])
        if tokenizer is None:
            required = [*template, PAPER_FILLER]
            cap = vocabulary_size if filler == "prose" else None
            tokenizer = WordTokenizer.from_documents(parts[0], cap, required=required)
        self.tokenizer = tokenizer
        self._filler_ids = {
            name: np.concatenate([tokenizer.encode(text, hide_numbers=True) for text in part])
            for name, part in zip(SPLITS, parts, strict=True)
        }
        self._introduction = tokenizer.encode(INTRODUCTION)
        self._question = tokenizer.encode(QUESTION)
        before, between, after = (tokenizer.encode(text) for text in STATEMENT.split("{key}"))
        blank = np.zeros(digits, dtype="int32")
        self._statement = np.concatenate([before, blank, between, blank, after])
        second = len(before) + digits + len(between)
        self._slots = np.array([len(before), second])[:, None] + np.arange(digits)  # [2, digits]
        if any(tokenizer.unk_id in ids for ids in (self._introduction, self._statement, self._question)):
            raise ValueError("The tokenizer does not know all words of the introduction, statement and question.")
        self._rng = np.random.default_rng(seed)

    @property
    def vocabulary_size(self):
        """Number of token ids, that is V of the model to be trained."""
        return self.tokenizer.vocabulary_size

    @property
    def chance(self):
        """Exact accuracy of guessing digits."""
        return 10.0**-self.digits

    @property
    def template_tokens(self):
        """Tokens of a sequence that are not filler, answer included: `total_tokens = template_tokens + filler`."""
        return len(self._introduction) + len(self._statement) + len(self._question) + self.digits

    def available_tokens(self, split="train"):
        """Filler tokens (int) of a split before it repeats."""
        return len(self._source(split))

    def batch(self, batch_size, filler_tokens=None, *, total_tokens=None, seed=None, split="train"):
        """One batch of sequences of equal length T.

        Args:
            batch_size: B.
            filler_tokens: number of filler tokens in each row; T is that plus `template_tokens`. Or instead:
            total_tokens: T itself, for instance a multiple of the block size; the filler is cut to fit.
            seed: int (the same batch every time), `numpy.random.Generator`, or None (the object's own, which moves on).
            split: `"train"` or `"held_out"`: which part of the prose. One int seed gives different keys in the two.

        Returns:
            dict of `token_ids` [B, T] int32; `targets` [B, T] int32, the next tokens (`<pad>` at the end);
            `loss_weights` [B, T] float32, 1 where the target is a digit of the answer, `filler_weight` elsewhere, 0 at
            the last position; `answer_positions` [B, digits] int32, the positions whose *outputs* predict the answer's
            digits (`targets` at them are `keys`; each is one before the digit's own position); `keys` [B, digits]
            int32 token ids; `key_positions` [B] int32, where the key is stated first; `statement_ends` [B] int32, the
            position after its statement; `start` 0.
        """
        plan = self._plan(batch_size, filler_tokens, total_tokens, seed, split)
        return self._write(plan, 0, plan.total)

    def stream(self, batch_size, filler_tokens=None, chunk_tokens=1024, *, total_tokens=None, seed=None, split="train"):
        """The sequences that `batch` gives for the same arguments, a chunk of the tokens at a time.

        Memory is constant in T, so T may be a million and more. Yields dicts as `batch` does with `token_ids`,
        `targets` and `loss_weights` of [B, C], positions `start` to `start + C` of the sequences; C is `chunk_tokens`,
        and less in the last chunk if T is not a multiple. `keys`, `answer_positions`, `key_positions` and
        `statement_ends` are in every chunk and count from the start of the sequence: answers lie at the very end.
        """
        if chunk_tokens < 1:
            raise ValueError(f"`chunk_tokens` must be at least 1. Received: {chunk_tokens}")
        plan = self._plan(batch_size, filler_tokens, total_tokens, seed, split)
        starts = range(0, plan.total, chunk_tokens)
        return (self._write(plan, start, min(start + chunk_tokens, plan.total)) for start in starts)

    def _source(self, split):
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {SPLITS}. Received: {split!r}")
        return self._filler_ids[split]

    def _plan(self, batch_size, filler_tokens, total_tokens, seed, split):
        """Draws what is random about B sequences."""
        if (filler_tokens is None) == (total_tokens is None):
            raise ValueError("Give either `filler_tokens` or `total_tokens`.")
        if filler_tokens is None:
            filler_tokens = total_tokens - self.template_tokens
        if filler_tokens < 0:
            raise ValueError(
                f"A sequence has at least {self.template_tokens} tokens. "
                f"Received: {filler_tokens + self.template_tokens}"
            )
        source = self._source(split)
        rng = seed
        if seed is None:
            rng = self._rng
        elif not isinstance(seed, np.random.Generator):
            rng = np.random.default_rng([int(seed), SPLITS.index(split)])
        keys = self.tokenizer.digit_ids[rng.integers(0, 10, (batch_size, self.digits))]
        offset = np.zeros((batch_size, 1), dtype="int64")
        if self.filler == "prose":
            offset = rng.integers(0, len(source), (batch_size, 1))
        lead = np.zeros((batch_size, 1), dtype="int64")
        if self.key_position == "anywhere":
            lead = rng.integers(0, filler_tokens + 1, (batch_size, 1))
        return _Plan(filler_tokens + self.template_tokens, source, offset, lead, keys)

    def _tokens(self, plan, start, stop):
        """Token ids [B, stop - start] of the sequences' positions `start` to `stop`; `<pad>` past their end."""
        at = np.arange(start, stop)[None]  # [1, C]
        key_start = len(self._introduction) + plan.lead  # [B, 1]
        within = at - key_start  # [B, C], position in the statement
        filler = at - len(self._introduction) - np.where(within >= 0, len(self._statement), 0)
        ids = plan.source[(plan.offset + filler) % len(plan.source)]

        statement = np.repeat(self._statement[None], len(plan.keys), axis=0)
        statement[:, self._slots] = plan.keys[:, None]
        rows, columns = np.nonzero((within >= 0) & (within < len(self._statement)))
        ids[rows, columns] = statement[rows, within[rows, columns]]

        head = self._introduction[start:stop]
        ids[:, : len(head)] = head
        question = np.repeat(self._question[None], len(plan.keys), axis=0)
        tail = np.concatenate([question, plan.keys, np.zeros_like(plan.keys[:, :1])], axis=1)  # one pad after the end
        tail_start = plan.total - len(self._question) - self.digits
        low = max(start, tail_start)
        if low < stop:
            ids[:, low - start :] = tail[:, low - tail_start : stop - tail_start]
        return ids

    def _write(self, plan, start, stop):
        """The positions `start` to `stop` of a plan as a dict (see `batch`)."""
        ids = self._tokens(plan, start, stop + 1)
        first = plan.total - self.digits - 1  # its output predicts the answer's first digit
        at = np.arange(start, stop)
        statement = len(self._introduction) + plan.lead[:, 0]
        weights = np.where(at < first, self.filler_weight, 1.0) * (at < plan.total - 1)
        return {
            "token_ids": ids[:, :-1].copy(),
            "targets": ids[:, 1:].copy(),
            "loss_weights": np.repeat(weights[None].astype("float32"), len(plan.keys), axis=0),
            "answer_positions": np.repeat(np.arange(first, first + self.digits, dtype="int32")[None], len(ids), axis=0),
            "keys": plan.keys,
            "key_positions": (statement + self._slots[0, 0]).astype("int32"),
            "statement_ends": (statement + len(self._statement)).astype("int32"),
            "start": start,
        }
