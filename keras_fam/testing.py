"""`check_streaming`: the contracts of a streaming layer, for the package's own layers and for yours."""

import keras
import numpy as np
from keras import ops

from keras_fam.ops.backend import value_and_gradient


def check_streaming(
    layer,
    *,
    batch_size: int = 2,
    tokens: int | None = None,
    input_dim: int | None = None,
    tolerance: float = 1e-5,
    gradient_tolerance: float = 1e-4,
    seed: int = 0,
) -> dict:
    """Checks that a layer or model streams exactly, and measures how exactly.

    The contracts:
    1. `chunks`: any split into chunks gives the outputs and the final state of the whole; `gradients`: also the
       gradients with respect to the inputs, through the carried state (layers only; token ids have none).
    2. `future`, `rows`, `padding`: no output depends on a later token, on another row or on padding (NaN in layers,
       other ids in models): exactly 0.
    3. `lengths`, `reset`: rows of different lengths, and rows that are reset, equal rows read alone.
    4. `state_size`: the state has a constant size: shapes and dtypes never change.

    Args:
        layer: a built layer or model with `__call__(x, padding_mask=, initial_state=, return_state=)`,
            `advance(x, state, lengths=, reset=)`, `get_initial_state(batch_size)` and an attribute `block_size`
            (perhaps of its `attention` or `backbone`).
        batch_size: rows, at least 2.
        tokens: T of the whole; None means 3½ blocks.
        input_dim: width of the inputs of a layer; None reads `layer.hidden_dim`.
        tolerance: largest relative difference of outputs and states.
        gradient_tolerance: largest relative difference of gradients.
        seed: of the random inputs and splits.

    Returns:
        A dict from contract to the largest difference measured.

    Raises:
        AssertionError: naming the contract, the difference and the split.
        ValueError: for fewer than 2 rows, or a layer whose block size cannot be found.
    """
    if batch_size < 2:
        raise ValueError(f"Rows can only be compared if there are two; received batch_size={batch_size}.")
    return _Checker(layer, batch_size, tokens, input_dim, tolerance, gradient_tolerance, seed).run()


