"""Grouped-query attention: one function for tokens and memory, fused where the backend has it.

Shapes: Q query rows, W keys, N query heads, K key/value heads, G = N // K, H head width.
"""

import contextlib

import keras
from keras import ops

from keras_fam.ops.backend import is_eager, platform, remat
from keras_fam.ops.key_bias import KeyBias, sink_as_key
from keras_fam.ops.scan import scan

# Bytes of softmax weights (float32). On a CPU, more than WHOLE_BYTES are computed in steps of about STEP_BYTES, which
# stay in the cache: for 8k tokens of width 512 (S 256, m 1) that takes half the time (JAX, one core).
WHOLE_BYTES, STEP_BYTES = 1 << 23, 1 << 20

_records = []  # lists that `record_attention` has opened


@contextlib.contextmanager
def record_attention():
    """Collects what every `attend` inside weighs, for plots: a list of `[A, Q, N, W]` tensors, in the order of calls.

    The weights are the attention's own outputs for values that are one-hot, so nothing is computed in a second way.
    Outside of compiled programs only, and not for the few tokens of `attend_slots`: hand in whole blocks.
    """
    _records.append([])
    try:
        yield _records[-1]
    finally:
        _records.pop()


def is_recording():
    """Whether `record_attention` collects weights now."""
    return bool(_records)


def attend(query, key, value, mask=None, softcap=None, visible=None, bias=None, sink=None):
    """Softmax attention of `query` over `key` and `value`.

    On JAX and TensorFlow on a CPU, many rows and heads are computed a few at a time, and again in the backward pass,
    so that memory for softmax weights is bounded by `STEP_BYTES` (and by one head of one row).

    Args:
        query: `[A, Q, N, H]`, already scaled.
        key: `[A, W, K, H]`, N a multiple of K.
        value: `[A, W, K, H]`.
        mask: None, or bool, broadcastable to `[A, Q, W]`; True where a query sees a key. Every query must see one.
        softcap: None, or c: logits become `c·tanh(logits / c)` before the mask (Gemma 2).
        visible: None, or bool `[A, W]`: keys that no query of the row sees are False.
        bias: None, or a `KeyBias` over the W keys, added after the soft cap.
        sink: None, or `[N]`, a logit per query head that is one more term of the softmax's sum, without a value.

    Returns:
        `[A, Q, N, H]` in the dtype of `value`. The softmax is taken in float32 or wider.
    """
    if is_recording():
        _record(query, key, value, mask, softcap, visible, bias, sink)
    if softcap is None and fused_attention_exists(query.dtype):
        biases = [] if bias is None else [bias]
        if sink is not None:
            key, value, mask, visible, last = sink_as_key(sink, key, value, mask, visible)
            biases = [*(other.before(1) for other in biases), last]
        width = value.shape[-1]
        for other in biases:
            query, key, value = other.as_features(query, key, value)
        out = _attend_fused(query, key, value, mask, visible)
        return out[..., :width] if biases else out
    # Heads first, and all queries of a key/value head in one matrix: plain batched products are the fastest everywhere.
    kv_heads, count, width = key.shape[-2], ops.shape(query)[1], value.shape[-1]
    groups = query.shape[-2] // kv_heads
    step = _step_size(query, key, mask)
    query = ops.transpose(split_heads(query, kv_heads), (0, 2, 3, 1, 4))
    query = ops.reshape(query, (-1, kv_heads, groups * count, query.shape[-1]))
    key, value = ops.transpose(key, (0, 2, 3, 1)), ops.transpose(value, (0, 2, 1, 3))
    if step is None:
        out = _attend_heads(query, key, value, mask, visible, softcap, groups, bias, sink)
    else:
        out = _attend_in_steps(query, key, value, mask, visible, softcap, groups, bias, sink, *step)
    out = ops.reshape(out, (-1, kv_heads, groups, count, width))
    return merge_heads(ops.transpose(out, (0, 3, 1, 2, 4)))


