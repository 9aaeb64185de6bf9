"""Reading rows of different lengths from a state, at constant memory, in a few compiled programs."""

import numpy as np
from keras import ops

from keras_fam.ops.backend import compiled, indices
from keras_fam.ops.programs import programs_of
from keras_fam.ops.token_ids import check_ids_of


class RaggedReader:
    """Reads B rows of token ids of different lengths, piece by piece; a row that has ended keeps its state.

    Args:
        model: a `TransformerFAMCausalLM`, or a model with its `advance`, `block_size` and `model.variables`.
        blocks_per_step: int, blocks that are read at once where no logits are needed; where they are, it is one.

    Example:

    ```python
    reader = keras_fam.evaluation.RaggedReader(lm)
    state = reader.read([[5, 3, 8, 1], [2]], lm.get_initial_state(2))
    log_probabilities, greedy, state = reader.score([[1, 4], [2]], [[4, 7], [9]], state)
    ```
    """

    def __init__(self, model, blocks_per_step: int = 8):
        if not isinstance(blocks_per_step, int) or blocks_per_step < 1:
            raise ValueError(f"`blocks_per_step` must be a positive integer. Received: {blocks_per_step!r}")
        if not model.built:
            model.build()
        self.model, self.block_size, self.blocks_per_step = model, model.block_size, blocks_per_step
        self._inner = getattr(model, "backbone", model)  # without logits, where they are of no use

    def read(self, rows, state):
        """The state after token ids.

        Args:
            rows: a list of B int `[T]` arrays or lists, which may be empty.
            state: `StreamState` of B rows.

        Returns:
            `StreamState`.
        """
        ids, lengths = self._padded(rows)
        for start, size, aligned in self._pieces(lengths, state, self.blocks_per_step):
            model = self._inner
            run = self._program("read", aligned, lambda x, n, s, a=aligned, m=model: _advance(m, x, n, s, a)[1])
            state = run(*_piece([ids], lengths, start, size), state)
        return state

    def score(self, rows, targets, state):
        """Log-probabilities of the tokens that come next.

        Args:
            rows: a list of B int `[T]` arrays or lists, which may be empty: what is read.
            targets: a list of arrays or lists of the same lengths: the token after each of those.
            state: `StreamState` of B rows.

        Returns:
            `(totals, greedy, state)`: float64 `[B]`, each row's sum of log-probabilities in nats; bool `[B]`, whether
            each of its targets is the most probable token (True without targets); and the state after the tokens read.

        Raises:
            ValueError: for token ids outside the vocabulary, or targets of other lengths.
        """
        ids, lengths = self._padded(rows)
        targets, others = self._padded(targets)
        if not np.array_equal(lengths, others):
            raise ValueError(
                f"Every token that is read needs a target. Received: {lengths.tolist()} tokens in the rows and "
                f"{others.tolist()} targets"
            )
        totals, greedy = np.zeros(len(rows)), np.ones(len(rows), bool)
        for start, size, aligned in self._pieces(lengths, state, 1):
            model = self.model
            run = self._program("score", aligned, lambda x, y, n, s, a=aligned, m=model: _score(m, x, y, n, s, a))
            sums, right, state = run(*_piece([ids, targets], lengths, start, size), state)
            totals += ops.convert_to_numpy(sums)
            greedy &= ops.convert_to_numpy(right)
        return totals, greedy, state

    def _padded(self, rows):
        lengths = np.array([len(row) for row in rows], "int32")
        ids = np.zeros((len(rows), max(1, lengths.max(initial=0))), "int32")
        for row, out in zip(rows, ids, strict=True):
            out[: len(row)] = row
        check_ids_of(self.model, ids, lengths)
        return ids, lengths

    def _pieces(self, lengths, state, most):
        """Yields `(start, size, aligned)`: at most `most` blocks, or one block where rows stand within theirs."""
        offset = ops.convert_to_numpy(state.position.offset)
        start, longest, block = 0, int(lengths.max(initial=0)), self.block_size
        while start < longest:
            going = lengths > start
            aligned = not ((offset + start) % block)[going].any()
            left = longest - start
            if aligned and left >= block:  # sizes are powers of two, so that there are few programs
                size = block << min(left // block, most).bit_length() - 1
            else:
                size = min(block, 1 << (left - 1).bit_length())
                if not aligned and len({*((offset + start) % block)[going]}) == 1:  # to the boundary, if it is near
                    room = block - int(((offset + start) % block)[going][0])
                    size = min(size, room)
            yield start, size, aligned
            start += size

    def _program(self, kind, aligned, function):
        model = self.model
        record = "gpu" if aligned else "anywhere"
        return programs_of(model).get(
            f"ragged {kind}", aligned, make=lambda: compiled(function, lambda: model.variables, record=record)
        )


def _piece(arrays, lengths, start, size):
    """Columns from `start` on of each `[B, T]`, padded to `size`, and how many of them exist in each row."""
    parts = []
    for array in arrays:
        part = array[:, start : start + size]
        parts.append(ops.convert_to_tensor(np.pad(part, [(0, 0), (0, size - part.shape[1])])))
    return [*parts, ops.convert_to_tensor(np.clip(lengths - start, 0, size).astype("int32"))]


def _advance(model, ids, lengths, state, aligned):
    return model.advance(ids, state, lengths=lengths, aligned=aligned)


def _score(model, ids, targets, lengths, state, aligned):
    logits, state = _advance(model, ids, lengths, state, aligned)
    logits = ops.cast(logits, "float32")
    chosen = ops.take_along_axis(logits, ops.expand_dims(targets, -1), axis=-1)[..., 0]
    nats = ops.logsumexp(logits, axis=-1) - chosen
    real = indices(ops.shape(ids)[1]) < ops.expand_dims(lengths, 1)
    right = ops.logical_or(ops.equal(ops.cast(ops.argmax(logits, axis=-1), "int32"), targets), ops.logical_not(real))
    return -ops.sum(ops.where(real, nats, 0.0), axis=1), ops.all(right, axis=1), state
