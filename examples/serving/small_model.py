"""The model of the serving examples: small, with random weights that are the same under every backend."""

import types

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


class Characters:
    """A tokenizer of the 95 printable ASCII characters, the end of a line, and an end of a text."""

    end_token_id = 96
    special_token_ids = (96,)
    alphabet = "".join(map(chr, range(32, 127))) + "\n"

    def __call__(self, text):
        return [self.alphabet.find(character) % 96 for character in text]

    def detokenize(self, ids):
        return "".join(self.alphabet[i] for i in ids)


def small_text_model():
    """`small_model` with a tokenizer: it reads and writes text without sense."""
    lm = small_model()
    lm.preprocessor = types.SimpleNamespace(tokenizer=Characters(), add_start_token=False)
    return lm
