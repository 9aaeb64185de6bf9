"""Natural text as token ids, with the gaps between its sentences: where facts can be inserted."""

import re

import numpy as np

# The white space behind a sentence: after its mark and closing quotes, before a capital letter.
_GAP = re.compile(r"[.!?][\"'”’)\]]*(\s+)(?=[\"'“‘(\[]*[A-Z0-9])")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Messrs|Capt|Col|Gen|Rev|Hon|No|vs|[A-Z])\.$")


class Prose:
    """Documents as one long sequence of token ids, read cyclically, with the gaps between sentences.

    Args:
        token_ids: int `[N]`, all documents, one after the other.
        gaps: increasing int `[G]`, positions from 1 to N at which a sentence ends and the next one begins.
        weights: None (all 1), or float `[N]`: what each token is worth as a target where the text itself is learned
            (see `Book`), for instance how much better a model with a longer window predicts it.

    Attributes:
        token_ids, gaps, weights: NumPy int32 `[N]`, int64 `[G]`, and float32 `[N]` or None.

    Raises:
        ValueError: for empty or mismatched arrays, or gaps that do not increase or lie outside the text.

    Example:

    ```python
    tokenizer = lambda text: list(text.encode())
    prose = keras_fam.tasks.Prose.from_texts(["It was late. Nobody came.", "So they left."], tokenizer)
    ```
    """

    def __init__(self, token_ids, gaps, weights=None):
        self.token_ids, self.gaps = np.asarray(token_ids, "int32"), np.asarray(gaps, "int64")
        self.weights = None if weights is None else np.asarray(weights, "float32")
        size = len(self.token_ids)
        if self.token_ids.ndim != 1 or not size:
            raise ValueError(f"`token_ids` must be [N], not empty. Received: shape {self.token_ids.shape}")
        ordered = self.gaps.ndim == 1 and len(self.gaps) and (np.diff(self.gaps) > 0).all()
        if not ordered or self.gaps[0] < 1 or self.gaps[-1] > size:
            raise ValueError(
                f"`gaps` must be [G], not empty, increase, and lie between 1 and the {size} tokens of the text. "
                f"Received: {len(self.gaps)} gaps, {self.gaps[:5].tolist()} first. `Prose.from_texts` finds them."
            )
        if self.weights is not None and self.weights.shape != self.token_ids.shape:
            raise ValueError(
                f"`weights` must have a weight for each of the {size} tokens. Received: shape {self.weights.shape}"
            )

    @classmethod
    def from_texts(cls, texts, tokenizer):
        """Splits texts into sentences and encodes them one by one, each with the white space in front of it.

        Args:
            texts: iterable of str, one per document, in the order in which they are read.
            tokenizer: see `encoder`.

        Returns:
            A `Prose`.

        Raises:
            TypeError: if `texts` is a single str.
            ValueError: if the texts have no tokens.
        """
        if isinstance(texts, str):
            raise TypeError("`texts` must be an iterable of str, one per document. Received: a single str")
        encode = encoder(tokenizer)
        parts = [encode(sentence) for text in texts for sentence in sentences(text)]
        parts = [part for part in parts if len(part)]
        if not parts:
            raise ValueError("`texts` must have at least one token. Received none.")
        return cls(np.concatenate(parts), np.cumsum([len(part) for part in parts]))

    def __len__(self):
        return len(self.token_ids)

    def window(self, rng, tokens):
        """Consecutive tokens that end with a random sentence; a text that is too short is read again from its start.

        Args:
            rng: `numpy.random.Generator`.
            tokens: int, the size of the window, 0 or more.

        Returns:
            `(ids, gaps, weights)`: int32 `[tokens]`; int64 `[G]`, positions from 1 to `tokens` in the window after
            which a sentence begins, the last of which is its end (where there are tokens at all); float32 `[tokens]`.
        """
        size, end = len(self.token_ids), int(self.gaps[rng.integers(len(self.gaps))])
        start = end - tokens
        at = np.arange(start, end) % size
        cycles = range(start // size, 1)
        gaps = np.concatenate([self.gaps + cycle * size for cycle in cycles]) - start
        gaps = gaps[(gaps > 0) & (gaps <= tokens)]
        weights = np.ones(tokens, "float32") if self.weights is None else self.weights[at]
        return self.token_ids[at], gaps, weights


def sentences(text):
    """A text as a list of its sentences; joined, they are the text, so each but the first begins with white space."""
    cuts = [0]
    for found in _GAP.finditer(text):
        if not _ABBREVIATION.search(text[max(0, found.start() - 12) : found.start() + 1]):
            cuts.append(found.start(1))
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True) if b > a]


def encoder(tokenizer):
    """A function from str to int32 `[T]` for any tokenizer that adds no special tokens by itself.

    Args:
        tokenizer: a function of a str (a tokenizer of KerasHub is one), or an object with `encode` (`WordTokenizer`, a
            tokenizer of Hugging Face), whose result is a sequence of token ids, or has it as `ids`.

    Raises:
        TypeError: for another object.
        ValueError: by the function, if a text does not become a sequence of integers.

    Example:

    ```python
    encode = keras_fam.tasks.encoder(lambda text: [ord(letter) for letter in text])
    encode("ab")  # array([97, 98], dtype=int32)
    ```
    """
    call = getattr(tokenizer, "encode", None) or tokenizer
    if not callable(call):
        raise TypeError(
            "`tokenizer` must be a function from str to token ids, or have such an `encode`. Received: "
            f"{type(tokenizer).__name__}"
        )

    def encode(text):
        found = call(text)
        ids = np.asarray(getattr(found, "ids", found))
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(
                "A tokenizer must turn a str into a sequence of integers. Received: "
                f"shape {ids.shape} and dtype {ids.dtype} for {text[:40]!r}"
            )
        return ids.astype("int32")

    return encode
