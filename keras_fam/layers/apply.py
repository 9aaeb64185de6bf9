"""Calling sublayers at little cost."""

import math

import keras
from keras import ops


def cast(x, dtype):
    """`ops.cast` that costs nothing where there is nothing to do."""
    return x if keras.backend.standardize_dtype(x.dtype) == dtype else ops.cast(x, dtype)


def is_plain(layer):
    """Whether `layer` may be computed from its weights: it is not quantized and computes in their dtype."""
    return layer.quantization_mode is None and layer.compute_dtype == layer.variable_dtype


def run(layer, x):
    """`layer(x)`, without what `Layer.__call__` does around a plain layer.

    A scan step calls a dozen small layers, and on torch that wrapping costs more than their arithmetic. A layer that
    is quantized or computes in another dtype than its weights' is called in full.
    """
    return layer.call(cast(x, layer.compute_dtype)) if is_plain(layer) else layer(x)


def run_rows(layer, x, axes=1):
    """Runs an `EinsumDense` of rows on `[B, T, *features]`, where the features are the last `axes` axes.

    All rows go through as one matrix: gradients of a kernel contract over two axes else, which is twice as slow.
    """
    shape = ops.shape(x)
    lead, features = shape[:-axes], shape[-axes:]
    if not is_plain(layer):
        y = layer(ops.reshape(x, (-1, *features)))
        return ops.reshape(y, (*lead, *ops.shape(y)[1:]))
    kernel, bias = ops.convert_to_tensor(layer.kernel), layer.bias
    out = kernel.shape[axes:]
    width = math.prod(features)
    rows = ops.reshape(cast(x, layer.compute_dtype), (-1, width))
    y = ops.reshape(ops.matmul(rows, ops.reshape(kernel, (width, -1))), (*lead, *out))
    return y if bias is None else y + bias
