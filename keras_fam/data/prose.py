"""English prose that every Python ships, and a small word-level tokenizer for it.

`pydoc_data.topics` (the text behind `help("topics")`) holds about half a megabyte of technical English, so a language
task needs no download. Its text differs a little between Python versions: train and evaluate under the same one.
Only the standard library and NumPy are used here.
"""

import collections
import hashlib
import re
import unicodedata

import numpy as np

_FOOTNOTE = re.compile(r"\s*\[\d+\]")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})([^\s*](?:[^*]*[^\s*])?)\1(?![\w*])")
_BULLET = re.compile(r"^(?:[*•-]|\d+[.)]|\(\d+\)|\[\d+\])\s+")
_SENTENCE_END = re.compile(r"[.!?:;][)\"']*$")
_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "–": "-", "—": "-"})
_MARKS_OF_CODE = ("::=", ">>>", "+--", "---", "===", "...   ")


def clean_paragraph(paragraph):
    """One line of plain prose from a paragraph in Sphinx's text format, or "" if it is code, grammar or a table.

    Line breaks, bullets, footnote marks, emphasis and the double quotes around identifiers go away.
    """
    if any(mark in paragraph for mark in _MARKS_OF_CODE) or paragraph.lstrip().startswith("|"):
        return ""
    text = paragraph.translate(_QUOTES)
    text = re.sub(r"(\w)-\n\s*(?=\w)", r"\1-", text)
    text = " ".join(text.split())
    text = _BULLET.sub("", text)
    text = _FOOTNOTE.sub("", text)
    text = _EMPHASIS.sub(r"\2", text)
    text = text.replace('"', "").replace("()", "")
    words = re.findall(r"[^\W\d_]{2,}", text)
    letters = sum(character.isalpha() or character == " " for character in text)
    if len(words) < 6 or letters < 0.85 * len(text) or not _SENTENCE_END.search(text):
        return ""
    return text


def topics_text(topics=None):
    """The prose of `pydoc_data.topics`: a list of documents (str), paragraphs separated by a blank line.

    Topics quote each other at length (about a fifth of the text), so a paragraph is kept only in the longest topic
    that has it: no paragraph occurs in two documents. The result does not depend on the order of the dictionary.

    Args:
        topics: dict of topic name to text; default `pydoc_data.topics.topics`.
    """
    if topics is None:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise ImportError(
                "This Python has no `pydoc_data.topics` (part of the standard library, left out of some slim builds). "
                'Pass `documents=` of your own, or use filler="paper".'
            ) from error
    seen = set()
    documents = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        kept = []
        for paragraph in re.split(r"\n[ \t]*\n", topics[name]):
            text = clean_paragraph(paragraph)
            if text and text.casefold() not in seen:
                seen.add(text.casefold())
                kept.append(text)
        if kept:
            documents[name] = "\n\n".join(kept)
    return [documents[name] for name in sorted(documents)]


def split(documents, held_out=0.2, seed=0):
    """Divides documents into a training part and a held-out part that share no document.

    Which document goes where depends on its text and the seed alone: not on the order of `documents`, not on Python's
    hash seed. Equal documents are counted once.

    Args:
        documents: iterable of str, at least two different ones.
        held_out: share of all characters that is held out, 0 < held_out < 1; met from below by whole documents.
        seed: int.

    Returns:
        (train, held_out): two lists of str, neither of them empty.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"`held_out` must lie between 0 and 1. Received: {held_out}")
    ranked = sorted(set(documents), key=lambda text: (hashlib.sha256(f"{seed}:{text}".encode()).digest(), text))
    if len(ranked) < 2:
        raise ValueError("A split needs at least two different documents.")
    budget = held_out * sum(map(len, ranked))
    apart = []
    for text in ranked:
        if len(text) <= budget:
            apart.append(text)
            budget -= len(text)
    if not apart:
        apart.append(min(ranked, key=len))
    chosen = set(apart)
    return [text for text in ranked if text not in chosen], apart


class WordTokenizer:
    """PackedTensor in lower case, punctuation marks and single digits as tokens.

    Ids: 0 `<pad>`, 1 `<unk>`, 2 `<num>`, 3 to 12 the digits 0 to 9, then the other tokens. `<num>` stands for a whole
    number where its digits must not be seen (`encode(text, hide_numbers=True)`).

    Args:
        vocabulary: list of str, the whole vocabulary, in the order of the ids (as `get_config()` gives it).
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
            raise ValueError(f"A vocabulary starts with {start}. Received: {vocabulary[: len(start)]}")
        if len(set(vocabulary)) != len(vocabulary):
            raise ValueError("The vocabulary has repeated tokens.")
        self.vocabulary = vocabulary
        self._ids = {token: index for index, token in enumerate(vocabulary)}
        self.digit_ids = np.arange(len(self.SPECIAL), len(start), dtype="int32")

    @classmethod
    def from_documents(cls, documents, vocabulary_size=None, required=()):
        """A tokenizer with the most frequent tokens of `documents` (list of str) and all tokens of `required`.

        `vocabulary_size` caps the number of ids, special tokens and digits included (None: all tokens are kept).
        Frequency ties are broken alphabetically. Numbers in `documents` count as `<num>`.
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
                    f"Received: {vocabulary_size}"
                )
        return cls(start + needed + ranked[:room])

    @classmethod
    def tokenize(cls, text, hide_numbers=False):
        """List of token strings of `text`; with `hide_numbers`, a run of digits becomes one `<num>`."""
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
        """Ids int32 [T] of `text`; with `hide_numbers`, a run of digits becomes one `<num>`."""
        tokens = self.tokenize(text, hide_numbers=hide_numbers)
        return np.array([self._ids.get(token, self.unk_id) for token in tokens], dtype="int32")

    def decode(self, ids):
        """Text (str) of ids [T]; `encode(decode(ids))` gives the ids back. Padding is left out."""
        text = " ".join(self.vocabulary[int(index)] for index in np.asarray(ids).ravel() if index != self.pad_id)
        return self._between_digits.sub("", self._no_space_before.sub(r"\1", text))

    def get_config(self):
        """Serialisable arguments: `WordTokenizer.from_config(config)` gives an equal tokenizer."""
        return {"vocabulary": list(self.vocabulary)}

    @classmethod
    def from_config(cls, config):
        """The tokenizer that `get_config()` describes."""
        return cls(**config)