def _attend_heads(query, key, value, mask, visible, softcap, groups, bias, sink):
    """`[A, K, G·Q, H]` over `[A, K, H, W]` and `[A, K, W, H]`, to `[A, K, G·Q, H]`."""
    logits = softmax_ready(ops.matmul(query, key), softcap)
    if bias is not None:
        shape = ops.shape(logits)
        logits = ops.reshape(logits, (*shape[:2], groups, shape[2] // groups, shape[3]))
        logits = ops.reshape(logits + bias.on_logits(query.shape[1], logits.dtype), shape)
    if mask is not None or visible is not None:
        if mask is None or visible is None:
            mask = ops.expand_dims(visible, 1) if mask is None else mask
        else:
            mask = ops.logical_and(mask, ops.expand_dims(visible, 1))
        shape = ops.shape(logits)
        logits = ops.reshape(logits, (*shape[:2], groups, shape[2] // groups, shape[3]))
        logits = masked(logits, ops.expand_dims(ops.expand_dims(mask, -3), -3))
        logits = ops.reshape(logits, shape)
    # The division comes last: it is then over H numbers a query instead of over W.
    most = ops.max(logits, axis=-1, keepdims=True)
    if sink is not None:  # [K, G·Q, 1]
        sink = ops.reshape(ops.cast(sink, logits.dtype), (query.shape[1], groups, 1))
        sink = ops.repeat(sink, query.shape[2] // groups, axis=1)
        most = ops.maximum(most, sink)
    most = ops.stop_gradient(most)
    weights = ops.exp(logits - most)
    total = ops.sum(weights, axis=-1, keepdims=True)
    total = total if sink is None else total + ops.exp(sink - most)
    out = ops.matmul(ops.cast(weights, value.dtype), value)
    return ops.cast(ops.cast(out, total.dtype) / total, value.dtype)


def _record(query, key, value, mask, softcap, visible, bias, sink):
    """Adds the weights of one call to the innermost list: the outputs for one-hot values."""
    open_lists, _records[:] = list(_records), []
    try:
        count = key.shape[1]
        one_hot = ops.broadcast_to(ops.eye(count, dtype=value.dtype)[None, :, None], (*key.shape[:3], count))
        open_lists[-1].append(attend(query, key, one_hot, mask, softcap, visible, bias, sink))
    finally:
        _records[:] = open_lists


def _step_size(query, key, mask):
    """`(rows, heads)` that are attended to at once, divisors of A and K; None for all of them."""
    rows, count, keys, kv_heads = query.shape[0], query.shape[1], key.shape[1], key.shape[2]
    if not all(isinstance(n, int) for n in (rows, count, keys)):
        return None  # known at run time only, or a symbol of an export
    if is_eager(query) or platform() != "cpu":
        return None  # an accelerator wants much at once; outside of `jit` every step would be a program of its own
    if mask is not None and len(mask.shape) > 2 and mask.shape[0] != 1:
        return None
    head = 4 * count * keys * (query.shape[2] // kv_heads)
    if rows * kv_heads * head <= WHOLE_BYTES:
        return None
    fitting = max(1, STEP_BYTES // head)
    if fitting < kv_heads:
        return 1, max(k for k in range(1, fitting + 1) if kv_heads % k == 0)
    return max(a for a in range(1, fitting // kv_heads + 1) if rows % a == 0), kv_heads


def _attend_in_steps(query, key, value, mask, visible, softcap, groups, bias, sink, rows, heads):
    """`_attend_heads`, `rows` rows and `heads` heads at a time."""
    split = key.shape[1] // heads

    def parts(x):
        return ops.reshape(x, (-1, rows, heads, *x.shape[2:]))

    xs = {"query": parts(query), "key": parts(key), "value": parts(value)}
    if visible is not None:
        xs["visible"] = ops.reshape(ops.repeat(visible, split, axis=0), (-1, rows, visible.shape[1]))
    for name, head in (("bias", None if bias is None else bias.head), ("sink", sink)):
        if head is not None:
            head = ops.reshape(head, (split, heads, groups))
            xs[name] = ops.tile(head, (xs["query"].shape[0] // split, 1, 1))

    def compute(x):
        own = None if bias is None else KeyBias(x["bias"], bias.keys)
        return _attend_heads(
            x["query"], x["key"], x["value"], mask, x.get("visible"), softcap, groups, own, x.get("sink")
        )

    again = remat(compute, [])
    _, (out,) = scan(lambda carry, x: (carry, (again(x),)), (), xs, (xs["query"][0],))
    return ops.reshape(out, (*query.shape[:-1], value.shape[-1]))


def fused_attention_exists(dtype):
    """Whether the backend has attention as one kernel on this device, for any mask and numbers of this kind."""
    backend = keras.backend.backend()
    # Not on TPU: there Keras' kernel reads the mask of the first row for all rows. On a GPU, JAX' kernel takes numbers
    # of 16 bits; for others it has none, and would compute the softmax of float64 logits in float32.
    short = keras.backend.standardize_dtype(dtype) in ("bfloat16", "float16")
    return backend == "torch" or (backend == "jax" and platform() == "gpu" and short)


def _attend_fused(query, key, value, mask, visible):
    """torch's `scaled_dot_product_attention`; on JAX what Keras finds for the GPU: cuDNN's kernel, unless
    `keras.config.disable_flash_attention()` was called in this thread, or XLA."""
    if visible is not None:
        visible = ops.expand_dims(visible, 1)
        mask = visible if mask is None else ops.logical_and(mask, visible)
    if mask is not None:
        mask = ops.expand_dims(mask, -3)
    if keras.backend.backend() != "torch":
        flash = False if keras.config.is_flash_attention_enabled() is False else None
        return ops.dot_product_attention(query, key, value, mask=mask, scale=1.0, flash_attention=flash)
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=1.0, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2)


def split_heads(x, kv_heads):
    """`[..., N, H]` to `[..., K, G, H]`: query head n reads key/value head n // G."""
    shape = ops.shape(x)
    return ops.reshape(x, (*shape[:-2], kv_heads, x.shape[-2] // kv_heads, x.shape[-1]))


def merge_heads(x):
    """`[..., K, G, H]` to `[..., N, H]`."""
    shape = ops.shape(x)
    return ops.reshape(x, (*shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1]))


def softmax_ready(logits, softcap=None):
    """Logits in float32 (or wider), soft-capped if asked."""
    logits = ops.cast(logits, keras.backend.result_type(logits.dtype, "float32"))
    return logits if softcap is None else softcap * ops.tanh(logits / softcap)


def masked(logits, mask):
    """Logits with what must not be seen pushed to a large negative number; finite, so no row can become NaN."""
    return ops.where(mask, logits, ops.cast(-1e30, logits.dtype))
