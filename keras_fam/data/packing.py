"""Short examples packed into long documents, with loss weights (Sec. 3.1)."""

import numpy as np

from keras_fam.data.document_rows import Document


def example(prompt, answer, prompt_weight=0.0, answer_weight=1.0):
    """A `Document` of a prompt (weight 0) and its answer (weight 1).

    Args:
        prompt: int `[P]`, token ids.
        answer: int `[A]`, token ids.
        prompt_weight, answer_weight: float, loss weights of their tokens.

    Example:

    ```python
    document = keras_fam.data.example(prompt=[5, 6, 7], answer=[8, 9])
    ```
    """
    ids = np.concatenate([np.asarray(prompt, "int32"), np.asarray(answer, "int32")])
    weights = np.repeat(np.array([prompt_weight, answer_weight], "float32"), [len(prompt), len(answer)])
    return Document(ids, weights)


def pack(examples, length, pad_id=None):
    """Concatenates whole examples, without a mask between them, as the paper does.

    Args:
        examples: iterable of `Document`s or int `[T]` token ids, packed in this order.
        length: int, the most tokens of a packed document (8.5k in the paper).
        pad_id: None (packed documents may be shorter), or int, the token id that pads them to `length`, at weight 0.

    Returns:
        A list of `Document`s.

    Raises:
        ValueError: if an example is longer than `length`.

    Example:

    ```python
    documents = keras_fam.data.pack([[1, 2, 3], [4, 5]], length=8)
    rows = keras_fam.data.DocumentRows(documents, batch_size=1, chunk_tokens=4)
    ```
    """
    packed, ids, weights, size = [], [], [], 0

    def close():
        if ids:
            rest = 0 if pad_id is None else length - size
            tail = np.full(rest, pad_id or 0, "int32")
            packed.append(Document(np.concatenate([*ids, tail]), np.concatenate([*weights, np.zeros(rest, "float32")])))

    for number, one in enumerate(examples):
        tokens, own = one if isinstance(one, Document) else (one, None)
        tokens = np.asarray(tokens, "int32")
        if len(tokens) > length:
            raise ValueError(
                f"Examples are packed whole, so each must have at most `length` tokens. Received: length={length} and "
                f"{len(tokens)} tokens in example {number}. Cut the example, or raise `length`."
            )
        if size + len(tokens) > length:
            close()
            ids, weights, size = [], [], 0
        ids.append(tokens)
        weights.append(np.ones(len(tokens), "float32") if own is None else np.asarray(own, "float32"))
        size += len(tokens)
    close()
    return packed


def repeat_segment(document, marker, length=256, weight=0.1, seed=0):
    """A document that ends with a copy of a random segment of itself: something to remember in any text (Sec. 3.1).

    Args:
        document: a `Document` or int `[T]` token ids.
        marker: int `[M]`, token ids before the copy (`[repeat random segment]:` in the paper), at weight 0.
        length: int, consecutive tokens to repeat; all, if the document is shorter.
        weight: float, loss weight of the repeated tokens.
        seed: int, or a sequence of ints such as `(seed, index of the document)`.

    Returns:
        A `Document` of T + M + `length` tokens.

    Example:

    ```python
    document = keras_fam.data.repeat_segment(range(100), marker=[1], length=10)
    ```
    """
    ids, own = document if isinstance(document, Document) else (document, None)
    ids = np.asarray(ids, "int32")
    size = min(length, len(ids))
    start = int(np.random.default_rng(seed).integers(0, len(ids) - size + 1))
    own = np.ones(len(ids), "float32") if own is None else np.asarray(own, "float32")
    added = np.repeat(np.array([0.0, weight], "float32"), [len(marker), size])
    return Document(
        np.concatenate([ids, np.asarray(marker, "int32"), ids[start : start + size]]), np.concatenate([own, added])
    )
