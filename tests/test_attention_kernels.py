"""Kernels for whole blocks, which are told by a number what exists: the same outputs and gradients as with masks."""

import functools
import itertools

import keras
import numpy as np
import pytest
from keras import ops
from support import SPLIT, close

import keras_fam
from keras_fam.ops import attention_kernels, block_attention
from keras_fam.ops.attention import record_attention
from keras_fam.ops.backend import compiled, value_and_gradient

BACKEND = keras.backend.backend()
pytestmark = pytest.mark.skipif(
    BACKEND == "tensorflow", reason="no kernel is used with TensorFlow: XLA computes attention"
)

SETTINGS = {"vocabulary_size": 13, "num_layers": 1, "hidden_dim": 16, "num_query_heads": 2, "intermediate_dim": 16}
SETTINGS |= {"block_size": 4, "memory_segments": 2, "fam_length": 2}
VARIANTS = {
    "FAM": {"num_key_value_heads": 1},
    "BSWA, sinks": {"attention_sinks": 1, "fam_length": 0, "memory_segments": 1},
    "sinks, gate": {"attention_sinks": 3, "fam_gate": -0.5, "fam_query": "anchored", "memory_update": "hard_gate"},
    "summary, gate": {"initial_fam": "summary", "fam_gate": 0.7, "stop_memory_gradient": True},
    "closed": {"fam_gate": float("-inf"), "attention_sinks": 2, "memory_segments": 0},
}


def flash_attention(query, key, value, query_ends, key_ends, most_queries, most_keys):
    """What torch's kernel is documented to do, one sequence after the other; it runs on a GPU only."""
    import torch

    if query_ends is None:
        rows = [(query[i], key[i], value[i]) for i in range(len(query))]
    else:
        cuts = [list(itertools.pairwise(x)) for x in (query_ends.tolist(), key_ends.tolist())]
        assert max(b - a for a, b in cuts[0]) <= most_queries and max(b - a for a, b in cuts[1]) <= most_keys
        assert cuts[0][-1][1] == len(query) and cuts[1][-1][1] == len(key)
        rows = [(query[a:b], key[c:d], value[c:d]) for (a, b), (c, d) in zip(*cuts, strict=True)]
    found = []
    for q, k, v in rows:
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        if q.shape[1]:
            found.append(attend(q, k, v, attn_mask=mask, scale=1.0, enable_gqa=True).transpose(0, 1))
    return torch.stack(found) if query_ends is None else torch.cat(found)


@pytest.fixture
def kernels(monkeypatch):
    """Turns the kernels on, computed by what a CPU has; a list of the calls."""
    calls = []
    monkeypatch.setattr(attention_kernels, "flash_attention", flash_attention)

    def attend(query, key, value, exist):
        calls.append(exist is not None)
        if BACKEND == "torch":
            return attention_kernels.attend_by_lengths(query, key, value, exist)
        return attention_kernels.attend_by_counts(query, key, value, exist, implementation="xla")

    kernel = attention_kernels.Kernel(attend, own_block_first=BACKEND == "jax")
    monkeypatch.setattr(block_attention, "block_kernel", lambda dtype, width: kernel)
    return calls


def outputs(variant):
    """A whole text; and in pieces, the last one of which is ragged; and the gradient of the whole text's outputs."""
    keras.utils.set_random_seed(0)
    backbone = keras_fam.TransformerFAMBackbone(**{**SETTINGS, **VARIANTS[variant]})
    ids = np.random.default_rng(1).integers(0, 13, (3, 26)).astype("int32")
    backbone.build(ids.shape)
    weight = backbone.token_embedding.embeddings

    def whole(value):
        with keras.StatelessScope(state_mapping=[(weight, value)]):
            return ops.sum(ops.cos(backbone(ids)))

    def pieces():  # one that ends within a block; one that begins there, and of other lengths by row
        first, state = backbone.advance(ids[:, :11], backbone.get_initial_state(3))
        hidden, state = backbone.advance(ids[:, 11:24], state, lengths=np.array([13, 0, 5], "int32"))
        return [first, hidden[0], hidden[2, :5], *(part for part in state.layers[0] if len(part))]

    def all_of_it(value):
        return [*value_and_gradient(whole, value), *pieces()]

    run = all_of_it if BACKEND == "torch" else compiled(all_of_it, lambda: backbone.variables)
    return run(ops.convert_to_tensor(weight.value))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_kernel_gives_what_masks_give(kernels, monkeypatch, variant):
    found = outputs(variant)
    assert len(kernels) == 3
    with monkeypatch.context() as patch:
        patch.setattr(block_attention, "block_kernel", lambda dtype, width: None)
        count = len(kernels)
        expected = outputs(variant)
        assert len(kernels) == count
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs, SPLIT)


@pytest.mark.parametrize("changes", [{"attention_window": 5}, {"num_visible_memories": 2}, {"softmax_sink": True}])
def test_other_windows_keep_their_masks(kernels, changes):
    backbone = keras_fam.TransformerFAMBackbone(**SETTINGS, **changes)
    backbone(np.ones((1, 12), "int32"))
    assert not kernels


def test_recorded_attention_is_that_of_masks(kernels):
    backbone = keras_fam.TransformerFAMBackbone(**SETTINGS)
    with record_attention() as weights:
        backbone(np.ones((1, 12), "int32"))
    assert len(weights) and not kernels


@pytest.mark.parametrize("dtype, width", [("bfloat16", 64), ("float32", 64), ("float16", 60), ("bfloat16", 256)])
def test_which_numbers_a_kernel_takes(monkeypatch, dtype, width):
    has = {"torch": "_torch_has_flash_attention", "jax": "_jax_has_cudnn"}[BACKEND]
    monkeypatch.setattr(attention_kernels, has, lambda *args: True)
    assert attention_kernels.block_kernel(dtype, width) is None  # on this CPU
    monkeypatch.setattr(attention_kernels, "platform", lambda: "gpu")
    kernel = attention_kernels.block_kernel(dtype, width)
    assert (kernel is not None) == ((dtype, width) == ("bfloat16", 64))
    monkeypatch.setattr(keras.config, "is_flash_attention_enabled", lambda: False)
    assert attention_kernels.block_kernel(dtype, width) is None


@pytest.mark.skipif(BACKEND != "jax", reason="cuDNN's kernel is reached through JAX")
def test_a_refusal_is_said_once(monkeypatch):
    monkeypatch.setattr(attention_kernels, "_refused", {})
    with pytest.warns(UserWarning, match="cuDNN's attention is not used for heads of width 64"):
        assert not attention_kernels._jax_has_cudnn(64)
    assert not attention_kernels._jax_has_cudnn(64)
    monkeypatch.setattr(
        attention_kernels,
        "attend_by_counts",
        functools.partial(attention_kernels.attend_by_counts, implementation="xla"),
    )
    assert attention_kernels._jax_has_cudnn(32)
