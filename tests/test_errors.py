"""Wrong input: each error states the rule, the value seen and the remedy, and leaves a held state as it was."""

import re

import keras
import numpy as np
import pytest
from keras import ops
from support import HIDDEN_DIM, SMALL, SPLIT, close, make, states_close

import keras_fam
from keras_fam import FeedbackAttention, TransformerFAMBackbone, TransformerFAMBlock, TransformerFAMCausalLM
from keras_fam.layers.random_state_passing import RandomStatePassing
from keras_fam.models.configs import model_config

ATTENTION_ONLY = {name: value for name, value in SMALL.items() if name != "intermediate_dim"}
MODEL = {"vocabulary_size": 11, "num_layers": 2, "hidden_dim": HIDDEN_DIM, **SMALL}


def data(batch=2, tokens=14, width=HIDDEN_DIM):
    return np.random.default_rng(1).normal(size=(batch, tokens, width)).astype("float32")


def raises(*words, error=ValueError):
    """Expects an error whose message holds all `words`, whatever is between them."""
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{re.escape(str(word))})" for word in words))


# Settings -----------------------------------------------------------------------------------------------------------

WRONG_SETTINGS = [
    ({"num_query_heads": 4, "num_key_value_heads": 3}, ["multiple of `num_key_value_heads`", "4 and 3"]),
    ({"num_query_heads": 0}, ["`num_query_heads`", "must be a positive integer", "received 0"]),
    ({"num_key_value_heads": 0}, ["`num_key_value_heads`", "must be a positive integer", "received 0"]),
    ({"head_dim": 5}, ["`head_dim` must be even", "received 5"]),
    ({"head_dim": 4.0}, ["`head_dim` must be a positive integer", "received 4.0"]),
    ({"block_size": 0, "fam_length": 0}, ["`block_size`", "must be a positive integer", "received 0"]),
    ({"block_size": True}, ["`block_size`", "positive integer", "received True"]),
    ({"memory_segments": -1}, ["`memory_segments`", "must be a non-negative integer", "received -1"]),
    ({"fam_length": -2}, ["`fam_length`", "must be a non-negative integer", "received -2"]),
    ({"fam_length": 5}, ["`fam_length` must be at most `block_size`", "received 5 rows for blocks of 4", "lengthen"]),
    ({"num_visible_memories": 0}, ["`num_visible_memories`", "must be a positive integer", "received 0"]),
    ({"attention_window": 0}, ["`attention_window`", "must be a positive integer", "received 0"]),
    ({"initial_fam": "zeros"}, ["`initial_fam` must be one of 'prompt', 'prefix', 'summary'", "received 'zeros'"]),
    ({"fam_position": "first"}, ["`fam_position` must be one of 'last', 'float'", "received 'first'"]),
    ({"fam_query_position": "next"}, ["`fam_query_position` must be one of 'previous', 'current'", "received 'next'"]),
    (
        {"fam_query": "static"},
        ["`fam_query` must be one of 'feedback', 'anchored', 'layer_inputs'", "received 'static'"],
    ),
    (
        {"fam_query": "anchored", "initial_fam": "prefix"},
        ["`initial_fam` must be 'prompt' or 'summary'", "received 'prefix'"],
    ),
    ({"fam_gate": float("nan")}, ["`fam_gate` must be None, a finite number or float", "received nan"]),
    (
        {"memory_update": "none"},
        ["`memory_update` must be one of 'residual', 'normalized', 'average'", "received 'none'"],
    ),
    ({"rope_wavelength": 0}, ["`rope_wavelength` must be a positive number", "received 0"]),
    ({"rope_scaling": {"type": "su"}}, ["`rope_scaling`", "'linear', 'llama3' or 'yarn'", "su"]),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["needs 'original_max_position_embeddings' as well", "2.0"]),
    ({"rotary_dim": 3}, ["RoPE rotates pairs, so `rotary_dim` must be even", "received 3"]),
    ({"rotary_dim": 0}, ["`rotary_dim` must be a positive integer", "received 0"]),
    ({"rotary_dim": 8}, ["at most `head_dim`", "rotary_dim=8, head_dim=4"]),
    ({"rotary_dim": 2, "rope_wavelength": None}, ["with a `rope_wavelength`", "rope_wavelength=None"]),
    ({"attention_scale": -1.0}, ["`attention_scale` must be a positive number", "received -1.0"]),
    ({"attention_softcap": 0.0}, ["`attention_softcap` must be a positive number", "received 0.0"]),
]
WRONG_IN_BLOCKS = [
    ({"intermediate_dim": 0}, ["`intermediate_dim`", "must be a positive integer", "received 0"]),
    (
        {"norm": "batch_norm"},
        ["`norm` must be one of 'rms_norm', 'offset_rms_norm', 'layer_norm'", "received 'batch_norm'"],
    ),
    ({"norm_epsilon": 0}, ["`norm_epsilon` must be a positive number", "received 0"]),
    ({"dropout": 1.0}, ["`dropout` must be a rate in [0, 1)", "received 1.0"]),
    ({"dropout": -0.1}, ["`dropout`", "received -0.1"]),
    ({"activation": "sine"}, ["activation", "sine"]),
]


