"""Shared by the tests of conversion: random sources of KerasHub, their logits, and what counts as equal."""

import functools
import importlib

import keras
import numpy as np
import pytest
from keras import ops

from keras_fam import hub

keras_hub = pytest.importorskip("keras_hub")
hub_families = importlib.import_module("examples.verification.hub_families")
models = keras_hub.models

TOLERANCE = 1e-4
WINDOW = {"block_size": 16, "memory_segments": 1}
small = functools.partial(
    hub_families.sizes, np.random.default_rng(0), num_layers=1, hidden_dim=16, num_key_value_heads=2
)


@functools.cache
def source(family, seed):
    """A random CausalLM and its logits; of one width, so that JAX compiles few operations."""
    model, _ = hub_families.source(family, seed, hidden_dim=16)
    return model, hub_families.logits(model, hub_families.tokens())


def numpy(x):
    return ops.convert_to_numpy(x)


def equal(actual, expected):
    error = hub_families.difference(actual, expected)
    assert error <= TOLERANCE, f"{keras.backend.backend()}: logits differ by {error:.2e}"


def refused(message, backbone, **options):
    with pytest.raises(ValueError, match=message):
        hub.convert(backbone, **{**WINDOW, "fam_length": 2, **options})
