"""Scoring a language model on texts of any length, at constant memory, in one compiled program."""

import keras
import numpy as np
from keras import ops

from keras_fam.evaluation.ablation import CLOSED, ablate_state, check_how, derangement
from keras_fam.layers.chunk_attention import closed_memory
from keras_fam.ops.backend import compiled
from keras_fam.ops.scan import scan
from keras_fam.ops.token_ids import check_ids_of

# What is summed per row and bucket: tokens, right ones, weights, weighted nats, weight of right ones.
_COUNTED = 5


class StreamScorer:
    """Scores a language model on long texts by distance, at constant memory.

    ```python
    scorer = keras_fam.StreamScorer(lm, ablation="zeroed")
    sums = scorer.score(tokens)          # [B, T], or an iterable of chunks
    ```

    Args:
        model: a `TransformerFAMCausalLM`, or any model with its `advance` and `get_initial_state`, whose outputs are
            logits.
        ablation: None, or how the memory is ablated after every block; see `ablate_memory`. Each block draws a new
            permutation for `"shuffled"`. `"closed"`: tokens read no memory, as with `fam_gate=float("-inf")`. (A memory
            of zeros is still read, and lets attention go nowhere, which may be of use in itself.)
        boundaries: None, or the increasing distances at which a new bucket starts, 0 first; the default is 0, S, 2·S,
            4·S, … for blocks of S tokens.
        blocks_per_step: how many blocks one call of the compiled program reads; no result changes.
        seed: of the shuffles.
    """

    def __init__(self, model, ablation=None, *, boundaries=None, blocks_per_step: int = 8, seed: int = 0):
        if ablation is not None:
            check_how(model, ablation)
        self.model, self.ablation, self.seed = model, ablation, seed
        if not model.built:
            model.build()
        self.block_size = model.block_size
        self.step_size = blocks_per_step * self.block_size
        if boundaries is None:
            boundaries = [0, *(self.block_size << i for i in range(24))]
        self.boundaries = np.asarray(boundaries, "int64")
        if self.boundaries[0] != 0 or (np.diff(self.boundaries) <= 0).any():
            raise ValueError(f"`boundaries` increase from 0; received {boundaries!r}.")
        self._program = compiled(self._step, lambda: self.model.variables, record="gpu")

    def score(self, texts):
        """Reads B texts from their start.

        Args:
            texts: int `[B, T]`, or an iterable of successive chunks: int `[B, C]` of any lengths, or dicts of
                `"token_ids"` and perhaps `"targets"` (the next tokens, if not told), `"loss_weights"` (1 each, if not
                told) and `"distance"` int (the position of the target in the text, if not told), all `[B, C]`. Other
                entries are left alone, so a `PassKey.stream` fits.

        Returns:
            float64 NumPy `[B, buckets, 5]`: tokens of weight above 0, right ones among them, sum of weights, weighted
            sum of nats, weight of the right ones.
        """
        rng, state, total = np.random.default_rng(self.seed), None, 0.0
        for tokens, targets, weights, distance in pieces(texts, self.step_size):
            rows = len(tokens)
            check_ids_of(self.model, tokens)
            check_ids_of(self.model, targets, padding_mask=weights > 0)
            if state is None:
                state = self.model.get_initial_state(rows)
            bucket = np.searchsorted(self.boundaries, distance, side="right") - 1
            order = np.zeros((self.step_size // self.block_size, rows), "int32")
            if self.ablation == "shuffled":
                order = np.stack([derangement(rows, rng) for _ in order])
            given = (tokens, targets, weights, bucket.astype("int32"), order)
            sums, state = self._program(state, *map(ops.convert_to_tensor, given))
            total = total + ops.convert_to_numpy(sums).astype("float64")
        if state is None:
            raise ValueError("There is a text to score; received no chunk.")
        return total

    def _step(self, state, tokens, targets, weights, bucket, order):
        if self.ablation == CLOSED:
            with closed_memory():
                logits, state = self.model.advance(tokens, state, aligned=True)
            return self._count(logits, targets, weights, bucket), state
        if self.ablation is None:
            logits, state = self.model.advance(tokens, state, aligned=True)
            return self._count(logits, targets, weights, bucket), state
        rows = ops.shape(tokens)[0]
        first = self.model.get_initial_state(rows)

        def blocks(x):
            return ops.transpose(ops.reshape(x, (rows, -1, self.block_size)), (1, 0, 2))

        xs = {"tokens": blocks(tokens), "targets": blocks(targets), "weights": blocks(weights)}
        xs.update(bucket=blocks(bucket), order=order)

        def read(state, x):
            logits, state = self.model.advance(x["tokens"], state, aligned=True)
            sums = self._count(logits, x["targets"], x["weights"], x["bucket"])
            return ablate_state(state, self.ablation, first, x["order"]), (sums,)

        like = (ops.zeros((rows, len(self.boundaries), _COUNTED), "float32"),)
        state, (sums,) = scan(read, state, xs, like)
        return ops.sum(sums, axis=0), state

    def _count(self, logits, targets, weights, bucket):
        """`[B, buckets, 5]` of one piece; the logits go no further."""
        logits = ops.cast(logits, "float32")
        nats = keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)
        right = ops.cast(ops.equal(ops.cast(ops.argmax(logits, axis=-1), "int32"), targets), "float32")
        counted = ops.cast(weights > 0, "float32")
        parts = ops.stack([counted, counted * right, weights, weights * nats, weights * right], axis=-1)
        return ops.einsum("btk,btc->bkc", ops.one_hot(bucket, len(self.boundaries), dtype="float32"), parts)


def pieces(texts, size):
    """Texts cut into pieces of `size` tokens: `(tokens, targets, weights, distance)`, each `[B, size]`.

    The last piece is filled up with tokens of weight 0.
    """
    held, start = None, 0
    for chunk in _with_targets([texts] if hasattr(texts, "shape") else texts):
        held = chunk if held is None else [np.concatenate(pair, axis=1) for pair in zip(held, chunk, strict=True)]
        while held[0].shape[1] > size:
            yield _piece([part[:, :size] for part in held], start)
            held, start = [part[:, size:] for part in held], start + size
    if held is not None:
        room = size - held[0].shape[1]
        yield _piece([np.pad(part, [(0, 0), (0, room)]) for part in held], start)


def _piece(parts, start):
    tokens, targets, weights, distance = parts
    position = start + 1 + np.arange(tokens.shape[1])
    distance = np.where(distance < 0, position, distance)
    return tokens.astype("int32"), targets.astype("int32"), weights.astype("float32"), distance


def _with_targets(chunks):
    """Lists `[tokens, targets, weights, distance]`; a distance of −1 stands for the position.

    Where targets are not told, a chunk's last token waits for the next chunk; the text's last token has no target.
    """
    waiting = None
    for chunk in chunks:
        chunk = chunk if isinstance(chunk, dict) else {"token_ids": chunk}
        tokens = np.asarray(chunk["token_ids"])
        if tokens.ndim != 2 or not tokens.shape[1]:
            raise ValueError(f"A chunk of texts is int [B, C] with C ≥ 1; received shape {tokens.shape}.")
        weights = np.asarray(chunk.get("loss_weights", np.ones(tokens.shape, "float32")))
        distance = np.asarray(chunk.get("distance", np.full(tokens.shape, -1)))
        if "targets" in chunk:
            yield [tokens, np.asarray(chunk["targets"]), weights, distance]
            continue
        parts = [tokens, weights, distance]
        if waiting is not None:
            parts = [np.concatenate(pair, axis=1) for pair in zip(waiting, parts, strict=True)]
        tokens, weights, distance = parts
        if tokens.shape[1] > 1:
            yield [tokens[:, :-1], tokens[:, 1:], weights[:, :-1], distance[:, :-1]]
        waiting = [part[:, -1:] for part in parts]
    if waiting is not None:
        tokens, weights, distance = waiting
        yield [tokens, np.zeros_like(tokens), np.zeros_like(weights), distance]
