"""The prose between a task's statements and its questions: split by document, and encoded."""

import hashlib

import numpy as np

PAPER_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SPLITS = ("train", "held_out")


def split_documents(documents, held_out=0.2, seed=0):
    """Splits documents into a training part and a held-out part that share no document.

    Which part a document belongs to depends on its text and the seed alone, not on the order of `documents` or on
    Python's hash seed. Equal documents count once.

    Args:
        documents: iterable of str, at least two different ones.
        held_out: float, 0 < held_out < 1: share of all characters to hold out. Whole documents are held out as long as
            they fit, and at least one.
        seed: int.

    Returns:
        `(train, held_out)`, two lists of str, neither of them empty.

    Raises:
        ValueError: if `held_out` is not between 0 and 1, or if there are fewer than two different documents.
        TypeError: if `documents` is not an iterable of str.
    """
    documents = _checked(documents)
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"`held_out` must be between 0 and 1. Received: held_out={held_out}")
    ranked = sorted(set(documents), key=lambda text: (hashlib.sha256(f"{seed}:{text}".encode()).digest(), text))
    if len(ranked) < 2:
        raise ValueError(
            f"A split needs at least two different documents. Received: {len(ranked)}. Divide the text, for example at "
            "its chapters."
        )
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


def split_parts(documents, held_out, seed):
    """Lists of str by split; without documents, both parts are the paper's five sentences."""
    parts = ([PAPER_FILLER], [PAPER_FILLER]) if documents is None else split_documents(documents, held_out, seed)
    return dict(zip(SPLITS, parts, strict=True))


def encode_parts(parts, tokenizer):
    """Token ids int32 `[N]` by split, with `<num>` for every number: the only digits of a sequence are its keys'."""
    encoded = {}
    for split, texts in parts.items():
        encoded[split] = np.concatenate([tokenizer.encode(text, hide_numbers=True) for text in texts])
        if not len(encoded[split]):
            raise ValueError(f"The {split} part of `documents` has no tokens. Leave empty documents out.")
    return encoded


def check_split(split):
    """Raises ValueError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {SPLITS}. Received: split={split!r}")


def task_generator(own, seed, split):
    """The generator a batch is drawn from: the task's own for None, else one that differs between the splits."""
    if seed is None:
        return own
    if isinstance(seed, np.random.Generator):
        return seed
    return np.random.default_rng([int(seed), SPLITS.index(split)])


def _checked(documents):
    """The documents as a list. A single str is refused: it would be read as one document per character."""
    message = "`documents` must be a list of str, one per document. Received: "
    if isinstance(documents, str | bytes):
        raise TypeError(message + f"a single {type(documents).__name__}")
    documents = list(documents)
    for index, text in enumerate(documents):
        if not isinstance(text, str):
            raise TypeError(message + f"{type(text).__name__} at index {index}")
    return documents
