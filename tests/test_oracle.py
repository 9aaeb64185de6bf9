"""Every variant of the layer against the plain NumPy loop: outputs, final state, gradients."""

import keras
import numpy as np
import pytest
import reference
import support
from keras import ops
from support import ORACLE, VARIANTS, float64, gradients, make, numpy, oracle_inputs, relative, variables_by_name

BATCH, TOKENS = 2, 14


def data(dtype="float32", batch=BATCH, tokens=TOKENS):
    return np.random.default_rng(1).normal(size=(batch, tokens, support.HIDDEN_DIM)).astype(dtype)


def oracle_state(rows, cfg):
    """The keys, values and memory that the oracle's rows hold, in the layout of a `LayerState`."""
    S, m, F = cfg["block_size"], cfg["memory_segments"], cfg["fam_length"]
    held, fams = [], []
    for row in rows:
        first = (row.count // S - m) * S
        values = [row.values[t] if 0 <= t < row.count else None for t in range(first, first + (m + 1) * S)]
        empty = np.zeros_like(row.values[0])
        held.append(np.stack([empty if v is None else v for v in values]))
        fams.append(row.memories[-1][1] if F and row.memories else np.zeros((F, support.HIDDEN_DIM)))
    return np.stack(held), np.stack(fams)


def forward_errors(variant, dtype):
    """Relative differences from the oracle: outputs, held values, memory."""
    with float64():
        block, weights, cfg, fam0 = make(variant, dtype)
        x = data(dtype)
        y, state = block(x, return_state=True)
        expected, rows, _ = reference.batch_layer(x, None, weights, cfg, **oracle_inputs(cfg, fam0))
        value, fam = oracle_state(rows, cfg)
        errors = {"outputs": relative(y, expected), "state": relative(state.layers[0].value, value)}
        if cfg["fam_length"]:
            errors["memory"] = relative(state.layers[0].fam, fam)
        return errors


def check_forward(variant, dtype):
    for name, error in forward_errors(variant, dtype).items():
        assert error <= ORACLE[dtype], f"{keras.backend.backend()}: {name} differ by {error:.2e}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_state_float32(variant):
    check_forward(variant, "float32")


# TensorFlow's exact gelu holds the root of 2 in float32, so that variant has no float64.
FLOAT64 = [name for name in VARIANTS if name != "gelu"]


@pytest.mark.parametrize("variant", FLOAT64)
def test_outputs_and_state_float64(variant):
    check_forward(variant, "float64")


SMOOTH = [(v, "float32") for v in VARIANTS] + [(v, "float64") for v in FLOAT64]


@pytest.mark.parametrize(("variant", "dtype"), SMOOTH)
def test_gradients(variant, dtype):
    for name, error in gradient_errors(variant, dtype).items():
        assert error <= ORACLE[dtype], f"{keras.backend.backend()}: gradient of {name} differs by {error:.2e}"


def gradient_errors(variant, dtype):
    """Directional derivatives of the oracle (complex steps) against the backend's gradients, weight by weight."""
    with float64():
        block, weights, cfg, fam0 = make(variant, dtype)
        x = data(dtype, batch=1, tokens=10)
        rng = np.random.default_rng(2)
        probe = rng.normal(size=x.shape)
        weight = ops.convert_to_tensor(probe, dtype)
        inputs = oracle_inputs(cfg, fam0)
        frozen = None
        if cfg["stop_memory_gradient"]:
            frozen = reference.batch_layer(x, None, weights, cfg, **inputs)[1]

        def oracle(x, weights, inputs):
            return (reference.batch_layer(x, None, weights, cfg, frozen=frozen, **inputs)[0] * probe).sum()

        names = list(weights)
        variables = [variables_by_name(block)[name] for name in names]
        if fam0 is not None:
            names.append("initial_fam")
            variables.append(block.attention.initial_fam_rows)

        def loss(x):
            return ops.sum(block(x) * weight)

        found = dict(zip(["x", *names], gradients(loss, [x, *variables]), strict=True))
        errors = {}
        scale = max(np.abs(g).max() for g in found.values())
        for name, gradient in found.items():
            direction = rng.normal(size=gradient.shape)
            if name == "x":
                expected = reference.gradient(lambda z: oracle(z, weights, inputs), x.astype("float64"), direction)
            elif name == "initial_fam":
                expected = reference.gradient(lambda z: oracle(x, weights, dict.fromkeys(inputs, z)), fam0, direction)
            else:
                expected = reference.gradient(
                    lambda z, name=name: oracle(x, {**weights, name: z}, inputs), weights[name], direction
                )
            actual = float((numpy(gradient).astype("float64") * direction).sum())
            size = max(np.abs(gradient).max() * np.sqrt(gradient.size), 1e-3 * scale)
            errors[name] = abs(actual - expected) / size
        return errors