class _Checker:
    def __init__(self, layer, batch_size, tokens, input_dim, tolerance, gradient_tolerance, seed):
        self.layer, self.batch_size = layer, batch_size
        self.tolerance, self.gradient_tolerance = tolerance, gradient_tolerance
        self.rng = np.random.default_rng(seed)
        self.block_size = _block_size(layer)
        self.tokens = tokens or 3 * self.block_size + self.block_size // 2
        self.vocabulary = getattr(getattr(layer, "backbone", layer), "vocabulary_size", None)
        self.input_dim = input_dim or getattr(layer, "hidden_dim", None)
        self.report = {}

    def run(self):
        x = self.random_input(self.tokens)
        y, state = self.layer(x, return_state=True)
        y, shapes = _numpy(y), _shapes(state)
        for split in self.splits():
            outputs, last = self.stream(x, split)
            self.same("state_size", _shapes(last), shapes, f"split {split}")
            self.near("chunks", outputs, y, f"split {split}")
            self.near_states("chunks", last, state, f"split {split}")
        self.check_isolation(x, y)
        self.check_padding(x, y)
        self.check_lengths_and_reset(x, y)
        if self.vocabulary is None:
            self.check_gradients(x)
        return self.report

    def random_input(self, tokens):
        if self.vocabulary is not None:
            return self.rng.integers(0, self.vocabulary, (self.batch_size, tokens)).astype("int32")
        return self.rng.normal(size=(self.batch_size, tokens, self.input_dim)).astype(self.layer.compute_dtype)

    def splits(self):
        """Token by token, around the block size, and two at random."""
        S, T = self.block_size, self.tokens
        yield [1] * T
        for size in {max(S - 1, 1), S, S + 1, 2 * S}:
            yield _split_evenly(T, size)
        for _ in range(2):
            cuts = np.sort(self.rng.choice(np.arange(1, T), size=min(3, T - 1), replace=False))
            yield np.diff([0, *cuts, T]).tolist()

    def stream(self, x, split):
        state, outputs, first = self.layer.get_initial_state(self.batch_size), [], 0
        for size in split:
            y, state = self.layer.advance(x[:, first : first + size], state)
            outputs.append(y)
            first += size
        return ops.concatenate(outputs, axis=1), state

    def check_isolation(self, x, y):
        """Cuts inside a block and at its end; in layers the other future is large, so that no leak rounds away."""
        other = self.random_input(self.tokens)
        if self.vocabulary is None:
            other = other * 100
        whole = self.tokens // self.block_size // 2 * self.block_size or self.block_size
        for cut in {whole, whole - 1, whole + self.block_size // 2} & set(range(1, self.tokens)):
            changed = np.concatenate([x[:, :cut], other[:, cut:]], axis=1)
            self.exact("future", _numpy(self.layer(changed))[:, :cut], y[:, :cut])
        changed = np.array(x)
        changed[1:] = np.nan if self.vocabulary is None else other[1:]
        self.exact("rows", _numpy(self.layer(changed))[:1], y[:1])

    def check_padding(self, x, y):
        """Real tokens with padding between, before and behind them are the stream without padding."""
        extra = self.block_size + 2
        places = np.stack([np.sort(self.rng.permutation(self.tokens + extra)[: self.tokens]) for _ in x])
        mask = np.zeros((self.batch_size, self.tokens + extra), bool)
        np.put_along_axis(mask, places, True, axis=1)
        results = []
        for poison in self.poisons(mask.shape[1]):
            poison[mask] = x.reshape(-1, *x.shape[2:])
            results.append(_numpy(self.layer(poison, padding_mask=mask)))
        self.exact("padding", results[0], results[1])
        self.near("padding_removed", results[0][mask].reshape(y.shape), y, "padding squeezed out")

    def poisons(self, tokens):
        if self.vocabulary is not None:
            return [self.random_input(tokens), self.random_input(tokens)]
        return [np.zeros_like(self.random_input(tokens)), np.full_like(self.random_input(tokens), np.nan)]

    def check_lengths_and_reset(self, x, y):
        state, position = self.layer.get_initial_state(self.batch_size), np.zeros(self.batch_size, int)
        collected = [[] for _ in range(self.batch_size)]
        while (position < self.tokens).any():
            lengths = np.minimum(self.rng.integers(0, 2 * self.block_size, self.batch_size), self.tokens - position)
            chunk = self.random_input(2 * self.block_size)
            for b, (first, size) in enumerate(zip(position, lengths, strict=True)):
                chunk[b, :size] = x[b, first : first + size]
            out, state = self.layer.advance(chunk, state, lengths=lengths.astype("int32"))
            for b, size in enumerate(lengths):
                collected[b].append(_numpy(out)[b, :size])
            position += lengths
        self.near("lengths", np.stack([np.concatenate(c) for c in collected]), y, "rows of random lengths")
        reset = np.arange(self.batch_size) == 0
        again, _ = self.layer.advance(x, state, reset=reset)
        self.near("reset", _numpy(again)[:1], y[:1], "row 0 reset")

    def check_gradients(self, x):
        weight = ops.convert_to_tensor(self.random_input(self.tokens))
        split = _split_evenly(self.tokens, self.block_size + 1)
        _, whole = value_and_gradient(lambda x: ops.sum(self.layer(x) * weight), x)
        _, parts = value_and_gradient(lambda x: ops.sum(self.stream(x, split)[0] * weight), x)
        self.near("gradients", parts, whole, f"split {split}", self.gradient_tolerance)

    # Comparisons ------------------------------------------------------------------------------------------------

    def near(self, contract, actual, expected, where, tolerance=None):
        actual, expected = _numpy(actual).astype("float64"), _numpy(expected).astype("float64")
        error = float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))
        self.report[contract] = max(self.report.get(contract, 0.0), error)
        limit = self.tolerance if tolerance is None else tolerance
        if not error <= limit:
            raise AssertionError(
                f"{self.layer.name}: `{contract}`: relative difference {error:.2e} > {limit:.0e}, {where}"
            )

    def near_states(self, contract, actual, expected, where):
        for i, pair in enumerate(zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True)):
            self.near(contract, *pair, f"{where}, tensor {i} of the state")

    def exact(self, contract, actual, expected):
        difference = np.abs(actual.astype("float64") - expected.astype("float64")).max()
        self.report[contract] = max(self.report.get(contract, 0.0), float(difference))
        if not difference == 0:
            raise AssertionError(
                f"{self.layer.name}: `{contract}`: outputs change by {difference:.2e}; exactly 0 is due"
            )

    def same(self, contract, actual, expected, where):
        self.report[contract] = 0.0
        if actual != expected:
            raise AssertionError(f"{self.layer.name}: `{contract}`: {actual} instead of {expected}, {where}")


def _block_size(layer):
    for owner in (layer, getattr(layer, "attention", None), getattr(layer, "backbone", None)):
        size = getattr(owner, "block_size", None)
        if size is not None:
            return size
    raise ValueError(f"{layer.name} has no `block_size`, nor has its `attention` or `backbone`.")


def _split_evenly(tokens, size):
    return [min(size, tokens - first) for first in range(0, tokens, size)]


def _numpy(x):
    return np.asarray(ops.convert_to_numpy(x))


def _shapes(state):
    return [(tuple(x.shape), keras.backend.standardize_dtype(x.dtype)) for x in keras.tree.flatten(state)]
