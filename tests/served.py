"""One export for TF Serving per process, shared by the tests of its signatures, of its sessions and of its files."""

import functools
import tempfile

import keras
import numpy as np
import pytest
import support

import keras_fam

V, ROWS, TOTAL, PLACES = 31, 8, 48, 8
SECRET = "of the tests"
BACKBONE = {**support.SMALL, "vocabulary_size": V, "num_layers": 2, "hidden_dim": support.HIDDEN_DIM,
            "attention_sinks": 2}  # fmt: skip
CHUNKS = (1, 2, 5, 1, 4, 9, 26)  # of TOTAL
STATELESS = {"serving_default", "padded", "init_state", "step", "generate"}
SESSIONS = {"open", "append", "append_last", "session_generate", "reset", "close"}
OPTIONS = {"max_new_tokens": 6, "temperature": 0.0, "top_k": 0, "stop_tokens": [-1]}
on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the export itself runs on TensorFlow"
)


def make_model(**settings):
    backbone = keras_fam.TransformerFAMBackbone(**{**BACKBONE, **settings})
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.build()
    rng = np.random.default_rng(0)
    for variable in lm.weights:
        variable.assign(rng.normal(size=variable.shape) * 0.5)
    return lm


class Served:
    """A loaded export: `served(signature, **inputs)` from and to NumPy."""

    def __init__(self, folder):
        import tensorflow as tf

        self.tf, self.module = tf, tf.saved_model.load(str(folder))
        self.signatures = self.module.signatures

    def __call__(self, signature, **inputs):
        function = self.signatures[signature]
        specs = function.structured_input_signature[1]
        inputs = {name: self.tf.convert_to_tensor(x, specs[name].dtype) for name, x in inputs.items()}
        return {name: x.numpy() for name, x in function(**inputs).items()}

    def refuses(self, message, signature, **inputs):
        with pytest.raises(self.tf.errors.InvalidArgumentError, match=message):
            self(signature, **inputs)

    def append(self, sessions, tokens, signature="append", lengths=None):
        lengths = [tokens.shape[1]] * len(sessions) if lengths is None else lengths
        return self(signature, sessions=sessions, token_ids=tokens, lengths=lengths)

    def open_sessions(self):
        """The numbers of all open sessions."""
        return self("list", count=99, secret=SECRET)["sessions"]


@functools.cache
def language_model():
    return make_model()


@functools.cache
def _folder():
    base = tempfile.TemporaryDirectory()  # removed when the process ends
    folder = keras_fam.export_serving(
        language_model(), base.name, sessions=PLACES, admin_secret=SECRET, blocks_per_step=2
    )
    return base, folder


def exported():
    """`pathlib.Path` of the export of `language_model()`."""
    return _folder()[1]


@functools.cache
def loaded():
    """The export as `Served`."""
    return Served(exported())


@functools.cache
def some_tokens():
    return np.random.default_rng(1).integers(0, V, (ROWS, TOTAL)).astype("int32")


@functools.cache
def whole_logits():
    """Logits of the whole sequences by Keras, `[ROWS, TOTAL, V]`: those of any chunks of them."""
    return language_model().predict(some_tokens(), verbose=0)


def state_of(results):
    return {name: x for name, x in results.items() if name.startswith("state_")}
