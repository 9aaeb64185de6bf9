"""A small word-level tokenizer for the tasks in prose."""

import collections
import re
import unicodedata

import numpy as np

_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "–": "-", "—": "-"})


class WordTokenizer:
    """Words in lower case, punctuation marks and single digits as tokens.

    Ids: 0 `<pad>`, 1 `<unk>`, 2 `<num>`, 3 to 12 the digits 0 to 9, then the other tokens. `<num>` stands for a whole
    number whose digits must not be visible (`encode(text, hide_numbers=True)`).

    Args:
        vocabulary: list of str, the whole vocabulary in the order of the ids (as `get_config()` returns it).

    Raises:
        ValueError: if the vocabulary does not start with the special tokens and digits, or repeats a token.

    Example:

    ```python
    tokenizer = keras_fam.tasks.WordTokenizer.from_documents(["The sky is blue."])
    tokenizer.decode(tokenizer.encode("The sky is 42."))  # "the sky is 42."
    ```
    """

    SPECIAL = ("<pad>", "<unk>", "<num>")
    DIGITS = tuple("0123456789")
    pad_id, unk_id, num_id = 0, 1, 2

    _pattern = re.compile(r"<(?:pad|unk|num)>|[^\W\d]+(?:'[^\W\d]+)?|\d|[^\w\s]")
    _no_space_before = re.compile(r" ([.,?!:;])")
    _between_digits = re.compile(r"(?<=\b\d) (?=\d\b)")

    def __init__(self, vocabulary):
        vocabulary = list(vocabulary)
        start = self.SPECIAL + self.DIGITS
        if tuple(vocabulary[: len(start)]) != start:
            raise ValueError(f"`vocabulary` must start with {start}. Received: {vocabulary[: len(start)]}")
        if len(set(vocabulary)) != len(vocabulary):
            repeated = [token for token, count in collections.Counter(vocabulary).items() if count > 1]
            raise ValueError(f"The tokens of `vocabulary` must differ. Received repeated tokens: {repeated[:5]}")
        self.vocabulary = vocabulary
        self._ids = {token: index for index, token in enumerate(vocabulary)}
        self.digit_ids = np.arange(len(self.SPECIAL), len(start), dtype="int32")

    @classmethod
    def from_documents(cls, documents, vocabulary_size=None, required=()):
        """Builds a tokenizer with the most frequent tokens of some documents.

        Args:
            documents: iterable of str. Numbers in them count as `<num>`; ties in frequency are broken alphabetically.
            vocabulary_size: None (all tokens are kept), or int, the largest number of ids, special tokens and digits
                included.
            required: iterable of str, texts whose tokens are kept in any case.

        Raises:
            ValueError: if the required tokens do not fit into `vocabulary_size`.
        """
        start = list(cls.SPECIAL + cls.DIGITS)
        needed = sorted({token for text in required for token in cls.tokenize(text)} - set(start))
        counts = collections.Counter()
        for text in documents:
            counts.update(cls.tokenize(text, hide_numbers=True))
        ranked = sorted(set(counts) - set(start) - set(needed), key=lambda token: (-counts[token], token))
        room = len(ranked)
        if vocabulary_size is not None:
            room = vocabulary_size - len(start) - len(needed)
            if room < 0:
                raise ValueError(
                    f"`vocabulary_size` must be at least {len(start) + len(needed)} to hold the required tokens. "
                    f"Received: vocabulary_size={vocabulary_size}"
                )
        return cls(start + needed + ranked[:room])

    @classmethod
    def tokenize(cls, text, hide_numbers=False):
        """Tokens of `text`, a list of str; with `hide_numbers`, a run of digits becomes one `<num>`."""
        text = text.translate(_QUOTES).lower()
        if hide_numbers:
            text = re.sub(r"\d+", " <num> ", text)
        tokens = cls._pattern.findall(text)
        return [str(unicodedata.digit(token)) if token.isdecimal() else token for token in tokens]

    @property
    def vocabulary_size(self):
        """Number of ids."""
        return len(self.vocabulary)

    def __len__(self):
        return len(self.vocabulary)

    def encode(self, text, hide_numbers=False):
        """Token ids int32 `[T]` of `text`; with `hide_numbers`, a run of digits becomes one `<num>`."""
        tokens = self.tokenize(text, hide_numbers=hide_numbers)
        return np.array([self._ids.get(token, self.unk_id) for token in tokens], dtype="int32")

    def decode(self, ids):
        """Text (str) of token ids `[T]`, without padding; `encode(decode(ids))` returns the same ids."""
        text = " ".join(self.vocabulary[int(index)] for index in np.asarray(ids).ravel() if index != self.pad_id)
        return self._between_digits.sub("", self._no_space_before.sub(r"\1", text))

    def get_config(self):
        """JSON-serializable arguments; `WordTokenizer.from_config(config)` returns an equal tokenizer."""
        return {"vocabulary": list(self.vocabulary)}

    @classmethod
    def from_config(cls, config):
        """Builds the tokenizer that `get_config()` describes."""
        return cls(**config)
