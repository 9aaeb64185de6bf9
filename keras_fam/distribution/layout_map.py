"""Which axis of a weight lies along which axis of the devices: data and tensor parallelism (`keras.distribution`)."""

import keras

from keras_fam.models.configs import weight_shapes

# Weights by the end of their path, as `(axes, a weight of that kind)`. "model" divides heads, inner rows of the
# feed-forward part and the vocabulary; "batch" divides the width, so that a data-parallel group holds one copy of the
# weights in all and gathers each when it is used. Norms, output biases and memory rows are small and lie everywhere.
WEIGHTS = {
    r".*token_embedding/embeddings": (("model", "batch"), "token_embedding/embeddings"),
    r".*token_embedding/reverse_embeddings": (("batch", "model"), "token_embedding/reverse_embeddings"),
    r".*attention/query/kernel": (("batch", "model", None), "block_0/attention/query/kernel"),
    r".*attention/query/bias": (("model", None), "block_0/attention/query/bias"),
    r".*attention/(key|value)/kernel": (("batch", "model", None), "block_0/attention/key/kernel"),
    r".*attention/(key|value)/bias": (("model", None), "block_0/attention/key/bias"),
    r".*attention/output/kernel": (("model", None, "batch"), "block_0/attention/output/kernel"),
    r".*/(gate|up)/kernel": (("batch", "model"), "block_0/up/kernel"),
    r".*/(gate|up)/bias": (("model",), "block_0/up/bias"),
    r".*/down/kernel": (("model", "batch"), "block_0/down/kernel"),
    # Of a `MixtureOfExperts`: each expert is divided, as a plain feed-forward part is.
    r".*/feed_forward/(gate|up)_kernel": ((None, "batch", "model"), "block_0/feed_forward/up_kernel"),
    r".*/feed_forward/(gate|up)_bias": ((None, "model"), "block_0/feed_forward/up_bias"),
    r".*/feed_forward/down_kernel": ((None, "model", "batch"), "block_0/feed_forward/down_kernel"),
    r".*/feed_forward/shared_(gate|up)_kernel": (("batch", "model"), "block_0/feed_forward/shared_up_kernel"),
    r".*/feed_forward/shared_down_kernel": (("model", "batch"), "block_0/feed_forward/shared_down_kernel"),
}
# What lies between layers, and what a stream carries (`keras_fam.sharding`): rows over "batch", heads over "model".
TENSORS = {
    r".*block_\d+/output": ("batch", None, None),
    r"state/(key|value|fam_key|fam_value)": ("batch", None, "model", None),
}


def layout_map(device_mesh, settings=None, *, model_parallel_dim_name="model", data_parallel_dim_name="batch"):
    """The `keras.distribution.LayoutMap` of TransformerFAM models.

    ```python
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
    layouts = keras_fam.layout_map(mesh, keras_fam.model_config("paper_1b"))
    keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch"))
    lm = keras_fam.TransformerFAMCausalLM(keras_fam.TransformerFAMBackbone(**keras_fam.model_config("paper_1b")))
    ```

    Heads, feed-forward rows and vocabulary lie along the model axis (tensor parallelism), the width of each weight
    along the data axis (weights are gathered when they are used). The states of streams, stateful layers included,
    have their rows along the data axis and their heads along the model axis. Entries can be taken out (`del`) or put
    in before the model is made, as with any `LayoutMap`.

    Args:
        device_mesh: `keras.distribution.DeviceMesh`.
        settings: None, or the keywords of the `TransformerFAMBackbone`: axes of weights that the mesh does not divide
            then stay whole (the one key head of multi-query attention), where JAX would refuse them otherwise.
        model_parallel_dim_name: the mesh's axis for tensor parallelism.
        data_parallel_dim_name: the mesh's axis for data parallelism.

    Raises:
        ValueError: if `device_mesh` is none, or lacks an axis.
    """
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise ValueError(
            f"`device_mesh` is a keras.distribution.DeviceMesh; received {type(device_mesh).__name__}. Make one, for "
            'example DeviceMesh((2, 4), ("batch", "model")).'
        )
    names = {"model": model_parallel_dim_name, "batch": data_parallel_dim_name, None: None}
    missing = [name for name in (model_parallel_dim_name, data_parallel_dim_name) if name not in device_mesh.axis_names]
    if missing:
        raise ValueError(
            f"The axes named for model and data are axes of the mesh, which has {tuple(device_mesh.axis_names)}; "
            f"received {missing}. Name the mesh's axes, or give it one of size 1."
        )
    sizes = dict(zip(device_mesh.axis_names, device_mesh.shape, strict=True))
    shapes = {} if settings is None else weight_shapes(settings)
    layouts = keras.distribution.LayoutMap(device_mesh)
    for pattern, (axes, weight) in WEIGHTS.items():
        axes = tuple(names[axis] for axis in axes)
        if weight in shapes:
            divided = zip(axes, shapes[weight], strict=True)
            axes = tuple(None if axis is None or size % sizes[axis] else axis for axis, size in divided)
        layouts[pattern] = axes
    for pattern, axes in TENSORS.items():
        layouts[pattern] = tuple(names[axis] for axis in axes)
    return layouts
