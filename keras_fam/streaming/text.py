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

    A token may end within a character of several bytes, or change how the one before it is written: the text of a few
    tokens is compared with and without the new one, and what is not yet a character is held back.
    """

    LONGEST = 4  # bytes of a character in UTF-8, and so the most tokens that one can take

    def __init__(self, model):
        self._model, self._ids, self._context, self._written = model, [], 0, 0

    def add(self, token: int) -> str:
        """The text that a token completes; `""` if there is none."""
        self._ids.append(token)
        return self._take(finish=False)

    def finish(self) -> str:
        """What was held back, at the end of a row."""
        return self._take(finish=True)

    def _take(self, finish):
        before = detokenize(self._model, self._ids[self._context : self._written])
        text = detokenize(self._model, self._ids[self._context :])
        waiting = text.endswith("\ufffd") and len(self._ids) - self._written < self.LONGEST
        if len(text) <= len(before) or (waiting and not finish):
            return ""
        self._context, self._written = self._written, len(self._ids)
        return text[len(before) :]
