"""One attention function, several ways of computing it: all at once, a few rows and heads at a time, fused."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_fam.ops import attention, masks
from keras_fam.ops.backend import compiled, value_and_gradient
from keras_fam.ops.key_bias import FEATURES, KeyBias

BACKEND = keras.backend.backend()
ROWS, QUERIES, KEYS, HEADS, WIDTH = 6, 3, 5, 4, 2
HEAD_BYTES = 4 * QUERIES * KEYS  # softmax weights of one head of one row


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_a_kernel_takes_on_a_gpu(monkeypatch, dtype):
    """JAX' takes numbers of 16 bits; others keep a softmax in their own precision, which it would not."""
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    expected = {"torch": True, "jax": dtype in ("float16", "bfloat16"), "tensorflow": False}
    assert attention.fused_attention_exists(dtype) == expected[BACKEND]


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("segments", [0, 1, 3])
def test_one_rule_of_visibility(segments, window):
    """Every pair of positions, one after the other: the same block or one of the m before, no later token, the window;
    for arrays and for tensors."""
    size, count = 3, 15
    expected = np.zeros((count, count), bool)
    for query in range(count):
        for key in range(query + 1):
            near = window is None or query - key < window
            expected[query, key] = query // size - key // size <= segments and near
    position = np.arange(count, dtype="int32")
    rule = {"block_size": size, "memory_segments": segments, "attention_window": window}
    np.testing.assert_array_equal(masks.visible(position[:, None], position, **rule), expected)
    tensor = ops.convert_to_tensor(position)
    seen = masks.visible(ops.expand_dims(tensor - 6, 1), tensor - 6, **rule)  # counted from another block
    np.testing.assert_array_equal(ops.convert_to_numpy(seen), expected)
    exists = masks.exists(tensor - 6, ops.convert_to_tensor(1, "int32"), size)
    np.testing.assert_array_equal(ops.convert_to_numpy(exists), position >= 3)


def result(monkeypatch, kv_heads, softcap, biased=False, sunk=False, *, step_bytes, fused):
    """Outputs, and the gradient of their weighted sum with respect to queries, keys, values and a bias per head, of
    some keys, of a sink, or of both."""
    monkeypatch.setattr(attention, "STEP_BYTES", step_bytes)
    monkeypatch.setattr(attention, "WHOLE_BYTES", step_bytes)
    monkeypatch.setattr(attention, "fused_attention_exists", lambda dtype: fused)
    rng = np.random.default_rng(0)
    shapes = [(ROWS, QUERIES, HEADS, WIDTH), (ROWS, KEYS, kv_heads, WIDTH), (ROWS, KEYS, kv_heads, WIDTH), (HEADS,)]
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    packed = ops.convert_to_tensor(rng.normal(size=ends[-1]).astype("float32"))
    weights = ops.convert_to_tensor(rng.normal(size=shapes[0]).astype("float32"))
    mask = np.tril(np.ones((QUERIES, KEYS), bool), KEYS - QUERIES)[None]
    visible = rng.uniform(size=(ROWS, KEYS)) < 0.6
    visible[:, 0] = True

    def attend(packed):
        parts = (packed[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True))
        query, key, value, head = (ops.reshape(x, s) for x, s in zip(parts, shapes, strict=True))
        seen = ops.convert_to_tensor(visible)
        bias = KeyBias(head, np.array([False, True, True, False, False])) if biased else None
        sink = head if sunk else None
        return attention.attend(query, key, value, ops.convert_to_tensor(mask), softcap, seen, bias, sink)

    def both(packed):
        return attend(packed), value_and_gradient(lambda x: ops.sum(attend(x) * weights), packed)[1]

    found = both(packed) if BACKEND == "torch" else compiled(both, list)(packed)
    return [ops.convert_to_numpy(x) for x in found]


WAYS = [(4, None, False, False), (2, None, True, True), (1, 2.0, True, False), (2, 2.0, False, True)]


@pytest.mark.parametrize("kv_heads, softcap, biased, sunk", WAYS)
def test_every_way_gives_the_same(monkeypatch, kv_heads, softcap, biased, sunk):
    options = (kv_heads, softcap, biased, sunk)
    expected = result(monkeypatch, *options, step_bytes=1 << 30, fused=False)
    assert np.abs(expected[1][-HEADS:]).max() > 0.01 if biased or sunk else not expected[1][-HEADS:].any()
    groups = HEADS // kv_heads
    ways = {  # one head; two heads, or two rows of one; three rows
        "head": {"step_bytes": 1, "fused": False},
        "heads": {"step_bytes": 2 * groups * HEAD_BYTES, "fused": False},
        "rows": {"step_bytes": 3 * HEADS * HEAD_BYTES, "fused": False},
    }
    if BACKEND != "tensorflow":
        ways["fused"] = {"step_bytes": 1, "fused": True}
    for name, way in ways.items():
        for ours, theirs in zip(result(monkeypatch, *options, **way), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=f"{BACKEND} {name}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_bias_as_features_keeps_its_bits(dtype):
    """What fused attention adds to the logits, and its gradient, in 16 bits too."""
    head = np.float32([-4.0123456, 0.7654321])
    keys = np.array([True, False, True])
    query, key = (ops.ones((1, count, heads, 2), dtype) for count, heads in ((1, 2), (3, 1)))

    def added(head):
        parts = KeyBias(head, keys).as_features(query, key, key)
        assert [x.shape[-1] for x in parts] == 3 * [2 + FEATURES]
        more = [ops.cast(x[..., 2:], "float32") for x in parts]
        assert not np.any(ops.convert_to_numpy(more[2]))
        return ops.einsum("qnf,wf->nw", more[0][0], more[1][0, :, 0])

    np.testing.assert_allclose(ops.convert_to_numpy(added(ops.convert_to_tensor(head))), head[:, None] * keys, 1e-6)
    gradient = value_and_gradient(lambda x: ops.sum(added(x)), ops.convert_to_tensor(head))[1]
    np.testing.assert_array_equal(ops.convert_to_numpy(gradient), [2.0, 2.0])


def test_steps_fit_the_bytes(monkeypatch):
    if BACKEND == "torch":
        pytest.skip("torch has a fused kernel")
    sizes = []

    def heads(query, *args):
        sizes.append(tuple(query.shape[:2]))
        return computed(query, *args)

    computed = attention._attend_heads
    monkeypatch.setattr(attention, "_attend_heads", heads)
    for step_bytes, expected in (
        (1, (1, 1)),
        (2 * HEAD_BYTES, (1, 2)),
        (3 * HEAD_BYTES, (1, 2)),
        (13 * HEAD_BYTES, (3, 4)),
        (24 * HEAD_BYTES, (6, 4)),
    ):
        sizes.clear()
        result(monkeypatch, 4, None, step_bytes=step_bytes, fused=False)
        assert set(sizes) == {expected}, f"{BACKEND}: {step_bytes} bytes"


@pytest.mark.skipif(BACKEND == "torch", reason="torch's own kernel is used")
@pytest.mark.parametrize("switch", [None, False])
def test_keras_switch_of_flash_attention_counts(monkeypatch, switch):
    monkeypatch.setattr(keras.config, "is_flash_attention_enabled", lambda: switch)
    asked = []

    def attend(query, key, value, flash_attention=None, **options):
        asked.append(flash_attention)
        return query

    monkeypatch.setattr(ops, "dot_product_attention", attend)
    monkeypatch.setattr(attention, "fused_attention_exists", lambda dtype: True)
    x = ops.ones((ROWS, QUERIES, HEADS, WIDTH))
    attention.attend(x, x, x)
    assert asked == [switch]
