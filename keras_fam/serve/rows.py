"""The tensors of an engine: a batch of rows that advance together, each at its own place, and one row apart from it."""

import keras
import numpy as np
from keras import ops

from keras_fam.ops.backend import compiled
from keras_fam.ops.programs import programs_of
from keras_fam.streaming.streaming_model import StreamingModel


class Row:
    """A row of the batch: whose turn runs in it, and which session it holds at which version."""

    def __init__(self, number):
        self.number, self.turn = number, None
        self.forget_session()

    def forget_session(self):
        self.session, self.token, self.record = None, 0, None


class Rows:
    """B rows of one model, in few compiled programs.

    `read` is one program per power of two of tokens, whatever the rows' places, since lengths are ragged and places are
    data. Long prompts are read in a row apart (`read_apart`), whole blocks at a time: there nothing is padding, and the
    rows of the batch need not wait for more than one such piece.

    Args:
        model: a built `TransformerFAMCausalLM`.
        count: B.
        blocks_per_step: how many blocks of a long prompt are one piece.
    """

    def __init__(self, model, count: int, blocks_per_step: int = 4):
        self.model, self.count, self.block_size = model, count, model.block_size
        self.batch = StreamingModel(model, count, blocks_per_step=blocks_per_step)
        self.apart = StreamingModel(model, 1, blocks_per_step=blocks_per_step)
        self.initial = self.apart.get_state(), self.apart.next_logits  # of a stream that has read nothing

    def read(self, tokens):
        """Advances rows by a few tokens, at most a block.

        Args:
            tokens: dict of row numbers to 1 to S ids.
        """
        width = max(map(len, tokens.values()))
        ids, lengths = np.zeros((self.count, width), "int32"), np.zeros(self.count, "int32")
        for row, given in tokens.items():
            ids[row, : len(given)], lengths[row] = given, len(given)
        batch = self.batch
        _, (state, logits) = batch._run(ids, (batch._state, batch.next_logits), lengths, False)
        batch._state, batch.next_logits, batch.position = state, logits, batch.position + lengths

    def read_apart(self, held, ids, offset):
        """Advances one row that is in no batch by the next piece of a long prompt.

        Args:
            held: `(state, logits)` of one row.
            ids: the tokens to read, int32 `[n]`.
            offset: how far into its block the row is.

        Returns:
            `(held, count)`: the row after `count` of the tokens, up to the end of a block where there is one.
        """
        apart, room = self.apart, self.block_size - offset
        if offset and len(ids) >= room:
            count = room
        elif len(ids) >= self.block_size:
            count = min(len(ids) // self.block_size * self.block_size, apart.step_size)
        else:
            count = len(ids)
        apart._state, apart.next_logits = held
        apart.position = np.array([offset], "int64")
        apart._read(np.asarray(ids[:count], "int32")[None], keep=False)
        ops.convert_to_numpy(apart._state.position.offset)  # waits: else many pieces would be queued before a request
        return (apart._state, apart.next_logits), count

    def take(self, row):
        """`(state, logits)` of a row, a copy."""
        run = programs_of(self.model).get("take_row", make=lambda: compiled(_take, lambda: []))
        return run((self.batch._state, self.batch.next_logits), ops.convert_to_tensor(np.array([row], "int32")))

    def put(self, row, held):
        """Puts `(state, logits)` in the place of a row."""
        run = programs_of(self.model).get("put_row", make=lambda: compiled(_put, lambda: []))
        batch, at = self.batch, ops.convert_to_tensor(np.array([row], "int32"))
        batch._state, batch.next_logits = run((batch._state, batch.next_logits), at, held)

    def best(self):
        """`(tokens, logits)`: the most likely next token of each row, NumPy int `[B]`, and its logit."""
        run = programs_of(self.model).get("best_tokens", make=lambda: compiled(_best, lambda: []))
        tokens, logits = run(self.batch.next_logits)
        return ops.convert_to_numpy(tokens), ops.convert_to_numpy(logits)

    def logits(self, row):
        """Logits of a row's next token, NumPy float32 `[V]`."""
        return ops.convert_to_numpy(self.batch.next_logits[row])


def _take(held, rows):
    return keras.tree.map_structure(lambda x: ops.take(x, rows, axis=0), held)


def _put(held, rows, other):
    return keras.tree.map_structure(lambda x, y: ops.scatter_update(x, ops.expand_dims(rows, 1), y), held, other)


def _best(logits):
    return ops.cast(ops.argmax(logits, axis=-1), "int32"), ops.max(logits, axis=-1)
