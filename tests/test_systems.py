"""FM and RMT: each against a NumPy loop of its own, the contracts of a stream, and what the settings refuse.

JAX compiles each operation of an eager call for each shape, so whole calls are compiled here.
"""

import keras
import numpy as np
import pytest
import reference
import reference_systems
import support
from keras import ops
from support import ORACLE, SPLIT, close, float64, numpy, relative, states_close
from test_contracts import CONTRACTS
from test_model import TOKENS, D, V
from test_model import make as make_model

import keras_fam
from keras_fam.baselines import FeedbackMemoryBlock, RMTBackbone, SummaryFAMBackbone
from keras_fam.baselines.rmt import RMTBlock
from keras_fam.ops.backend import compiled

TORCH = keras.backend.backend() == "torch"
FM = {
    "fm": {"fam_length": 0},
    "fm_window": {"fam_length": 0, "memory_segments": 2, "attention_window": 5},
    "fm_with_memory": {},
    "fm_with_two_memories": {"num_visible_memories": 2, "use_post_norm": True, "memory_segments": 2},
}
RMT = {"rmt": {"memory_segments": 0}, "rmt_normalized_m1": {"memory_update": "normalized"}}


def read(model, x):
    """Outputs and final state of a whole sequence, by one compiled program."""
    return compiled(lambda x: model(x, return_state=True), lambda: model.variables)(ops.convert_to_tensor(x))


def fm_block(variant, dtype="float32", **changes):
    """A layer with feedback memory segments, and the oracle's `(weights, cfg, fam0)`."""
    given, weights, cfg, fam0 = support.make(**FM[variant], **changes, dtype=dtype)
    block = FeedbackMemoryBlock.from_config(given.get_config())
    block.build((None, None, support.HIDDEN_DIM))
    support.set_weights(block, weights, fam0)
    return block, weights, cfg, fam0


@pytest.mark.parametrize("variant", FM)
def test_fm_is_the_loop(variant):
    dtype = "float64"
    with float64():
        block, weights, cfg, fam0 = fm_block(variant, dtype)
        x = np.random.default_rng(1).normal(size=(2, 14, support.HIDDEN_DIM))
        y, state = read(block, x.astype(dtype))
        for b in range(2):
            expected, fam = reference_systems.fm_layer(x[b], weights, cfg, fam0)
            close(y[b], expected, ORACLE[dtype])
            if fam is not None:
                close(state.layers[0].fam[b], fam, ORACLE[dtype])
        if variant == "fm":  # and BSWA is something else, from the second block on
            bswa = reference.batch_layer(x, None, weights, cfg)[0]
            assert relative(y[:, :4], bswa[:, :4]) < ORACLE[dtype] and relative(y[:, 4:], bswa[:, 4:]) > 0.01


def test_fm_gradient_crosses_blocks():
    """Directional derivative of the loop against the backend's gradient, through outputs of earlier blocks."""
    with float64():
        block, weights, cfg, fam0 = fm_block("fm_with_memory", "float64")
        rng = np.random.default_rng(2)
        x, probe, direction = rng.normal(size=(3, 1, 10, support.HIDDEN_DIM))
        weight = ops.convert_to_tensor(probe, "float64")
        (found,) = support.gradients(lambda x: ops.sum(block(x) * weight), [x])
        expected = reference.gradient(
            lambda z: (reference_systems.fm_layer(z[0], weights, cfg, fam0)[0] * probe).sum(), x, direction
        )
        assert abs((found * direction).sum() - expected) < 1e-10 * np.abs(found).max() * np.sqrt(found.size)


@pytest.mark.parametrize("variant", RMT)
def test_rmt_is_the_loop(variant):
    """In float64: random weights make the path through all layers and blocks chaotic."""
    with float64():
        lm, weights, cfgs = make_model(backbone_class=RMTBackbone, dtype="float64", **RMT[variant])
        logits, state = read(lm, TOKENS)
        for b in range(2):
            expected, memory = reference_systems.rmt_model(TOKENS[b], weights, cfgs)
            close(logits[b], expected, ORACLE["float64"])
            close(state.layers[0].fam[b], memory, ORACLE["float64"])


