"""Text for generation: a model's tokenizer, and pieces of text out of tokens that come one by one."""

import numpy as np


def as_texts(inputs):
    """Strings (one, a list, an array or a tensor of them) as a list of str, or None for anything else."""
    if _is_text(inputs) or getattr(getattr(inputs, "dtype", None), "kind", "") == "O":
        inputs = inputs.numpy() if hasattr(inputs, "numpy") else inputs  # a tensor of TensorFlow
        inputs = np.asarray(inputs, "object").reshape(-1).tolist()
    if not isinstance(inputs, list | tuple) or not inputs or not all(map(is_one_text, inputs)):
        return None
    texts = []
    for text in inputs:
        text = text.numpy() if hasattr(text, "numpy") else text
        text = text.item() if hasattr(text, "item") else text
        texts.append(text.decode() if isinstance(text, bytes) else str(text))
    return texts


def is_one_text(inputs):
    """Whether `inputs` is one string, or an array or tensor of one without axes."""
    return _is_text(inputs) and len(getattr(inputs, "shape", ())) == 0


def _is_text(x):
    dtype = getattr(x, "dtype", None)
    return isinstance(x, str | bytes) or "string" in str(dtype) or getattr(dtype, "kind", "") in ("S", "U", "T")


def find_tokenizer(model):
    tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"{model.name} has no preprocessor with a tokenizer, which text and stop_token_ids='auto' need: pass token "
            "ids (and None or ids as `stop_token_ids`), or give the model a `preprocessor`."
        )
    return tokenizer


def tokenize(model, text, start=False):
    """A string as a list of ids; with `start`, after the start token, if the preprocessor adds one."""
    tokenizer = find_tokenizer(model)
    ids = np.asarray(tokenizer(text)).reshape(-1).tolist()
    first = getattr(tokenizer, "start_token_id", None)  # None: there is none, whatever the preprocessor says
    adds = start and first is not None and getattr(model.preprocessor, "add_start_token", False)
    return [first, *ids] if adds else ids


def detokenize(model, ids):
    """A list of ids as a string, without the tokenizer's special tokens."""
    tokenizer = find_tokenizer(model)
    special = set(getattr(tokenizer, "special_token_ids", []))
    text = tokenizer.detokenize([i for i in ids if i not in special])
    text = text.numpy() if hasattr(text, "numpy") else text
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)


def find_stop_tokens(model, stop_token_ids):
    """Stop tokens as a tuple of ints, from None, ints, or `"auto"`."""
    if stop_token_ids is None:
        return ()
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        tokenizer = find_tokenizer(model)
        found = (getattr(tokenizer, name, None) for name in ("end_token_id", "end_token2_id"))
        return tuple(int(i) for i in found if i is not None)
    ids = np.asarray(stop_token_ids).reshape(-1)
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= model.output_width):
        raise ValueError(
            f"`stop_token_ids` must be token ids from 0 to {model.output_width - 1}, None or 'auto'; received "
            f"{stop_token_ids!r}."
        )
    return tuple(sorted(set(ids.tolist())))


class TextPieces:
    """Turns the tokens of one row into pieces of text, whole characters at a time.

    A token may end within a character of several bytes, or be written differently after another one (a space before a
    word). So the text of the last tokens is made with and without the new one, and what it adds is the piece.
    """

    def __init__(self, model):
        self._model, self._ids, self._given = (
            model,
            [],
            0,
        )  # the first `_given` characters of the text of `_ids` are out

    def add(self, token: int) -> str:
        """The text that a token completes; `""` if there is none."""
        self._ids.append(token)
        text = detokenize(self._model, self._ids)
        # A character that is not whole reads as up to three U+FFFD. Some tokenizers leave it out instead.
        held_back = min(len(text) - len(text.rstrip("\ufffd")), 3)
        piece = text[self._given : len(text) - held_back]
        if piece:  # of the tokens, those are kept that hold what is held back, at least the last
            kept = next(n for n in range(1, len(self._ids) + 1) if self._length(n) >= held_back)
            self._given, self._ids = self._length(kept) - held_back, self._ids[-kept:]
        return piece

    def _length(self, count):
        return len(detokenize(self._model, self._ids[-count:]))

    def finish(self) -> str:
        """What was held back, at the end of a row."""
        text = detokenize(self._model, self._ids) if self._ids else ""
        piece, self._given = text[self._given :], len(text)
        return piece
