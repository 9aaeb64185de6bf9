"""Calling sublayers at little cost."""

from keras import ops


def run(layer, x):
    """`layer(x)`, without what `Layer.__call__` does around a plain layer.

    A scan step calls a dozen small layers, and on torch that wrapping costs more than their arithmetic. A layer that
    is quantized or computes in another dtype than its weights' is called in full.
    """
    if layer.quantization_mode is None and layer.compute_dtype == layer.variable_dtype:
        return layer.call(ops.cast(x, layer.compute_dtype))
    return layer(x)


def run_rows(layer, x, axes=1):
    """Runs a layer of rows on `[B, T, *features]`, where the features are the last `axes` axes.

    All rows go through as one matrix: gradients of a kernel contract over two axes else, which is twice as slow.
    """
    shape = ops.shape(x)
    y = run(layer, ops.reshape(x, (-1, *shape[-axes:])))
    return ops.reshape(y, (*shape[:-axes], *ops.shape(y)[1:]))
