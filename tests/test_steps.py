"""Long inputs in steps: gradients at low memory are the plain ones, and truncation cuts where it says."""

import keras
import numpy as np
import pytest
from keras import ops
from support import close, gradients, numpy, relative

import keras_fam

V, S, BLOCKS = 11, 4, 7
TOKENS = np.random.default_rng(0).integers(0, V, (2, BLOCKS * S + 1)).astype("int32")
PROBE = np.random.default_rng(1).normal(size=(2, BLOCKS * S, V)).astype("float32")
GRADIENT = 1e-5  # of gradients at low memory from plain ones, relative


def make_lm(**settings):
    keras.utils.set_random_seed(0)
    sizes = {"block_size": S, "memory_segments": 1, "fam_length": 2, **settings}
    lm = keras_fam.TransformerFAMCausalLM(keras_fam.TransformerFAMBackbone(V, 2, 8, 2, 16, **sizes))
    lm.build()
    return lm


def gradients_of(lm, call):
    return gradients(lambda: ops.sum(call(lm) * PROBE), lm.trainable_variables)


def whole(lm):
    return lm(TOKENS[:, :-1], training=True)


@pytest.mark.parametrize("form", [{}, {"memory_segments": 0, "initial_fam": "summary"}])
def test_gradients_at_low_memory_are_the_plain_ones(form):
    """Steps of 2 blocks with a rest of 1 block, and of 1 block, replayed backwards."""
    plain = make_lm(**form)
    expected, outputs = gradients_of(plain, whole), whole(plain)
    for blocks in (2, 1):
        lm = make_lm(**form, remat=True, blocks_per_step=blocks)
        close(whole(lm), outputs, GRADIENT)
        for name, found, one in zip(lm.trainable_variables, gradients_of(lm, whole), expected, strict=True):
            assert relative(found, one) <= GRADIENT, (keras.backend.backend(), blocks, name.path)


@pytest.mark.parametrize("remat", [False, True])
def test_truncated_back_propagation(remat):
    """Gradients are those of chunks of 2 steps whose states are detached between them, for the rest as well."""
    lm = make_lm(blocks_per_step=1, backpropagation_steps=2, remat=remat)

    def in_chunks(lm):
        state, outputs = lm.get_initial_state(2), []
        for first in range(0, BLOCKS * S, 2 * S):
            chunk = TOKENS[:, first : min(first + 2 * S, BLOCKS * S)]
            state = keras.tree.map_structure(ops.stop_gradient, state) if first else state
            part, state = lm.advance(chunk, state)
            outputs.append(part)
        return ops.concatenate(outputs, axis=1)

    found, expected, full = gradients_of(lm, whole), gradients_of(lm, in_chunks), gradients_of(make_lm(), whole)
    for name, one, other in zip(lm.trainable_variables, found, expected, strict=True):
        assert relative(one, other) <= GRADIENT, (keras.backend.backend(), name.path)
    assert max(relative(a, b) for a, b in zip(found, full, strict=True)) > 1e-2
    again = type(lm).from_config(lm.get_config()).backbone
    assert (again.backpropagation_steps, again.remat) == (2, remat)


def test_carried_state_trains_alike_at_low_memory():
    """`fit` over chunks of 3 blocks: plain and replayed steps reach the same weights and the same state."""
    targets, weights = TOKENS[:, 1:], []
    for settings in ({}, {"remat": True, "blocks_per_step": 1}):
        stream = keras_fam.StreamingModel(make_lm(**settings), 2)
        stream.compile(keras.optimizers.SGD(0.5))
        for first in (0, 3 * S):
            part = slice(first, first + 3 * S)
            stream.train_on_batch(TOKENS[:, part], targets[:, part])
        weights.append([numpy(v) for v in (*stream.model.trainable_variables, stream.state.layers[1].fam)])
    for one, other in zip(*weights, strict=True):
        close(one, other, GRADIENT)


def test_truncation_needs_whole_blocks():
    lm = make_lm(blocks_per_step=2, backpropagation_steps=1)
    with pytest.raises(ValueError, match="whole blocks"):
        lm(TOKENS, initial_state=lm.get_initial_state(2), training=True)
    lm(TOKENS, initial_state=lm.get_initial_state(2))
    with pytest.raises(ValueError, match="`backpropagation_steps`"):
        make_lm(backpropagation_steps=0)
