"""The model of the serving examples: small, with random weights that are the same under every backend."""

import numpy as np

import keras_fam

SETTINGS = {
    "vocabulary_size": 97,
    "num_layers": 2,
    "hidden_dim": 32,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_dim": 64,
    "block_size": 8,
    "memory_segments": 1,
    "fam_length": 4,
}
VOCABULARY = SETTINGS["vocabulary_size"]


def small_model():
    """A `TransformerFAMCausalLM` whose outputs are far from uniform."""
    lm = keras_fam.TransformerFAMCausalLM(keras_fam.TransformerFAMBackbone(**SETTINGS))
    lm.build()
    rng = np.random.default_rng(0)
    for variable in lm.weights:
        scale = 1.0 if len(variable.shape) == 1 else variable.shape[0] ** -0.5
        variable.assign(rng.normal(size=variable.shape) * scale)
    return lm
