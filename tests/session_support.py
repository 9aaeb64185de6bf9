"""Shared by the tests of sessions on disk: a small model, states of random numbers, a saved session."""

import keras
import numpy as np
from keras import ops
from support import numpy

import keras_fam
from keras_fam.state import map_specs, named_leaves
from keras_fam.streaming import session

V = 11
SETTINGS = {"vocabulary_size": V, "num_layers": 2, "hidden_dim": 16, "num_query_heads": 4, "num_key_value_heads": 2,
            "intermediate_dim": 24, "block_size": 4, "memory_segments": 1, "fam_length": 3,
            "attention_sinks": 2}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, V, (2, 23)).astype("int32")


def make(seed=0, dtype="float32", **changes):
    keras.utils.set_random_seed(seed)
    backbone = keras_fam.TransformerFAMBackbone(**{**SETTINGS, **changes}, dtype=dtype)
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.build()
    return lm


def random_state(model, rows=2, seed=0):
    """A state of random numbers in which rows stand at different places."""
    rng = np.random.default_rng(seed)

    def draw(spec):
        values = rng.integers(0, 2, spec.shape) if spec.dtype in ("bool", "int32") else rng.normal(size=spec.shape)
        return ops.convert_to_tensor(values, dtype=spec.dtype)

    state = map_specs(draw, model.state_spec(rows))
    most = 0 if isinstance(state.layers[0].fam, tuple) else 1
    visible = ops.convert_to_tensor(np.minimum(numpy(state.position.visible_memories), most))
    blocks = ops.convert_to_tensor(np.array([2**20 + 7, 0] * rows)[:rows].astype("int32"))
    return state._replace(position=state.position._replace(visible_memories=visible, block_index=blocks))


def same_bits(actual, expected):
    pairs = list(zip(named_leaves(actual), named_leaves(expected), strict=True))
    for (name, a), (other, b) in pairs:
        a, b = numpy(a), numpy(b)
        assert (name, a.shape, a.dtype) == (other, b.shape, b.dtype)
        assert a.tobytes() == b.tobytes(), name
    return len(pairs)


def save_two_rows(model, folder):
    """`(path, model, state)` of a session of two rows."""
    state, path = random_state(model), folder / "session.safetensors"
    session.save(path, model, state, {"position": np.array([4194333, 1]), "next_logits": np.ones((2, V), "float32")})
    return path, model, state
