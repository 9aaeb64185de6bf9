"""Long inputs in steps: gradients at low memory are the plain ones, and truncation cuts where it says."""

import functools
import re

import keras
import numpy as np
import pytest
from keras import ops
from support import gradients, relative

import keras_fam

V, S, BLOCKS = 11, 4, 5
TOKENS = np.random.default_rng(0).integers(0, V, (2, BLOCKS * S)).astype("int32")
PROBE = np.random.default_rng(1).normal(size=(2, BLOCKS * S, V)).astype("float32")
GRADIENT = 1e-5  # of gradients at low memory from plain ones, relative


def make_lm(num_layers=1, **settings):
    keras.utils.set_random_seed(0)
    sizes = {"block_size": S, "memory_segments": 1, "fam_length": 2, **settings}
    lm = keras_fam.TransformerFAMCausalLM(keras_fam.TransformerFAMBackbone(V, num_layers, 8, 2, 16, **sizes))
    lm.build()
    return lm


def gradients_of(lm, call):
    return gradients(lambda: ops.sum(call(lm) * ops.convert_to_tensor(PROBE)), lm.trainable_variables)


def whole(lm):
    return lm(TOKENS, training=True)


@functools.cache
def plain_gradients(**form):
    return gradients_of(make_lm(**form), whole)


def agree(found, expected, lm):
    for variable, one, other in zip(lm.trainable_variables, found, expected, strict=True):
        assert relative(one, other) <= GRADIENT, (keras.backend.backend(), variable.path)


SUMMARY = {"memory_segments": 0, "initial_fam": "summary"}


@pytest.mark.parametrize(
    "blocks, remat, form",
    [
        (2, True, {}),
        (1, True, SUMMARY),
        (8, "layers", {"num_layers": 2, **SUMMARY, "fam_query": "anchored", "memory_update": "hard_gate"}),
        (2, "layers", {"num_layers": 2, "scan_layers": True, "dropout": 0.1}),
    ],
)
def test_gradients_at_low_memory_are_the_plain_ones(blocks, remat, form):
    """Steps of 2 blocks with a rest of 1 block, steps of 1 block, and a single step, replayed backwards."""
    lm = make_lm(**form, remat=remat, blocks_per_step=blocks)
    plain = make_lm(**form, blocks_per_step=blocks) if form.get("dropout") else None  # draws are those of the steps
    agree(gradients_of(lm, whole), gradients_of(plain, whole) if plain else plain_gradients(**form), lm)
    assert type(lm).from_config(lm.get_config()).backbone.remat == remat


def times_computed(lm):
    """How often a layer of a model is computed for the gradients: once if all that it does is kept."""
    calls, blocks = [], lm.backbone.blocks
    for block in blocks:
        plain = block.forward_chunk
        block.forward_chunk = lambda *args, plain=plain, **options: calls.append(plain) or plain(*args, **options)
    if keras.backend.backend() != "jax":
        gradients_of(lm, whole)
        return len(calls) / len(blocks)
    import jax

    def loss(trainable):
        outputs, _ = lm.stateless_call(trainable, [v.value for v in lm.non_trainable_variables], TOKENS, training=True)
        return ops.sum(outputs)

    program = str(jax.make_jaxpr(loss)([v.value for v in lm.trainable_variables]))
    return (len(calls) + len(re.findall(r"\b(?:checkpoint|remat\w*)\[", program))) / len(blocks)


def test_layers_are_computed_again():
    """A single step of all blocks: its insides are kept with `remat=True`, and recomputed layer by layer else."""
    found = [times_computed(make_lm(2, remat=remat, blocks_per_step=BLOCKS)) for remat in (False, True, "layers")]
    assert found == [1, 1, 2]


def test_remat_is_one_of_three():
    with pytest.raises(ValueError, match='"layers"'):
        make_lm(remat="layer")


def test_truncated_back_propagation():
    """Gradients are those of chunks of 2 steps whose states are detached between them, for the rest as well."""
    lm = make_lm(blocks_per_step=1, backpropagation_steps=2, remat=True)

    def in_chunks(lm):
        state, outputs = lm.get_initial_state(2), []
        for first in range(0, BLOCKS * S, 2 * S):
            state = keras.tree.map_structure(ops.stop_gradient, state) if first else state
            part, state = lm.advance(TOKENS[:, first : first + 2 * S], state, aligned=True)
            outputs.append(part)
        return ops.concatenate(outputs, axis=1)

    found = gradients_of(lm, whole)
    agree(found, gradients_of(lm, in_chunks), lm)
    assert max(relative(a, b) for a, b in zip(found, plain_gradients(), strict=True)) > 1e-2
    again = type(lm).from_config(lm.get_config()).backbone
    assert (again.backpropagation_steps, again.blocks_per_step, again.remat) == (2, 1, True)


def test_truncation_needs_whole_blocks():
    lm = make_lm(blocks_per_step=2, backpropagation_steps=1)
    with pytest.raises(ValueError, match="whole blocks"):
        lm(TOKENS, initial_state=lm.get_initial_state(2), training=True)
    with pytest.raises(ValueError, match="`backpropagation_steps`"):
        make_lm(backpropagation_steps=0)


@pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="a choice of JAX's compiler: torch's loop is Python's, TensorFlow's `while_loop` is never written out",
)
def test_a_scan_that_is_written_out(monkeypatch):
    """Few large steps compile without a loop where that is allowed, to the same numbers."""
    import jax

    from keras_fam.ops import scan as module

    xs = {"x": np.random.default_rng(0).normal(size=(module.UNROLL_STEPS, 3)).astype("float32")}

    def compile_it(unroll):
        def run(carry, xs):
            return module.scan(lambda carry, x: (carry * 0.5 + x["x"], (carry,)), carry, xs, (carry,), unroll=unroll)

        lowered = jax.jit(run).lower(np.ones(3, "float32"), xs)
        return "while" in lowered.as_text(), lowered.compile()(np.ones(3, "float32"), xs)

    small_has_loop, expected = compile_it(True)
    monkeypatch.setattr(module, "LARGE_STEP", 1)
    (has_loop, found), (rematerialised_has_loop, _) = compile_it(True), compile_it(False)
    assert small_has_loop and not has_loop and rematerialised_has_loop
    for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-6
