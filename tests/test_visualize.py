"""Masks come from real layers and are those of Fig. 1; attention maps are probabilities of the real model."""

import keras
import numpy as np
import pytest
from keras import ops
from support import close, numpy, tiny
from test_evaluation import TOKENS

import keras_fam
from keras_fam.evaluation import visualize
from keras_fam.ops.attention import attend, record_attention

S, BLOCKS = 4, 3


# JAX compiles each operation for each shape of these eager layers: there, fewer cases are enough.
JAX = keras.backend.backend() == "jax"
SYSTEMS = {name: settings for name, settings in visualize.SYSTEMS.items() if not JAX or name[:3] in ("FAM", "Tra")}
MODELS = [None, keras_fam.baselines.FeedbackMemoryBackbone, keras_fam.baselines.RMTBackbone]


@pytest.fixture(scope="module")
def found():
    return visualize.masks(S, BLOCKS, SYSTEMS)


def between(name, found):
    seen, is_memory = found[name]
    return seen[np.ix_(~is_memory, ~is_memory)]


def test_masks_of_tokens(found):
    i, j = np.indices((S * BLOCKS, S * BLOCKS))
    expected = {
        "full attention": j <= i,
        "sliding window, w = S/2": (j <= i) & (j > i - S // 2),
        "Transformer-XL, w = S": (j <= i) & (j > i - S),
        "BSWA, m = 1": (j <= i) & (j // S >= i // S - 1),
        "FAM, m = 1": (j <= i) & (j // S >= i // S - 1),
    }
    assert set(expected) == set(visualize.SYSTEMS) >= set(found)
    for name in found:
        np.testing.assert_array_equal(between(name, found), expected[name], err_msg=name)


def test_masks_of_memory(found):
    """F = 1, order F_0, block 1, F_1, block 2, …: tokens see the memory before
    their block, F_τ sees F_τ−1 and block τ."""
    seen, is_memory = found["FAM, m = 1"]
    where = np.flatnonzero(is_memory)
    assert where.tolist() == [0, 5, 10, 15] and not seen[0].any()
    for block, row in enumerate(where[1:]):
        before = where[block]
        np.testing.assert_array_equal(np.flatnonzero(seen[row]), np.arange(before, row))  # F before, then its block
        for token in range(before + 1, row):
            np.testing.assert_array_equal(where[seen[token, where]], [before])


@pytest.mark.parametrize("backbone_class", MODELS[-1:] if JAX else MODELS)
def test_attention_maps(backbone_class):
    lm = tiny(2, backbone_class=backbone_class)
    maps = visualize.attention_maps(lm, TOKENS[:, :12])
    assert len(maps) == 2
    for layer in maps:
        assert layer["tokens"].shape == (3, 3, 4, 2, 3 + 8)
        assert layer["memory"].shape == (3, 3, 3, 2, 3 + 4 + 3 * (backbone_class is keras_fam.baselines.RMTBackbone))
        for weights in layer.values():
            np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert (maps[0]["tokens"][0, :, :, :, 3:7] == 0).all()  # there is no block before the first


def test_recording_changes_nothing():
    given = np.random.default_rng(0).normal(size=(3, 2, 4, 2, 8)).astype("float32")
    q, k, v = map(ops.convert_to_tensor, given)
    with record_attention() as records:
        recorded = attend(q, k, v)
    close(recorded, attend(q, k, v), 1e-7)
    (weights,) = records
    close(np.einsum("aqnw,awnh->aqnh", numpy(weights), given[2]), recorded, 1e-6)


def test_whole_blocks_only():
    with pytest.raises(ValueError, match="whole blocks of 4"):
        visualize.attention_maps(tiny(2), TOKENS[:, :7])


def test_plots(found, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    from keras_fam import memory_statistics

    lm = tiny(2)
    maps = visualize.attention_maps(lm, TOKENS[:, :8])
    figures = [
        visualize.plot_masks(S, BLOCKS, SYSTEMS),
        visualize.plot_attention_maps(maps, highlights={"key": [1, 2]}),
        visualize.plot_memory_statistics(memory_statistics(lm, TOKENS)),
    ]
    for i, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{i}.png", dpi=40)
        pyplot.close(figure)
    visualize.animate_attention(maps, tmp_path / "a.gif", words=["word"] * 8)
    assert (tmp_path / "a.gif").read_bytes()[:3] == b"GIF"