def named(cases):
    return [pytest.param(*case, id="-".join(map(str, case[0].items()))) for case in cases]


@pytest.mark.parametrize(("settings", "words"), named(WRONG_SETTINGS))
def test_settings_of_attention(settings, words):
    with raises(*words):
        FeedbackAttention(**{**ATTENTION_ONLY, **settings})


@pytest.mark.parametrize(("settings", "words"), named(WRONG_SETTINGS + WRONG_IN_BLOCKS))
def test_settings_of_blocks_and_backbones(settings, words):
    with raises(*words):
        TransformerFAMBlock(**{**SMALL, **settings})
    with raises(*words):
        TransformerFAMBackbone(**{**MODEL, **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    named([
        ({"vocabulary_size": 0}, ["`vocabulary_size`", "must be a positive integer", "received 0"]),
        ({"num_layers": 1.5}, ["`num_layers` must be a positive integer", "received 1.5"]),
        ({"hidden_dim": 0}, ["`hidden_dim`", "must be a positive integer", "received 0"]),
        ({"hidden_dim": 10, "head_dim": None}, ["multiple of `num_query_heads` unless `head_dim`", "10 and 4"]),
        ({"blocks_per_step": 0}, ["`blocks_per_step`", "must be a positive integer", "received 0"]),
        ({"logit_softcap": -3}, ["`logit_softcap` must be a positive number", "received -3"]),
        ({"layer_settings": [{}]}, ["one dict per layer, 2", "received 1"]),
        ({"num_layers": 1, "fam_query": "layer_inputs"}, ["two layers or more", "a model of one layer has none"]),
        ({"layer_settings": [{}, {"fam_query": "anchored"}]}, ["`fam_query` must be the same", "layer_settings[1]"]),
        ({"layer_settings": [{}, {"fam_length": 2}]}, ["`fam_length` must be the same in all", "layer_settings[1]"]),
        ({"random_state_passing": 1.5}, ["probability from 0 to 1", "received 1.5"]),
    ]),
)  # fmt: skip
def test_settings_of_backbones(settings, words):
    with raises(*words):
        TransformerFAMBackbone(**{**MODEL, **settings})


def test_layer_inputs_need_a_layer_below():
    block = keras_fam.TransformerFAMBlock(2, 4, 8, block_size=4, fam_length=1, fam_query="layer_inputs")
    with raises("needs a model of two layers or more", "has none below", "`fam_query='anchored'`"):
        block(np.zeros((1, 4, 8), "float32"))


def test_settings_of_averages():
    for learned, weight, bound in ((False, 1.5, "at most 1"), (True, 1.0, "below 1")):
        with raises("`weight` is the share of the new", bound, f"received {weight}", 'memory_update="residual"'):
            keras_fam.Average(weight, learned=learned)
    with raises("`weight` must be a positive number", "received 0"):
        keras_fam.Average(0)


@pytest.mark.parametrize("name", ["RMTBackbone", "FeedbackMemoryBackbone", "SummaryFAMBackbone"])
def test_other_systems_have_a_write_of_their_own(name):
    with raises("`fam_query` must be 'feedback'", "received 'anchored'", "TransformerFAMBackbone"):
        getattr(keras_fam.baselines, name)(**MODEL, fam_query="anchored")


def test_unknown_settings():
    with raises("block_sise", error=TypeError):
        TransformerFAMBackbone(**MODEL, block_sise=8)
    with raises("block_sise", error=(TypeError, ValueError)):
        TransformerFAMBlock(**SMALL, block_sise=8)
    with raises("`name` must be one of", "paper_1b", "received 'huge'"):
        model_config("huge")
    with raises("`rate` is a probability from 0 to 1", "received -0.5"):
        RandomStatePassing(-0.5, num_layers=1, fam_length=1)


def test_stateful_needs_a_batch_size():
    layer = TransformerFAMBlock(**SMALL, stateful=True)
    with raises("fixed number of rows", "batch size None", "batch_shape="):
        layer(keras.Input((None, HIDDEN_DIM)))


# Input and state of layers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held():
    """A stateful block of two rows that has read 7 tokens."""
    layer = TransformerFAMBlock(**SMALL, stateful=True)
    layer.build((2, None, HIDDEN_DIM))
    layer(data()[:, :7])
    return layer


@pytest.fixture
def unchanged(held):
    before = held.state
    yield
    states_close(held.state, before, 0.0)


def other_state(batch=2, **settings):
    return make(**settings)[0].get_initial_state(batch)


WRONG_INPUT = {
    "no tokens": (lambda: data(tokens=0), ["at least one token (T ≥ 1)", "(2, 0, 12)", "Skip empty"]),
    "width": (lambda: data(width=7), ["built for width 12", "(2, 14, 7)", "Project the input to 12"]),
    "rank 2": (lambda: data()[0], ["[batch, tokens, width]", "(14, 12)", "axes"]),
    "rank 4": (lambda: data()[None], ["[batch, tokens, width]", "(1, 2, 14, 12)"]),
}


@pytest.mark.parametrize("case", WRONG_INPUT)
def test_input(held, unchanged, case):
    x, words = WRONG_INPUT[case]
    with raises(*words):
        held(x())
    with raises(*words):
        held.advance(x(), held.state)


def test_batch_of_another_size(held, unchanged):
    with raises("holds 2 rows, received 3", "Pad the batch", "3 rows"):
        held(data(batch=3))


@pytest.mark.parametrize(
    ("mask", "shape"),
    [((2, 13), "(2, 13)"), ((3, 14), "(3, 14)"), ((14,), "(14,)"), ((2, 14, 1), "(2, 14, 1)")],
)
def test_padding_mask(held, unchanged, mask, shape):
    with raises("one entry per token, shape (2, 14)", f"received shape {shape}", "True at real tokens"):
        held(data(), padding_mask=np.ones(mask, bool))


WRONG_STATE = {
    "no state": (lambda s: ops.zeros((2, 4)), ["is a keras_fam.StreamState", "get_initial_state"]),
    "a list": (lambda s: list(s), ["is a keras_fam.StreamState", "received list"]),
    "no position": (
        lambda s: s._replace(position=s.layers[0]),
        ["`position`", "is a StreamPosition", "received LayerState"],
    ),
    "no layer": (lambda s: s._replace(layers=((),)), ["`layers[0]`", "is a LayerState", "received tuple"]),
    "layers in a list": (lambda s: s._replace(layers=list(s.layers)), ["StreamState"]),
    "two layers": (lambda s: s._replace(layers=s.layers * 2), ["has 1 layer(s)", "one with 2", "another model"]),
    "other rows": (lambda s: other_state(3), ["position.offset", "shape (2,)", "received (3,)", "number of rows"]),
    "other S": (lambda s: other_state(block_size=3), ["layers[0].key", "(2, 8, 2, 4)", "received (2, 6, 2, 4)"]),
    "other m": (lambda s: other_state(memory_segments=2), ["layers[0].key", "received (2, 12, 2, 4)"]),
    "other F": (lambda s: other_state(fam_length=2), ["layers[0].fam", "(2, 3, 12)", "received (2, 2, 12)"]),
    "no memory": (lambda s: other_state(fam_length=0), ["layers[0].fam", "received tuple", "other settings"]),
    "dtype": (
        lambda s: s._replace(position=s.position._replace(offset=ops.cast(s.position.offset, "float32"))),
        ["position.offset", "dtype int32", "received float32", "Cast it"],
    ),
}


@pytest.mark.parametrize("case", WRONG_STATE)
def test_state(held, unchanged, case):
    wrong, words = WRONG_STATE[case]
    state = wrong(held.get_initial_state(2))
    with raises(*words):
        held(data(), initial_state=state)
    with raises(*words):
        held.advance(data(), state)


def test_state_with_a_number_in_it(held):
    """`call` leaves this one to Keras, which takes no tuples of tensors and numbers."""
    state = held.get_initial_state(2)
    with raises("position.offset", "received int"):
        held.advance(data(), state._replace(position=state.position._replace(offset=0)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("field", ["fam", "key", "fam_value"])
def test_state_that_is_not_finite(held, unchanged, field, value):
    state = held.get_initial_state(2)
    layer = state.layers[0]
    layer = layer._replace(**{field: getattr(layer, field) * value + value})
    with raises("is finite", "NaN or infinity", "reset the rows"):
        held(data(), initial_state=state._replace(layers=(layer,)))


def test_rows_to_reset(held, unchanged):
    for rows in ([2], [-1], [0, 5], ["a"], [0.5]):
        with raises("numbers from 0 to 1", rows[-1]):
            held.reset_state(rows=rows)
    with raises("stateful=True", "stateful=False", "drop the state"):
        make()[0].reset_state()
    with raises("holds no state", "stateful=False"):
        _ = make()[0].state


def test_a_failed_call_is_forgotten(held):
    """After all the wrong calls above, the layer goes on where it stood."""
    plain = TransformerFAMBlock(**SMALL)
    plain.build((2, None, HIDDEN_DIM))
    for source, target in zip(held.trainable_weights, plain.weights, strict=True):
        target.assign(source)
    close(held(data()[:, 7:]), plain(data())[:, 7:], SPLIT)


def test_layer_whose_memory_belongs_to_a_model():
    backbone = TransformerFAMBackbone(11, 1, HIDDEN_DIM, 4, 24, head_dim=4, block_size=4, fam_length=3)
    backbone.build()
    with raises("belongs to the model", "get_initial_state"):
        backbone.blocks[0](data())


# Models -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["backbone", "language model"])
def model(request):
    backbone = TransformerFAMBackbone(**MODEL)
    backbone.build()
    return backbone if request.param == "backbone" else TransformerFAMCausalLM(backbone)


def ids(*shape):
    return np.ones(shape, "int32")


def test_model_input(model):
    with raises("token ids [batch, tokens]", "(2, 5, 1)", "axes"):
        model(ids(2, 5, 1))
    with raises("token ids [batch, tokens]", "(5,)"):
        model.advance(ids(5), model.get_initial_state(2))
    with raises("at least one token", "(2, 0)", "Skip empty"):
        model(ids(2, 0))
    with raises("dict of 'token_ids' and 'padding_mask'", "['tokens']"):
        model({"tokens": ids(2, 5)})
    with raises("the keys", "['segment_ids', 'token_ids']"):
        model({"token_ids": ids(2, 5), "segment_ids": ids(2, 5)})
    with raises("one entry per token, shape (2, 5)", "(2, 4)"):
        model({"token_ids": ids(2, 5), "padding_mask": ids(2, 4)})


def test_model_state(model):
    with raises("is a keras_fam.StreamState", "received tuple"):
        model(ids(2, 5), initial_state=())
    with raises("position.offset", "(2,)", "received (3,)"):
        model.advance(ids(2, 5), model.get_initial_state(3))
    with raises("has 2 layer(s)", "one with 1", "another model"):
        model.advance(ids(2, 5), other_state())
    state = model.get_initial_state(2)
    state = state._replace(layers=(state.layers[0], state.layers[1]._replace(value=state.layers[1].value * np.nan)))
    with raises("is finite", "NaN or infinity", "layers[1].value"):
        model(ids(2, 5), initial_state=state)


def test_check_streaming_needs_two_rows():
    with raises("two", "batch_size=1"):
        keras_fam.check_streaming(make()[0], batch_size=1)
    with raises("no `block_size`"):
        keras_fam.check_streaming(keras.layers.Dense(3))
