"""PassKey: repeat a number that was stated once, much earlier, in a text about something else.

A sequence is: introduction, the key stated twice, filler, question, answer (the paper's Fig. 10, in our own words). One
digit is one token, so an exact answer by chance has probability `10 ** -digits`.
"""

import typing

import numpy as np

from keras_fam.tasks.documents import PAPER_FILLER, check_split, encode_parts, split_parts, task_generator
from keras_fam.tasks.tokenizer import WordTokenizer

INTRODUCTION = "Somewhere in this long text an important piece of information is hidden. Find it and keep it in mind."
STATEMENT = "The pass key is {key}. Do not forget it: {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


class _Plan(typing.NamedTuple):
    """Everything random about a set of sequences: enough to write any slice of them."""

    total: int  # T
    source: np.ndarray  # filler token ids, read cyclically
    offset: np.ndarray  # [B, 1] position in `source` at which each row's filler starts
    lead: np.ndarray  # [B, 1] filler tokens before the key
    keys: np.ndarray  # [B, digits] token ids


class PassKey:
    """Makes PassKey batches, and streams of sequences of any length.

    With `documents`, the filler of each row is a contiguous window of that prose at a random position, continued from
    its start if the row is longer than the text. Every number in it reads `<num>`: the only digits in a sequence are
    the key's, so that nothing else can be the answer. Without documents, the filler is the paper's five short sentences
    again and again, from the first one in every row, and the same in both splits.

    Args:
        documents: None, or a list of str, one per document.
        digits: int, length of the key. Keys are uniform over all `10 ** digits`, leading zeros included.
        key_position: `"start"` (as in the paper, directly after the introduction) or `"anywhere"` (a uniformly random
            share of the filler stands between the introduction and the key).
        vocabulary_size: int or None, the largest vocabulary of the tokenizer that is built here from the most frequent
            tokens of the training part.
        tokenizer: None, or a `WordTokenizer` to use instead, for instance that of a trained model. It must know the
            words of the introduction, the statement and the question.
        held_out, split_seed: see `split_documents`; the vocabulary never depends on the held-out part.
        filler_weight: float, loss weight of all tokens but the answer's.
        seed: int, seed of the batches that are drawn without one.

    Raises:
        ValueError: for options outside their range, documents that cannot be split, or a tokenizer that does not know
            the words that are needed.
        TypeError: if `documents` is not a list of str.

    Example:

    ```python
    task = keras_fam.tasks.PassKey(documents=["The first chapter ...", "The second chapter ..."], held_out=0.5)
    batch = task.batch(8, total_tokens=256)
    batch["token_ids"].shape  # (8, 256)
    ```
    """

    def __init__(
        self,
        documents=None,
        digits=5,
        key_position="start",
        vocabulary_size=2000,
        tokenizer=None,
        held_out=0.2,
        split_seed=0,
        filler_weight=0.0,
        seed=0,
    ):
        if key_position not in ("start", "anywhere"):
            raise ValueError(f'`key_position` must be "start" or "anywhere". Received: key_position={key_position!r}')
        if digits < 1:
            raise ValueError(f"`digits` must be a positive integer. Received: digits={digits}")
        self.digits, self.key_position, self.filler_weight = digits, key_position, filler_weight
        self._random_windows = documents is not None
        parts = split_parts(documents, held_out, split_seed)
        if tokenizer is None:
            required = [INTRODUCTION, STATEMENT.replace("{key}", ""), QUESTION, PAPER_FILLER]
            tokenizer = WordTokenizer.from_documents(parts["train"], vocabulary_size, required=required)
        self.tokenizer = tokenizer
        self._filler_ids = encode_parts(parts, tokenizer)
        self._introduction = tokenizer.encode(INTRODUCTION)
        self._question = tokenizer.encode(QUESTION)
        before, between, after = (tokenizer.encode(text) for text in STATEMENT.split("{key}"))
        blank = np.zeros(digits, dtype="int32")
        self._statement = np.concatenate([before, blank, between, blank, after])
        second = len(before) + digits + len(between)
        self._slots = np.array([len(before), second])[:, None] + np.arange(digits)  # [2, digits]
        if any(tokenizer.unk_id in ids for ids in (self._introduction, self._statement, self._question)):
            raise ValueError(
                "The tokenizer does not know all words of the introduction, the statement and the question. Build it "
                "with `WordTokenizer.from_documents(documents, required=[...])`, or leave `tokenizer` out."
            )
        self._rng = np.random.default_rng(seed)

    @property
    def vocabulary_size(self):
        """int, V: the vocabulary size of a model for this task."""
        return self.tokenizer.vocabulary_size

    @property
    def chance(self):
        """float, the exact accuracy of random digits."""
        return 10.0**-self.digits

    @property
    def template_tokens(self):
        """int, tokens of a sequence that are not filler, with the answer: `total_tokens = template_tokens + filler`."""
        return len(self._introduction) + len(self._statement) + len(self._question) + self.digits

    def available_tokens(self, split="train"):
        """int, filler tokens of a split before it repeats."""
        return len(self._source(split))

    def batch(self, batch_size, filler_tokens=None, *, total_tokens=None, seed=None, split="train"):
        """One batch of sequences of equal length T.

        Args:
            batch_size: int, B.
            filler_tokens: int, filler tokens of each row; T is that plus `template_tokens`. Or instead:
            total_tokens: int, T itself, for instance a multiple of the block size; the filler is cut to fit.
            seed: int (the same batch every time), `numpy.random.Generator`, or None (the task's own generator).
            split: `"train"` or `"held_out"`, the part of the prose. One int seed gives different keys in the two.

        Returns:
            dict of `token_ids` int32 `[B, T]`; `targets` int32 `[B, T]`, the next tokens (`<pad>` at the end);
            `loss_weights` float32 `[B, T]`, 1 where the target is a digit of the answer, `filler_weight` elsewhere, 0
            at the last position; `answer_positions` int32 `[B, digits]`, the positions whose *outputs* predict the
            answer's digits (`targets` there are `keys`; each is one before the digit's own position); `keys` int32
            `[B, digits]`, token ids; `key_positions` int32 `[B]`, where the key is first stated; `statement_ends` int32
            `[B]`, the position after its statement; `start`, 0.

        Raises:
            ValueError: unless exactly one length is given, for a length below `template_tokens`, or for an unknown
                split.
        """
        plan = self._plan(batch_size, filler_tokens, total_tokens, seed, split)
        return self._write(plan, 0, plan.total)

    def stream(self, batch_size, filler_tokens=None, chunk_tokens=1024, *, total_tokens=None, seed=None, split="train"):
        """The sequences that `batch` returns for the same arguments, one chunk of tokens at a time.

        Memory is constant in T, so T may be a million and more. Yields dicts like those of `batch`, with `token_ids`,
        `targets` and `loss_weights` of shape `[B, C]`: positions `start` to `start + C` of the sequences. C is
        `chunk_tokens`, and less in the last chunk if T is not a multiple of it. `keys`, `answer_positions`,
        `key_positions` and `statement_ends` are in every chunk and count from the start of the sequence; the answers
        are its last tokens.
        """
        if chunk_tokens < 1:
            raise ValueError(f"`chunk_tokens` must be a positive integer. Received: chunk_tokens={chunk_tokens}")
        plan = self._plan(batch_size, filler_tokens, total_tokens, seed, split)
        starts = range(0, plan.total, chunk_tokens)
        return (self._write(plan, start, min(start + chunk_tokens, plan.total)) for start in starts)

    def _source(self, split):
        check_split(split)
        return self._filler_ids[split]

    def _plan(self, batch_size, filler_tokens, total_tokens, seed, split):
        """Draws everything random about B sequences."""
        if (filler_tokens is None) == (total_tokens is None):
            raise ValueError(
                "Pass either `filler_tokens` or `total_tokens`. "
                f"Received: filler_tokens={filler_tokens}, total_tokens={total_tokens}"
            )
        if filler_tokens is None:
            filler_tokens = total_tokens - self.template_tokens
        if filler_tokens < 0:
            raise ValueError(
                f"A sequence has at least {self.template_tokens} tokens. "
                f"Received: {filler_tokens + self.template_tokens}"
            )
        source = self._source(split)
        rng = task_generator(self._rng, seed, split)
        keys = self.tokenizer.digit_ids[rng.integers(0, 10, (batch_size, self.digits))]
        offset = np.zeros((batch_size, 1), dtype="int64")
        if self._random_windows:
            offset = rng.integers(0, len(source), (batch_size, 1))
        lead = np.zeros((batch_size, 1), dtype="int64")
        if self.key_position == "anywhere":
            lead = rng.integers(0, filler_tokens + 1, (batch_size, 1))
        return _Plan(filler_tokens + self.template_tokens, source, offset, lead, keys)

    def _tokens(self, plan, start, stop):
        """Token ids `[B, stop - start]` at positions `start` to `stop`; `<pad>` past the end."""
        at = np.arange(start, stop)[None]  # [1, C]
        key_start = len(self._introduction) + plan.lead  # [B, 1]
        within = at - key_start  # [B, C] position in the statement
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
        """Positions `start` to `stop` of a plan as a dict (see `batch`)."""
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
