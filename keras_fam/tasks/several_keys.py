"""Several named keys in prose, and questions about some of them."""

import numpy as np

from keras_fam.tasks.documents import encode_parts, split_parts
from keras_fam.tasks.recall_task import RecallTask, answer_positions, random_positions, write
from keras_fam.tasks.tokenizer import WordTokenizer

NAMES = (
    *("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "haven"),
    *("ivory", "jewel", "kayak", "lotus", "maple", "north", "ocean", "pearl"),
)


class SeveralKeys(RecallTask):
    """Several named keys ("The key of amber is 4 7 1."), and questions about some of them at the end.

    The filler is PassKey's, prose or the paper's five sentences, from a random position, with `<num>` for every number.
    Names, keys and the positions of the statements are drawn for each row. Batches (see `batch`) add `distances` int32
    `[B, num_questions]`, tokens from each requested key's first digit to its answer's, and `key_positions` int32
    `[B, num_keys]`, where the statements start.

    Args:
        documents: None (the paper's five sentences), or a list of str, one per document.
        num_keys: int, keys in a sequence.
        num_questions: int, how many of them are requested, in random order.
        digits: int, length of a key, uniform over all `10 ** digits`.
        names: sequence of str, at least `num_keys` different words of one token each, which name the keys.
        vocabulary_size, tokenizer, held_out, split_seed, filler_weight, seed: see `PassKey`.

    Raises:
        ValueError, TypeError: as `PassKey`.

    Example:

    ```python
    task = keras_fam.tasks.SeveralKeys(num_keys=3, num_questions=2)
    batch = task.batch(8, total_tokens=256)
    batch["answers"].shape  # (8, 6): two keys of three digits
    ```
    """

    STATEMENT, QUESTION = "The key of {name} is {key}.", "What is the key of {name}? The key of {name} is"

    def __init__(
        self,
        documents=None,
        num_keys=4,
        num_questions=1,
        digits=3,
        names=NAMES,
        vocabulary_size=2000,
        tokenizer=None,
        held_out=0.2,
        split_seed=0,
        filler_weight=0.0,
        seed=0,
    ):
        names = tuple(names)
        if len(set(names)) != len(names):
            raise ValueError(f"`names` must be different words. Received: names={names}")
        if not 1 <= num_questions <= num_keys <= len(names):
            raise ValueError(
                "1 <= `num_questions` <= `num_keys` <= number of `names` must hold. Received: "
                f"num_questions={num_questions}, num_keys={num_keys} and {len(names)} names"
            )
        if digits < 1:
            raise ValueError(f"`digits` must be a positive integer. Received: digits={digits}")
        self.num_keys, self.num_questions, self.digits, self.names = num_keys, num_questions, digits, names
        self.filler_weight = filler_weight
        parts = split_parts(documents, held_out, split_seed)
        if tokenizer is None:
            required = [self.STATEMENT.format(name="", key=""), self.QUESTION.format(name=""), *names]
            tokenizer = WordTokenizer.from_documents(parts["train"], vocabulary_size, required=required)
        self.tokenizer = tokenizer
        encode = self.tokenizer.encode
        self._filler = encode_parts(parts, tokenizer)
        self._names = np.array([self._word(name) for name in names], "int32")
        self._statement, self._question = encode(self._template(self.STATEMENT)), encode(self._template(self.QUESTION))
        # In the encoded templates, `<num>` marks a digit of the key and `<pad>` its name.
        self._slots = [np.flatnonzero(self._statement == i) for i in (self.tokenizer.pad_id, self.tokenizer.num_id)]
        if self.tokenizer.unk_id in (*self._statement, *self._question):
            raise ValueError(
                "The tokenizer does not know all words of the statement and the question. Build it with "
                "`WordTokenizer.from_documents(documents, required=[...])`, or leave `tokenizer` out."
            )
        self._rng = np.random.default_rng(seed)

    def _template(self, text):
        return text.replace("{key}", "<num> " * self.digits).replace("{name}", "<pad>")

    def _word(self, name):
        ids = self.tokenizer.encode(name)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_id:
            raise ValueError(f"A name must be one word that the tokenizer knows. Received: {name!r}")
        return ids[0]

    @property
    def vocabulary_size(self):
        """int, V: the vocabulary size of a model for this task."""
        return self.tokenizer.vocabulary_size

    @property
    def chance(self):
        """float, the exact accuracy of random digits."""
        return 10.0 ** -(self.digits * self.num_questions)

    @property
    def template_tokens(self):
        """int, tokens of the shortest sequence, which has no filler."""
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
        starts = random_positions(rng, batch_size, self.num_keys, size, total - tail)
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
