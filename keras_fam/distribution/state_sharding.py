"""Laying streams out over devices. Without a `keras.distribution` in force, nothing here does anything.

Weights follow the distribution by themselves; a state is no weight, so its tensors are laid out here: rows over the
batch axis, and what else the layout map says of `state/<field>`.
"""

import keras

from keras_fam.state import is_spec


def fitted(layout, shape):
    """`layout` without the axes that do not divide the tensor: one row on eight devices lies whole on each."""
    mesh = layout.device_mesh
    sizes = dict(zip(mesh.axis_names, mesh.shape, strict=True))
    axes = (None if axis is None or size % sizes[axis] else axis for axis, size in zip(layout.axes, shape, strict=True))
    return keras.distribution.TensorLayout(tuple(axes), mesh)


def weights_are_divided():
    """Whether weights may lie in parts on several devices: joining such parts would move them about."""
    return isinstance(keras.distribution.distribution(), keras.distribution.ModelParallel)


def state_layout(field, shape):
    """`TensorLayout` of a tensor of a state, for the current distribution; None without one.

    Args:
        field: its name in `StreamPosition` or `LayerState`; the layout map is asked for `"state/<field>"`,
            and if it says
            nothing, rows lie along the batch axis.
        shape: its shape.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    layout = distribution.get_tensor_layout(f"state/{field}") or distribution.get_data_layout(shape)
    return fitted(layout, shape)


def shard_state(state):
    """A `StreamState`, `LayerState` or `StreamPosition` laid out as the current distribution says."""
    if keras.distribution.distribution() is None:
        return state

    def place(field, x):
        if isinstance(x, keras.KerasTensor):
            return x
        return keras.distribution.distribute_tensor(x, state_layout(field, tuple(x.shape)))

    return map_fields(place, state)


def shard_output(x, layer):
    """What `layer` gives to the next one, laid out as the layout map says of `"<path of the layer>/output"`."""
    distribution = keras.distribution.distribution()
    layout = None if distribution is None else distribution.get_tensor_layout(f"{layer.path}/output")
    if layout is None or isinstance(x, keras.KerasTensor):
        return x
    return keras.distribution.distribute_tensor(x, fitted(layout, tuple(x.shape)))


def map_fields(function, structure, field=""):
    """`function(field, leaf)` over a state or its spec, where `field` is the name of the named tuple's entry."""
    if is_spec(structure) or not isinstance(structure, tuple):
        return function(field, structure)
    fields = getattr(structure, "_fields", None)
    if fields is None:
        return tuple(map_fields(function, part, field) for part in structure)
    return type(structure)(*(map_fields(function, part, f) for f, part in zip(fields, structure, strict=True)))


def state_variables(spec, add_weight=None):
    """Variables of zeros for the tensors of a state, in `keras.tree` order: laid out like them, not trained, not cast.

    Args:
        spec: `StreamState` of `Spec`s.
        add_weight: the method of the layer that owns them; it takes no layout, so with a distribution in force the
            variables are made without it, and the layer tracks them as an attribute.
    """
    variables = []

    def make(field, spec):
        layout = state_layout(field, spec.shape)
        name = f"state_{len(variables)}_{field}"  # `.h5` files need names that differ
        options = {"shape": spec.shape, "dtype": spec.dtype, "trainable": False, "autocast": False, "name": name}
        if layout is not None:
            options["layout"] = layout
        variables.append(
            (keras.Variable if layout is not None or add_weight is None else add_weight)(initializer="zeros", **options)
        )

    map_fields(make, spec)
    return variables
