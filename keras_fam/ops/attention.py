"""Grouped-query attention: one function for tokens and memory, fused where the backend has it.

Shapes: Q query rows, W keys, N query heads, K key/value heads, G = N // K, H head width.
"""

import contextlib

import keras
from keras import ops

from keras_fam.ops.positions import rotate

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


def attend(query, key, value, mask=None, softcap=None):
    """Softmax attention of `query` over `key` and `value`.

    Args:
        query: `[A, Q, N, H]`, already scaled.
        key: `[A, W, K, H]`, N a multiple of K.
        value: `[A, W, K, H]`.
        mask: None, or bool, broadcastable to `[A, Q, W]`; True where a query sees a key. Every query must see one.
        softcap: None, or c: logits become `c·tanh(logits / c)` before the mask (Gemma 2).

    Returns:
        `[A, Q, N, H]` in the dtype of `value`. The softmax is taken in float32 or wider.
    """
    if _records:
        _record(query, key, value, mask, softcap)
    if keras.backend.backend() == "torch" and softcap is None:
        return _attend_torch(query, key, value, mask)
    # Heads first, and all queries of a key/value head in one matrix: plain batched products are the fastest everywhere.
    kv_heads, count = key.shape[-2], ops.shape(query)[1]
    groups = query.shape[-2] // kv_heads
    query = ops.transpose(split_heads(query, kv_heads), (0, 2, 3, 1, 4))
    query = ops.reshape(query, (-1, kv_heads, groups * count, query.shape[-1]))
    key, value = ops.transpose(key, (0, 2, 3, 1)), ops.transpose(value, (0, 2, 1, 3))
    logits = softmax_ready(ops.matmul(query, key), softcap)
    if mask is not None:
        logits = ops.reshape(logits, (-1, kv_heads, groups, count, key.shape[-1]))
        logits = masked(logits, ops.expand_dims(ops.expand_dims(mask, -3), -3))
        logits = ops.reshape(logits, (-1, kv_heads, groups * count, key.shape[-1]))
    # The division comes last: it is then over H numbers a query instead of over W.
    weights = ops.exp(logits - ops.stop_gradient(ops.max(logits, axis=-1, keepdims=True)))
    total = ops.sum(weights, axis=-1, keepdims=True)
    out = ops.matmul(ops.cast(weights, value.dtype), value)
    out = ops.cast(ops.cast(out, total.dtype) / total, value.dtype)
    out = ops.reshape(out, (-1, kv_heads, groups, count, value.shape[-1]))
    return merge_heads(ops.transpose(out, (0, 3, 1, 2, 4)))


def _record(query, key, value, mask, softcap):
    """Adds the weights of one call to the innermost list: the outputs for one-hot values."""
    open_lists, _records[:] = list(_records), []
    try:
        count = key.shape[1]
        one_hot = ops.broadcast_to(ops.eye(count, dtype=value.dtype)[None, :, None], (*key.shape[:3], count))
        open_lists[-1].append(attend(query, key, one_hot, mask, softcap))
    finally:
        _records[:] = open_lists


def _attend_torch(query, key, value, mask):
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if mask is not None:
        mask = ops.expand_dims(mask, -3)
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


def attend_blocks(
    query, keys, values, memory_key, memory_value, mask, *, segments, back, softcap=None, stop_gradient=False
):
    """Tokens of whole blocks over their windows `[memories, m previous blocks, own block]`.

    Args:
        query: `[B, n, S, N, H]`, scaled and rotated by place in block.
        keys: `[B, m+n, S, K, H]`, rotated by place in block.
        values: `[B, m+n, S, K, H]`.
        memory_key: None or `[B, n, P·F, K, H]`, the memories that each block reads.
        memory_value: likewise.
        mask: bool, broadcastable to `[B, n, S, P·F + (m+1)·S]`.
        segments: m.
        back: function from j to the rotation of a key that is read j blocks later (`BlockPositions.back`).
        softcap: see `attend`.
        stop_gradient: whether no gradient flows into the previous blocks' keys and values (M1_SG).

    Returns:
        `[B, n, S, N, H]`.
    """
    num_blocks = ops.shape(query)[1]
    detach = ops.stop_gradient if stop_gradient else (lambda x: x)
    key_parts = [] if memory_key is None else [memory_key]
    value_parts = [] if memory_value is None else [memory_value]
    for j in range(segments, -1, -1):
        first = segments - j
        key, value = keys[:, first : first + num_blocks], values[:, first : first + num_blocks]
        key_parts.append(detach(rotate(key, back(j))) if j else key)
        value_parts.append(detach(value) if j else value)

    def merge(x):
        return ops.reshape(x, (-1, *ops.shape(x)[2:]))

    key = merge(ops.concatenate(key_parts, axis=2) if len(key_parts) > 1 else key_parts[0])
    value = merge(ops.concatenate(value_parts, axis=2) if len(value_parts) > 1 else value_parts[0])
    if mask.shape[0] == 1 and mask.shape[1] == 1:
        mask = mask[0]
    else:
        mask = merge(ops.broadcast_to(mask, (*ops.shape(query)[:2], *ops.shape(mask)[2:])))
    out = attend(merge(query), key, value, mask, softcap)
    return ops.reshape(out, ops.shape(query))


