"""What tokens read: those of whole blocks over their windows, and a few tokens over the slots of a state.

Axes: B rows, n blocks, S tokens of a block, m previous blocks, R rows beside tokens (attention sinks and memory),
N query heads, K key/value heads, G = N // K, H head width.
"""

import keras
import numpy as np
from keras import ops

from keras_fam.ops.attention import attend, is_recording, masked, merge_heads, softmax_ready, split_heads
from keras_fam.ops.attention_kernels import block_kernel
from keras_fam.ops.key_bias import KeyBias
from keras_fam.ops.rope import rotate


def attend_blocks(
    query,
    keys,
    values,
    memory_key,
    memory_value,
    mask,
    *,
    segments,
    back,
    visible=None,
    softcap=None,
    bias=None,
    sink=None,
    stop_gradient=False,
    sinks=0,
    whole_windows=False,
):
    """Tokens of whole blocks over their windows `[sinks, memories, m previous blocks, own block]`.

    Args:
        query: `[B, n, S, N, H]`, scaled and rotated by place in block.
        keys: `[B, m+n, S, K, H]`, rotated by place in block.
        values: `[B, m+n, S, K, H]`.
        memory_key: None or `[B, n, R, K, H]`, the rows that each block reads: attention sinks, then memories.
        memory_value: likewise.
        mask: bool `[S, R + (m+1)·S]`, the same for all blocks.
        segments: m.
        back: function from j to the rotation of a key that is read j blocks later (`BlockPositions.back`).
        visible: None, or bool `[1 or B, n, R + (m+1)·S]`: keys that exist for a block.
        softcap: see `attend`.
        bias: None, or a `KeyBias` over the R rows, the same for all memories.
        sink: see `attend`.
        stop_gradient: whether no gradient flows into the previous blocks' keys and values (M1_SG).
        sinks: how many of the rows are attention sinks.
        whole_windows: whether a token sees all rows and previous blocks that exist and no later token of its own block,
            and what exists begins anywhere in the order `[sinks, previous blocks, memories, own block]` and goes to its
            end: then the device's kernel for that, if it has one, computes the same without `mask` and `visible`.

    Returns:
        `[B, n, S, N, H]`.
    """
    num_blocks = ops.shape(query)[1]
    detach = ops.stop_gradient if stop_gradient else (lambda x: x)
    window = []  # pairs of keys and values, the oldest block first
    for j in range(segments, -1, -1):
        first = segments - j
        key, value = keys[:, first : first + num_blocks], values[:, first : first + num_blocks]
        window.append((detach(rotate(key, back(j))), detach(value)) if j else (key, value))

    def merge(x):
        return ops.reshape(x, (-1, *ops.shape(x)[2:]))

    rows = [] if memory_key is None else [(memory_key, memory_value)]
    if visible is not None:
        visible = merge(ops.broadcast_to(visible, (*ops.shape(query)[:2], visible.shape[2])))
    kernel = None
    if whole_windows and softcap is None and sink is None and not is_recording():
        kernel = block_kernel(query.dtype, query.shape[-1])
    if kernel is None:
        key, value = (merge(x) for x in _side_by_side([*rows, *window]))
        if bias is not None:
            bias = bias.before((segments + 1) * keys.shape[2])
        out = attend(merge(query), key, value, ops.expand_dims(mask, 0), softcap, visible, bias, sink)
        return ops.reshape(out, (-1, *ops.shape(query)[1:]))
    *previous, own = window
    kept = [tuple(x[:, :, :sinks] for x in pair) for pair in rows if sinks]
    memories = [tuple(x[:, :, sinks:] for x in pair) for pair in rows if pair[0].shape[2] > sinks]
    parts = [*kept, *previous, *memories, own]
    if kernel.own_block_first:
        parts = parts[::-1]
    query, (key, value) = merge(query), map(merge, _side_by_side(parts))
    width = value.shape[-1]
    if bias is not None:
        flags = [np.full(part[0].shape[2], any(part is memory for memory in memories)) for part in parts]
        query, key, value = KeyBias(bias.head, np.concatenate(flags)).as_features(query, key, value)
    exist = None if visible is None else ops.sum(ops.cast(visible, "int32"), axis=-1)
    out = kernel.attend(query, key, value, exist)[..., :width]
    return ops.reshape(out, (-1, num_blocks, *out.shape[1:]))


def _side_by_side(parts):
    """Pairs of keys and values `[B, n, *, K, H]` as one pair."""
    return parts[0] if len(parts) == 1 else tuple(ops.concatenate(x, axis=2) for x in zip(*parts, strict=True))


