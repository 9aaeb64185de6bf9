"""Tasks beside PassKey that only a memory can solve: several keys in prose, associative recall, copy.

All give batches as PassKey does: a dict of `token_ids`, `targets` int32 `[B, T]`, `loss_weights` float32 `[B, T]`,
`answer_positions` int32 `[B, A]` (the positions whose *outputs* predict the answer's tokens), `answers` int32 `[B, A]`
(those tokens, for `keras_fam.data.accuracy`), and what each task adds.
"""

import numpy as np

from keras_fam.data.prose import WordTokenizer, split, topics_text

NAMES = (
    *("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "haven"),
    *("ivory", "jewel", "kayak", "lotus", "maple", "north", "ocean", "pearl"),
)
SPLITS = ("train", "held_out")


class Recall:
    """What the tasks share: things stated at some places, and questions about them at the end.

    A subclass draws its statements in `draw`; `filler_weight` is the loss weight of all tokens but the answers'.
    """

    filler_weight = 0.0

    @property
    def template_tokens(self):
        """Tokens of a sequence without filler, which is the shortest there is."""
        raise NotImplementedError

    def batch(self, batch_size, total_tokens=None, *, seed=None, split="train"):
        """One batch of B sequences of T tokens.

        Args:
            batch_size: B.
            total_tokens: T, at least `template_tokens` (the default); filler takes what is left.
            seed: int (the same batch every time), `numpy.random.Generator`, or None (the object's own, which moves on).
            split: `"train"` or `"held_out"`: of the filler, where it is prose; one int seed differs in the two.

        Returns:
            dict, see the module and the class.

        Raises:
            ValueError: for fewer tokens than the task needs, or an unknown split.
        """
        total = self.template_tokens if total_tokens is None else int(total_tokens)
        if split not in SPLITS:
            raise ValueError(f"`split` is one of {SPLITS}; received {split!r}.")
        if total < self.template_tokens:
            raise ValueError(f"A sequence has at least {self.template_tokens} tokens; received {total}.")
        rng = self._rng if seed is None else seed
        if not isinstance(rng, np.random.Generator):
            rng = np.random.default_rng([int(seed), SPLITS.index(split)])
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
        """`(ids int32 [B, T], answer_positions [B, A], dict of more)`."""
        raise NotImplementedError


def random_places(rng, batch_size, count, size, room):
    """Starts int64 `[B, count]`, in order, of pieces of `size` tokens that do not overlap within `room` tokens."""
    free = np.sort(rng.integers(0, room - count * size + 1, (batch_size, count)), axis=1)
    return free + size * np.arange(count)


def write(ids, pieces, starts):
    """Writes pieces `[B, n, P]` into `ids` `[B, T]` at `starts` `[B, n]`."""
    places = starts[:, :, None] + np.arange(pieces.shape[2])
    np.put_along_axis(ids, places.reshape(len(ids), -1), pieces.reshape(len(ids), -1), axis=1)


def answer_positions(total, batch_size, count, question, answer):
    """Positions `[B, count · answer]` before the answers of `count` questions that end a sequence of `total` tokens."""
    first = total - count * (question + answer)
    at = first + (question + answer) * np.arange(count)[:, None] + question - 1 + np.arange(answer)
    return np.repeat(at.reshape(1, -1), batch_size, axis=0)


class SeveralKeys(Recall):
    """Several named keys in prose ("The key of amber is 4 7 1."), and questions about some of them at the end.

    The prose and its tokenizer are PassKey's: all other numbers read `<num>`. Names are drawn anew in every row, and
    so is where each key is stated.

    Args:
        num_keys: keys in a sequence.
        num_questions: how many of them are asked for, in random order.
        digits: length of a key, uniform over all `10 ** digits`.
        names: words to tell keys by, at least `num_keys`, each one token.
        vocabulary_size, tokenizer, documents, held_out, split_seed, filler_weight, seed: see `PassKey`.

    Batches add `distances` int32 `[B, num_questions]`, tokens from each asked key's first digit to its answer's, and
    `key_positions` int32 `[B, num_keys]`, where statements start.
    """

    STATEMENT, QUESTION = "The key of {name} is {key}.", "What is the key of {name}? The key of {name} is"

    def __init__(
        self,
        num_keys=4,
        num_questions=1,
        digits=3,
        names=NAMES,
        vocabulary_size=2000,
        tokenizer=None,
        documents=None,
        held_out=0.2,
        split_seed=0,
        filler_weight=0.0,
        seed=0,
    ):
        if not 1 <= num_questions <= num_keys <= len(names) or digits < 1:
            raise ValueError(
                "1 ≤ `num_questions` ≤ `num_keys` ≤ number of `names`, and `digits` is at least 1; received "
                f"{num_questions}, {num_keys}, {len(names)} and {digits}."
            )
        self.num_keys, self.num_questions, self.digits, self.names = num_keys, num_questions, digits, tuple(names)
        self.filler_weight = filler_weight
        parts = split(topics_text() if documents is None else documents, held_out, split_seed)
        template = [self.STATEMENT.replace("{key}", ""), self.QUESTION, *names]
        required = [text.replace("{name}", "") for text in template]
        self.tokenizer = tokenizer or WordTokenizer.from_documents(parts[0], vocabulary_size, required=required)
        encode = self.tokenizer.encode
        self._filler = {
            name: np.concatenate([encode(text, hide_numbers=True) for text in part])
            for name, part in zip(SPLITS, parts, strict=True)
        }
        self._names = np.array([self._word(name) for name in names], "int32")
        self._statement, self._question = encode(self._template(self.STATEMENT)), encode(self._template(self.QUESTION))
        # Digits and names stand where the templates have `<num>` and `<pad>`.
        self._slots = [np.flatnonzero(self._statement == i) for i in (self.tokenizer.pad_id, self.tokenizer.num_id)]
        if self.tokenizer.unk_id in (*self._statement, *self._question):
            raise ValueError("The tokenizer does not know all words of the statement and the question.")
        self._rng = np.random.default_rng(seed)

    def _template(self, text):
        return text.replace("{key}", "<num> " * self.digits).replace("{name}", "<pad>")

    def _word(self, name):
        ids = self.tokenizer.encode(name)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_id:
            raise ValueError(f"A name is one word that the tokenizer knows; received {name!r}.")
        return ids[0]

    @property
    def vocabulary_size(self):
        return self.tokenizer.vocabulary_size

    @property
    def chance(self):
        """Exact accuracy of guessing digits."""
        return 10.0 ** -(self.digits * self.num_questions)

    @property
    def template_tokens(self):
        return self.num_keys * len(self._statement) + self.num_questions * (len(self._question) + self.digits)

    def draw(self, rng, batch_size, total, split):
        source, size = self._filler[split], len(self._statement)
        tail = self.num_questions * (len(self._question) + self.digits)
        at = rng.integers(0, len(source), (batch_size, 1)) + np.arange(total)
        ids = source[at % len(source)].astype("int32")
        names = self._names[np.argsort(rng.random((batch_size, len(self.names))), axis=1)[:, : self.num_keys]]
        keys = self.tokenizer.digit_ids[rng.integers(0, 10, (batch_size, self.num_keys, self.digits))]
        statements = np.tile(self._statement, (batch_size, self.num_keys, 1))
        name_slots, digit_slots = self._slots
        statements[:, :, name_slots], statements[:, :, digit_slots] = names[:, :, None], keys
        starts = random_places(rng, batch_size, self.num_keys, size, total - tail)
        write(ids, statements, starts)
        order = np.argsort(rng.random((batch_size, self.num_keys)), axis=1)[:, : self.num_questions]
        questions = np.tile(self._question, (batch_size, self.num_questions, 1))
        asked_names = np.take_along_axis(names, order, axis=1)[:, :, None]
        questions = np.where(questions == self.tokenizer.pad_id, asked_names, questions)
        questions = np.concatenate([questions, np.take_along_axis(keys, order[:, :, None], axis=1)], axis=2)
        ids[:, total - tail :] = questions.reshape(batch_size, tail)
        asked = answer_positions(total, batch_size, self.num_questions, len(self._question), self.digits)
        stated = np.take_along_axis(starts, order, axis=1) + digit_slots[0]
        distances = asked[:, :: self.digits] + 1 - stated
        return ids, asked, {"key_positions": starts.astype("int32"), "distances": distances.astype("int32")}