def attend_slots(
    query, keys, values, memory_key, memory_value, mask, *, segments, own, back, softcap=None, stop_gradient=False
):
    """A few tokens at any place over the slots of a state: what `attend_blocks` computes, without filling a block.

    Each query is rotated once per block that it may read, so that stored keys stay as they are.

    Args:
        query: `[B, T, N, H]`, scaled and rotated by place in the row's first block (0 … S+T−1).
        keys: `[B, m+n, S, K, H]`, rotated by place in block.
        values: `[B, m+n, S, K, H]`.
        memory_key: None or `[B, n, P·F, K, H]`.
        memory_value: likewise.
        mask: bool `[B, T, n·P·F + (m+n)·S]`, memories first.
        segments: m.
        own: bool `[B, T, m+n]`, which block is a token's own; read for `stop_gradient` only.
        back: as in `attend_blocks`; takes an array of distances.
        softcap: see `attend`.
        stop_gradient: see `attend_blocks`.

    Returns:
        `[B, T, N, H]`.
    """
    num_blocks, block_size, kv_heads = keys.shape[1:4]
    query = rotate(ops.expand_dims(query, 2), back([j - segments for j in range(num_blocks)]))
    query = split_heads(ops.broadcast_to(query, (*ops.shape(query)[:2], num_blocks, *query.shape[3:])), kv_heads)

    def per_block(x):  # [B, K, G, T, J, W] to [B, K, G, T, J·W]
        return ops.reshape(x, (*ops.shape(x)[:4], x.shape[4] * x.shape[5]))

    def over_slots(weights, values):
        weights = ops.reshape(weights, (*ops.shape(weights)[:4], num_blocks, block_size))
        if not stop_gradient:
            return ops.einsum("bkgtjs,bjskh->btkgh", weights, values)
        still = ops.stop_gradient(values)
        mine = weights * ops.cast(own[:, None, None, :, :, None], weights.dtype)
        return ops.einsum("bkgtjs,bjskh->btkgh", weights, still) + ops.einsum(
            "bkgtjs,bjskh->btkgh", mine, values - still
        )

    logits = ops.einsum("btjkgh,bjskh->bkgtjs", query, ops.stop_gradient(keys) if stop_gradient else keys)
    if stop_gradient:  # adds 0, and the gradient of a token's own block alone
        delta = ops.einsum("btjkgh,bjskh->bkgtjs", query, keys - ops.stop_gradient(keys))
        logits = logits + delta * ops.cast(own[:, None, None, :, :, None], logits.dtype)
    parts = [per_block(logits)]
    if memory_key is not None:
        parts.insert(0, per_block(ops.einsum("btjkgh,bjfkh->bkgtjf", query[:, :, segments:], memory_key)))
    logits = masked(softmax_ready(ops.concatenate(parts, axis=-1), softcap), mask[:, None, None])
    weights = ops.cast(ops.softmax(logits, axis=-1), values.dtype)
    if memory_key is None:
        return merge_heads(over_slots(weights, values))
    count, rows = memory_key.shape[1:3]
    out = over_slots(weights[..., count * rows :], values)
    weights = ops.reshape(weights[..., : count * rows], (*ops.shape(weights)[:4], count, rows))
    return merge_heads(out + ops.einsum("bkgtjf,bjfkh->btkgh", weights, memory_value))