def attend_slots(
    query,
    keys,
    values,
    memory_key,
    memory_value,
    mask,
    *,
    segments,
    own,
    back,
    softcap=None,
    bias=None,
    sink=None,
    stop_gradient=False,
):
    """A few tokens at any place over the slots of a state: what `attend_blocks` computes, without filling a block.

    Each query is rotated once per block that it may read, so that stored keys stay as they are.

    Args:
        query: `[B, T, N, H]`, scaled and rotated by place in the row's first block (0 … S+T−1); without `back`,
            `[B, T, m+n, N, H]`, rotated for each block.
        keys: `[B, m+n, S, K, H]`, rotated by place in block.
        values: `[B, m+n, S, K, H]`.
        memory_key: None or `[B, n, P·F, K, H]`.
        memory_value: likewise.
        mask: bool `[B, T, n·P·F + (m+n)·S]`, memories first.
        segments: m.
        own: bool `[B, T, m+n]`, which block is a token's own; read for `stop_gradient` only.
        back: as in `attend_blocks`; takes an array of distances. Or None.
        softcap: see `attend`.
        bias: see `attend_blocks`.
        sink: see `attend`.
        stop_gradient: see `attend_blocks`.

    Returns:
        `[B, T, N, H]`.
    """
    num_blocks, block_size, kv_heads = keys.shape[1:4]
    if back is not None:
        query = rotate(ops.expand_dims(query, 2), back([j - segments for j in range(num_blocks)]))
        query = ops.broadcast_to(query, (*ops.shape(query)[:2], num_blocks, *query.shape[3:]))
    query = split_heads(query, kv_heads)

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

    logits = _products(query, ops.stop_gradient(keys) if stop_gradient else keys)
    if stop_gradient:  # adds 0, and the gradient of a token's own block alone
        delta = ops.einsum("btjkgh,bjskh->bkgtjs", query, keys - ops.stop_gradient(keys))
        logits = logits + delta * ops.cast(own[:, None, None, :, :, None], logits.dtype)
    parts = [per_block(logits)]
    if memory_key is not None:
        parts.insert(0, per_block(_products(query[:, :, segments:], memory_key)))
    logits = softmax_ready(ops.concatenate(parts, axis=-1), softcap)
    if bias is not None:
        bias = KeyBias(bias.head, np.tile(bias.keys, memory_key.shape[1])).before(num_blocks * block_size)
        logits = logits + bias.on_logits(kv_heads, logits.dtype)
    logits = masked(logits, mask[:, None, None])
    if sink is None:
        weights = ops.cast(ops.softmax(logits, axis=-1), values.dtype)
    else:
        sink = ops.reshape(ops.cast(sink, logits.dtype), (1, kv_heads, -1, 1, 1))
        sink = ops.broadcast_to(sink, (*ops.shape(logits)[:-1], 1))
        weights = ops.softmax(ops.concatenate([logits, sink], axis=-1), axis=-1)[..., :-1]
        weights = ops.cast(weights, values.dtype)
    if memory_key is None:
        return merge_heads(over_slots(weights, values))
    count, rows = memory_key.shape[1:3]
    out = over_slots(weights[..., count * rows :], values)
    weights = ops.reshape(weights[..., : count * rows], (*ops.shape(weights)[:4], count, rows))
    return merge_heads(out + ops.einsum("bkgtjf,bjfkh->btkgh", weights, memory_value))


def _products(query, keys):
    """`[B, T, J, K, G, H]` over `[B, J, S, K, H]` to `[B, K, G, T, J, S]`.

    For a batched product torch copies all keys, heads first, which takes ten times as long as the products of one
    query: few queries are multiplied as the keys lie. (XLA reads keys as they lie anyway.) Those of one token of one
    row are a matrix product with the keys of all blocks, of which those of each query's block are taken.
    """
    torch = keras.backend.backend() == "torch"
    if torch and query.shape[:2] == (1, 1):
        blocks, size, kv_heads, width = keys.shape[1:]
        rows = ops.reshape(ops.transpose(query[0, 0], (1, 0, 2, 3)), (kv_heads, -1, width))  # [K, J·G, H]
        found = ops.matmul(rows, ops.reshape(ops.transpose(keys[0], (2, 3, 0, 1)), (kv_heads, width, -1)))
        found = ops.reshape(found, (kv_heads, blocks, -1, blocks, size))
        found = found[:, 0] if blocks == 1 else ops.transpose(ops.diagonal(found, axis1=1, axis2=3), (0, 1, 3, 2))
        return ops.reshape(found, (1, kv_heads, -1, 1, blocks, size))
    on_cpu = torch and query.device.type == "cpu"
    if on_cpu and query.shape[1] * query.shape[4] <= 4 and query.dtype.itemsize >= 4:
        found = ops.sum(ops.expand_dims(query, 3) * keys[:, None, :, :, :, None], axis=-1)
        return ops.transpose(found, (0, 4, 5, 1, 2, 3))
    return ops.einsum("btjkgh,bjskh->bkgtjs", query, keys)