def check_streaming(layer, x):
    """`keras_fam.check_streaming` on torch; where that takes many compilations, splits and lengths alone.

    Returns the outputs of the whole.
    """
    whole, last = read(layer, x)
    if TORCH:
        expected = CONTRACTS if hasattr(layer, "attention") else CONTRACTS - {"gradients"}
        assert set(keras_fam.check_streaming(layer)) == expected
        return whole
    advance = compiled(lambda x, state, n: layer.advance(x, state, lengths=n), lambda: layer.variables)
    one = compiled(lambda x, state: layer.advance(x, state), lambda: layer.variables)
    rows, state, outputs = len(x), layer.get_initial_state(len(x)), [[] for _ in x]
    place = np.zeros(rows, int)
    while (place < x.shape[1]).any():  # row 0 takes 3 tokens at a time, row 1 takes 1, so they part
        taken = np.minimum(np.array([3, 1]), x.shape[1] - place)
        chunk = np.stack([np.resize(x[b, place[b] : place[b] + 3], (3, *x.shape[2:])) for b in range(rows)])
        y, state = advance(chunk.astype(x.dtype), state, taken.astype("int32"))
        for b in range(rows):
            outputs[b] += list(numpy(y[b])[: taken[b]])
        place += taken
    close(np.array(outputs), whole, SPLIT)
    states_close(state, last, SPLIT)
    state, outputs = layer.get_initial_state(rows), []
    for t in range(x.shape[1]):
        y, state = one(x[:, t : t + 1], state)
        outputs.append(numpy(y))
    close(np.concatenate(outputs, axis=1), whole, SPLIT)
    states_close(state, last, SPLIT)
    return whole


def test_fm_streams():
    x = np.random.default_rng(0).normal(size=(2, 11, support.HIDDEN_DIM)).astype("float32")
    block, weights, cfg, fam0 = fm_block("fm_with_memory")
    whole = check_streaming(block, x)
    for b in range(2):
        expected = reference_systems.fm_layer(x[b].astype("float64"), weights, cfg, fam0)[0]
        close(whole[b], expected, ORACLE["float32"])


def test_rmt_streams():
    backbone = RMTBackbone(V, 2, D, **support.SMALL)
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.build()
    check_streaming(lm, TOKENS[:, :11])


def test_rmt_memory_goes_through_the_whole_stack():
    """What the top layer alone adds reaches the bottom layer's memory one block later; in FAM it never does."""
    for backbone_class in (keras_fam.TransformerFAMBackbone, RMTBackbone):
        lm, _, _ = make_model(backbone_class=backbone_class)
        memories, kernel = [], lm.backbone.blocks[-1].down.kernel
        program = compiled(lambda x, lm=lm: lm(x, return_state=True)[1].layers[0].fam, lambda lm=lm: lm.variables)
        for _ in range(2):
            memories.append(numpy(program(TOKENS[:, :4])))
            kernel.assign(kernel + 0.1)
        difference = np.abs(memories[1] - memories[0]).max()
        assert difference > 0.01 if backbone_class is RMTBackbone else difference == 0


def test_settings():
    with pytest.raises(ValueError, match="must be at least 1"):
        FeedbackMemoryBlock(2, 4, 8, memory_segments=0)
    with pytest.raises(ValueError, match="`initial_fam='prompt'`; received 'summary'"):
        make_model(backbone_class=RMTBackbone, initial_fam="summary")
    with pytest.raises(ValueError, match="leave `scan_layers` out"):
        make_model(backbone_class=RMTBackbone, scan_layers=True)


@keras.saving.register_keras_serializable(package="test_systems")
class BothBlock(RMTBlock, FeedbackMemoryBlock):
    """RMT whose memory segments hold outputs."""


@keras.saving.register_keras_serializable(package="test_systems")
class BothBackbone(RMTBackbone):
    block_class = BothBlock


@pytest.mark.parametrize("backbone_class", [BothBackbone, SummaryFAMBackbone])
def test_they_train_and_go_to_files(tmp_path, backbone_class):
    """With noise on what is fed back; RMT and FM at once, since each changes a part of the layer of its own."""
    lm = support.tiny(backbone_class=backbone_class, memory_update=keras_fam.Residual(noise=0.1))
    support.quick_compile(lm)
    tokens = TOKENS[:, :8]
    history = lm.fit(tokens, np.roll(tokens, -1, axis=1), epochs=4, verbose=0).history["loss"]
    assert history[-1] < history[0]
    lm.save(tmp_path / "lm.keras")
    loaded = keras.saving.load_model(tmp_path / "lm.keras", compile=False)
    assert type(loaded.backbone) is backbone_class
    assert loaded.backbone.get_config() == lm.backbone.get_config()
    for a, b in zip(loaded.weights, lm.weights, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b))
