"""What the memory looks like, block by block: size, drift and effective rank, as a function and as a callback."""

import keras
import numpy as np
from keras import ops

from keras_fam.ops.backend import compiled
from keras_fam.ops.scan import scan
from keras_fam.ops.token_ids import check_ids_of

STATISTICS = ("rms", "drift", "drift_from_first", "effective_rank")


class _Reader:
    """Yields the memories of every layer after each block, from one compiled program."""

    def __init__(self, model, blocks_per_step):
        self.model = getattr(model, "backbone", model)  # logits are not wanted
        if not model.fam_length:
            raise ValueError(
                f"There is a memory to look at; {model.name} has fam_length=0 (TransformerBSWA). Give it memory rows."
            )
        self.block_size, self.blocks_per_step = model.block_size, blocks_per_step
        self._program = compiled(self._read, lambda: self.model.variables, record="gpu")

    def _read(self, tokens, state):
        shape = ops.shape(tokens)
        blocks = ops.reshape(tokens, (shape[0], -1, self.block_size, *shape[2:]))
        xs = {"tokens": ops.moveaxis(blocks, 1, 0)}

        def step(state, x):
            _, state = self.model.advance(x["tokens"], state, aligned=True)
            return state, tuple(layer.fam for layer in state.layers)

        return scan(step, state, xs, tuple(layer.fam for layer in state.layers))

    def memories(self, tokens):
        """NumPy `[L, n, B, F, D]` of the next n blocks, again and again, until whole blocks run out."""
        tokens = np.asarray(tokens)
        check_ids_of(self.model, tokens)
        rows, count = tokens.shape[0], tokens.shape[1] // self.block_size
        if not count:
            raise ValueError(
                f"A memory is written once per block of {self.block_size} tokens; received {tokens.shape[1]} tokens."
            )
        state = self.model.get_initial_state(rows)
        for first in range(0, count, self.blocks_per_step):
            last = min(first + self.blocks_per_step, count)
            piece = tokens[:, first * self.block_size : last * self.block_size]
            state, fams = self._program(ops.convert_to_tensor(piece), state)
            yield np.stack([ops.convert_to_numpy(fam) for fam in fams]).astype("float64")


def memory_statistics(model, tokens, *, blocks_per_step: int = 8):
    """Size, drift and effective rank of every layer's memory after each block of a text, averaged over rows.

    Args:
        model: a language model, backbone or layer with memory.
        tokens: int `[B, T]` (`[B, T, D]` for a layer), read from a fresh start; an unfinished last block is left out.
        blocks_per_step: how many blocks one call of the compiled program reads; no result changes.

    Returns:
        A dict that JSON can hold: `"block"`, the numbers 1 … n; and, as lists of L lists over blocks, `"rms"` (root
        mean square of the memory), `"drift"` (1 − cosine between a row and itself one block before; None at the first
        block), `"drift_from_first"` (likewise, from the memory after block 1) and `"effective_rank"` (exponential of
        the entropy of the singular values of a row's `[F, D]`, 1 … F).

    Raises:
        ValueError: for a model without memory, or less than a block of tokens.
    """
    return _statistics(_Reader(model, blocks_per_step), tokens)


def _statistics(reader, tokens):
    parts, first, before = [], None, None
    for fams in reader.memories(tokens):
        first = fams[:, :1] if first is None else first
        earlier = np.concatenate([fams[:, :1] if before is None else before, fams[:, :-1]], axis=1)
        parts.append((_rms(fams), _drift(fams, earlier), _drift(fams, first), effective_rank(fams)))
        before = fams[:, -1:]
    rms, drift, from_first, rank = (np.concatenate(p, axis=1) for p in zip(*parts, strict=True))
    drift = [[None, *layer[1:]] for layer in drift.tolist()]
    table = dict(zip(STATISTICS, (rms.tolist(), drift, from_first.tolist(), rank.tolist()), strict=True))
    return {"block": list(range(1, rms.shape[1] + 1)), **table}


def _rms(fams):
    return np.sqrt(np.mean(fams**2, axis=(-1, -2))).mean(-1)


def _drift(a, b):
    """1 − cosine of memory rows, averaged over them and over batch rows: `[L, n]`."""
    size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (1.0 - (a * b).sum(-1) / np.maximum(size, 1e-30)).mean((-1, -2))


def effective_rank(fams):
    """Exponential of the entropy of the normalised singular values of `[..., B, F, D]`, averaged over B.

    Reference: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    values = np.linalg.svd(fams, compute_uv=False)
    share = values / np.maximum(values.sum(-1, keepdims=True), 1e-30)
    return np.exp(-(share * np.log(np.maximum(share, 1e-30))).sum(-1)).mean(-1)


class MemoryMonitor(keras.callbacks.Callback):
    """Looks at the memory while a model trains: it reads a text and notes `memory_statistics`.

    The last block's numbers, averaged over layers, go into the logs (and so into Keras' history, TensorBoard, …) as
    `memory_rms`, `memory_drift`, `memory_drift_from_first` and `memory_effective_rank`.

    Args:
        tokens: int `[B, T]`, T at least two blocks.
        every: `"epoch"`, or a number of batches.
        blocks_per_step: see `memory_statistics`.

    Attributes:
        history: list of dicts: `"step"` (batches so far) and `"statistics"` (see `memory_statistics`).
    """

    def __init__(self, tokens, every="epoch", *, blocks_per_step: int = 8):
        super().__init__()
        if every != "epoch" and (not isinstance(every, int) or every < 1):
            raise ValueError(f"`every` is 'epoch' or a number of batches; received {every!r}.")
        self.tokens, self.every, self.blocks_per_step = tokens, every, blocks_per_step
        self.history, self._batches, self._reader = [], 0, None

    def on_train_begin(self, logs=None):
        model = self.model
        self._reader = _Reader(getattr(model, "wrapped", model), self.blocks_per_step)

    def on_train_batch_end(self, batch, logs=None):
        self._batches += 1
        if self.every != "epoch" and self._batches % self.every == 0:
            self._look(logs)

    def on_epoch_end(self, epoch, logs=None):
        if self.every == "epoch":
            self._look(logs)
        elif self.history and logs is not None:
            logs.update(self._last(self.history[-1]["statistics"]))

    def _look(self, logs):
        self.model  # noqa: B018  (on JAX, reading this property brings the trained values into the variables)
        statistics = _statistics(self._reader, self.tokens)
        self.history.append({"step": self._batches, "statistics": statistics})
        if logs is not None:
            logs.update(self._last(statistics))

    def _last(self, statistics):
        return {f"memory_{name}": float(np.mean([layer[-1] for layer in statistics[name]])) for name in STATISTICS}
