"""A learned number per query head on the logits of some keys, or of none, in attention of every kind."""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

# Features that a bias takes in fused attention: kernels want head widths in multiples of 8.
FEATURES = 8
CLOSED = -3e4  # a weight of 0 in every dtype, and a number of float16: 0 · −∞ would be NaN


class KeyBias(NamedTuple):
    """What is added to the logits of some keys, after the soft cap.

    Attributes:
        head: float32 or wider, `[N]`, a number per query head (or `[K, G]`, by key/value heads).
        keys: NumPy bool `[W]`, the keys that it is for.
    """

    head: Any
    keys: Any

    def before(self, count):
        """The same bias where `count` keys without one follow."""
        return self._replace(keys=np.concatenate([self.keys, np.zeros(count, bool)]))

    def on_logits(self, kv_heads, dtype):
        """`[K, G, 1, W]`, to be added to logits `[…, K, G, Q, W]`."""
        head = ops.cast(ops.maximum(ops.reshape(self.head, (kv_heads, -1, 1, 1)), CLOSED), dtype)
        return head * ops.convert_to_tensor(self.keys.astype("float32"), dtype)

    def as_features(self, query, key, value):
        """`(query, key, value)` with `FEATURES` more numbers per head, whose products add the bias to the logits.

        So it passes any fused kernel, gradients included. In 16 bits the bias is a sum of three numbers, which keeps 24
        of its bits.

        Args:
            query: `[A, Q, N, H]`.
            key: `[A, W, K, H]`.
            value: `[A, W, K, H]`; gets zeros.
        """
        parts, rest = [], ops.maximum(self.head, CLOSED)
        for _ in range(3 if keras.backend.standardize_dtype(query.dtype) in ("bfloat16", "float16") else 1):
            parts.append(ops.cast(rest, query.dtype))
            rest = rest - ops.stop_gradient(ops.cast(parts[-1], rest.dtype))
        keys = np.zeros((len(self.keys), 1, FEATURES), "float32")
        keys[self.keys, :, : len(parts)] = 1.0
        # Each part has the gradient of the whole: the first one passes it on.
        parts = [parts[0], *map(ops.stop_gradient, parts[1:])]
        parts += [ops.zeros_like(parts[0])] * (FEATURES - len(parts))
        head = ops.stack(parts, axis=-1)  # [N, FEATURES]

        def append(x, more):
            return ops.concatenate([x, ops.broadcast_to(more, (*ops.shape(x)[:3], FEATURES))], axis=-1)

        zeros = ops.zeros((1, 1, 1, FEATURES), value.dtype)
        return append(query, head), append(key, ops.convert_to_tensor(keys, key.dtype)), append(value, zeros)


def sink_as_key(sink, key, value, mask, visible):
    """A logit without a value (`softmax_sink`) as one more key, for fused attention.

    Args:
        sink: `[N]`, a logit per query head.
        key: `[A, W, K, H]`.
        value: `[A, W, K, H]`.
        mask: None, or bool `[…, Q, W]`.
        visible: None, or bool `[A, W]`.

    Returns:
        `(key, value, mask, visible, bias)` of W + 1 keys, the last one zeros that every query sees; `bias` is the
        `KeyBias` that makes the sink of its logit.
    """
    count = key.shape[1]
    key, value = (ops.pad(x, [[0, 0], [0, 1], [0, 0], [0, 0]]) for x in (key, value))
    mask, visible = (
        None if x is None else ops.concatenate([x, ops.ones((*ops.shape(x)[:-1], 1), "bool")], axis=-1)
        for x in (mask, visible)
    )
    return key, value, mask, visible, KeyBias(sink, np.arange(count + 1) == count)
