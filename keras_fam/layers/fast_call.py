"""Calling sublayers at little cost, LoRA updates included."""

import contextlib
import math
import threading

import keras
from keras import ops


def cast(x, dtype):
    """`ops.cast` that costs nothing where there is nothing to do."""
    return x if keras.backend.standardize_dtype(x.dtype) == dtype else ops.cast(x, dtype)


def is_plain(layer):
    """Whether `layer` may be computed from its weights: it is not quantized and computes in their dtype."""
    return layer.quantization_mode is None and layer.compute_dtype == layer.variable_dtype


_rows = threading.local()


@contextlib.contextmanager
def reading_tokens():
    """Inside, layers compute for tokens, on which the updates of `enable_lora(rows="memory")` do not act."""
    before, _rows.are_tokens = getattr(_rows, "are_tokens", False), True
    try:
        yield
    finally:
        _rows.are_tokens = before


def has_lora(layer):
    """Whether a LoRA update belongs to the kernel of `layer`."""
    return getattr(layer, "lora_enabled", False)


def is_for_memory(layer):
    """Whether the LoRA update of `layer` acts on memory rows alone."""
    return has_lora(layer) and getattr(layer, "_lora_rows", "all") == "memory"


def is_updated(layer):
    """Whether a LoRA update of `layer` acts on the rows that are computed now."""
    return has_lora(layer) and not (is_for_memory(layer) and getattr(_rows, "are_tokens", False))


def frozen_kernel(layer):
    """The kernel of a plain layer without its LoRA update, as a tensor."""
    return ops.convert_to_tensor(layer._kernel if has_lora(layer) else layer.kernel)


def lora_update(layer, rows):
    """What LoRA adds to the product of rows with a plain layer's kernel, `[R, in]` to `[R, *out]`.

    `layer.kernel` is the sum of kernel and update. Rows go past that sum here: it has the size of the kernel, and so
    have the gradients that pass through it, while the two factors are small.
    """
    a, b = (cast(ops.convert_to_tensor(x), layer.compute_dtype) for x in (layer.lora_kernel_a, layer.lora_kernel_b))
    rank = a.shape[-1]
    inner = ops.matmul(rows, ops.reshape(a, (rows.shape[-1], -1)))  # one set of `rank` numbers, or one per head
    outer = ops.matmul(ops.reshape(inner, (-1, rank)), b) * (layer.lora_alpha / layer.lora_rank)
    heads = inner.shape[-1] // rank
    return ops.reshape(outer, (-1, heads * b.shape[-1]))


def run(layer, x):
    """`layer(x)`, without what `Layer.__call__` does around a plain layer.

    A scan step calls a dozen small layers, and on torch that wrapping costs more than their arithmetic. A layer that
    is quantized or computes in another dtype than its weights' is called in full.
    """
    if not is_plain(layer):
        return layer(x)
    return call_dense(layer, x) if has_lora(layer) else layer.call(cast(x, layer.compute_dtype))


def call_dense(layer, x, axes=1):
    """Runs a `Dense` or an `EinsumDense` of rows on `[B, T, *features]`, where the features are the last `axes` axes.

    All rows go through as one matrix: gradients of a kernel contract over two axes else, which is twice as slow.
    """
    shape = ops.shape(x)
    lead, features = shape[:-axes], shape[-axes:]
    if not is_plain(layer):
        y = layer(ops.reshape(x, (-1, *features)))
        return ops.reshape(y, (-1, *lead[1:], *ops.shape(y)[1:]))
    kernel, bias = frozen_kernel(layer), layer.bias
    out = kernel.shape[axes:]
    width = math.prod(features)
    rows = ops.reshape(cast(x, layer.compute_dtype), (-1, width))
    y = ops.matmul(rows, ops.reshape(kernel, (width, -1)))
    y = ops.reshape(y + lora_update(layer, rows) if is_updated(layer) else y, (-1, *lead[1:], *out))
    return y if bias is None else y + bias
