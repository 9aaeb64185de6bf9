"""The curriculum of `examples.passkey.length`: growing texts, a question after each chunk, words replaced."""

from typing import NamedTuple

import numpy as np

from keras_fam.tasks.passkey import INTRODUCTION, QUESTION, STATEMENT

BLOCK, CHUNK = 32, 4  # tokens in a block; blocks in a training step
BATCH, GROUPS = 32, 4  # rows; groups of them with texts of their own


class Level(NamedTuple):
    """A level of the curriculum; training climbs to the next one when the mean loss of an epoch is small enough."""

    steps: int  # in the longest text
    start: int = 1  # groups of rows with texts of that length and the key at the start
    anywhere: int = 1  # groups with the key anywhere
    short: int = 3  # steps in the longest text of the other groups
    next_at: float = 0.2  # the loss at which the next level begins


LEVELS = (
    Level(1, start=0, anywhere=0, next_at=0.05),
    *(Level(steps, anywhere=0) for steps in (2, 3, 4)),
    *(Level(steps) for steps in (6, 8)),
    *(Level(8) for _ in range(6)),  # the loss has to be small in seven epochs at the longest texts
)
LONGEST = LEVELS[-1].steps


def question_tokens(task):
    """Tokens of the question and its answer."""
    return len(task.tokenizer.encode(QUESTION)) + task.digits


def replace_words(text, task, share, rng):
    """Token ids of a batch in which random words replace up to `share` of the words of each row.

    The training prose has 40,000 tokens, and a memory trained on them alone forgets sooner in other prose. The
    introduction and the statement are kept, and no digit is inserted.
    """
    ids, encode = text["token_ids"], task.tokenizer.encode
    place = np.arange(ids.shape[1])
    first = text["key_positions"][:, None] - len(encode(STATEMENT.split("{key}")[0]))
    kept = (place < len(encode(INTRODUCTION))) | ((place >= first) & (place < text["statement_ends"][:, None]))
    words = np.setdiff1d(np.arange(task.vocabulary_size), [task.tokenizer.pad_id, *task.tokenizer.digit_ids])
    shares = share * rng.random((len(ids), 1))
    return np.where((rng.random(ids.shape) < shares) & ~kept, rng.choice(words, ids.shape), ids).astype("int32")


class KeyCurriculum:
    """Endless batches: the next chunk of every row's text, and the question about the key.

    Before the key is stated, the question has no weight. Groups of rows without long texts have short ones, with the
    key anywhere, so that keys are written often. The index of the level, `number`, may be set between epochs.

    Args:
        make_task: function of a seed and a key position with a `PassKey`.
        seed: int.
        replaced: float, the largest share of a text's words that random words replace.
    """

    def __init__(self, make_task, seed, replaced=0.0):
        self.seed, self.replaced, self.number = seed, replaced, 0
        self.tasks = {position: make_task(seed, position) for position in ("start", "anywhere")}

    @property
    def number(self):
        return self._number

    @number.setter
    def number(self, number):
        self._number, self.level = number, LEVELS[number]

    def texts(self, group, rng):
        """Yields steps `(chunk, is_first, keys, keys_are_known)` of one text after another, without end."""
        rows, tokens = BATCH // GROUPS, CHUNK * BLOCK
        while True:
            level = self.level
            task = self.tasks["start" if group < level.start else "anywhere"]
            most = level.steps if group < level.start + level.anywhere else min(level.steps, level.short)
            count = rng.integers(1, most + 1)
            text = task.batch(rows, total_tokens=count * tokens + question_tokens(task), seed=rng)
            ids = replace_words(text, task, self.replaced, rng)
            for i in range(count):
                chunk = ids[:, i * tokens : (i + 1) * tokens]
                yield chunk, np.full(rows, i == 0), text["keys"], text["statement_ends"] <= (i + 1) * tokens

    def batches(self):
        groups = [self.texts(group, np.random.default_rng([self.seed, group])) for group in range(GROUPS)]
        digits = self.tasks["start"].digits
        question = np.tile(self.tasks["start"].tokenizer.encode(QUESTION), (BATCH, 1))
        while True:
            parts = zip(*(next(group) for group in groups), strict=True)
            chunk, first, keys, known = (np.concatenate(part) for part in parts)
            block = np.concatenate([question, keys], axis=1).astype("int32")
            weights = np.zeros(block.shape, "float32")
            weights[:, -digits - 1 : -1] = known[:, None] * (block.shape[1] / digits)
            yield {"chunk": chunk, "question": block, "first": first}, np.roll(block, -1, axis=1), weights
