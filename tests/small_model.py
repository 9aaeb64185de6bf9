"""Shared by the tests of language models: a small one, its tokens and logits, one with a tokenizer."""

import keras
import numpy as np
import pytest
from support import call, numpy

import keras_fam

SETTINGS = {
    "vocabulary_size": 31, "num_layers": 2, "hidden_dim": 16, "num_query_heads": 4, "num_key_value_heads": 2,
    "intermediate_dim": 24, "block_size": 4, "memory_segments": 1, "fam_length": 3,
}  # fmt: skip


def model(seed=0, backbone_class=keras_fam.TransformerFAMBackbone, **settings):
    keras.utils.set_random_seed(seed)
    lm = keras_fam.TransformerFAMCausalLM(backbone_class(**{**SETTINGS, **settings}))
    lm.build()
    for v in lm.weights:
        if v.name == "bias":
            v.assign(keras.random.normal(v.shape, stddev=0.3))
    return lm


def tokens(length=15, rows=2):
    return np.random.default_rng(1).integers(0, 31, (rows, length)).astype("int32")


def logits(lm, x=None):
    return numpy(call(lm, tokens() if x is None else x))


def shake(lm, seed=2):
    """Gives the updates random values: they start as nothing."""
    for i, layer in enumerate(lm.lora_layers().values()):
        layer.lora_kernel_b.assign(keras.random.normal(layer.lora_kernel_b.shape, stddev=0.2, seed=seed + i))


def with_text(**settings):
    keras_hub = pytest.importorskip("keras_hub")
    words = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġa": 5}
    tokenizer = keras_hub.models.QwenTokenizer(vocabulary=words, merges=["a b", "Ġ a"])
    lm = model(**settings)
    lm.preprocessor = keras_hub.models.QwenCausalLMPreprocessor(tokenizer, sequence_length=8)
    return lm
