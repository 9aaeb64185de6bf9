"""A feed-forward part that is any Keras layer: made from configs, checked, and told how to be made again."""

import keras


def get(identifier, dtype):
    """The layer of one block: None, the layer itself, or one made from a config.

    Args:
        identifier: None, a Keras layer, or a config of `serialize`.
        dtype: dtype policy of the block; a config without a dtype takes it.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(identifier, dict) and isinstance(identifier.get("config"), dict):
        config = {"dtype": keras.dtype_policies.serialize(dtype), **identifier["config"]}
        return keras.saving.deserialize_keras_object({**identifier, "config": config})
    if identifier is None or isinstance(identifier, keras.Layer):
        return identifier
    raise ValueError(
        "`feed_forward` must be None, a Keras layer such as keras_fam.MixtureOfExperts(8, 64), or what "
        f"keras.saving.serialize_keras_object says of one; received {identifier!r}."
    )


def serialize(layer, dtype, name=None):
    """The config of a layer without its weights.

    Args:
        layer: None, a Keras layer, or a config, as `get` takes it.
        dtype: dtype policy of the block; a layer of the same has no dtype in its config, so that it follows the block.
        name: None, or the name of the layers that are made from the config.
    """
    if layer is None:
        return None
    record = layer if isinstance(layer, dict) else keras.saving.serialize_keras_object(get(layer, dtype))
    record = {key: value for key, value in record.items() if key not in ("build_config", "compile_config")}
    record["config"] = dict(record["config"])
    if not isinstance(layer, dict) and layer.dtype_policy == dtype:
        record["config"].pop("dtype", None)
    if name is not None:
        record["config"]["name"] = name
    return record


def build(layer, hidden_dim):
    """Builds the layer for rows of width D, if it is not built.

    Raises:
        ValueError: if it does not keep the shape of its input, or has a state that calls change: rows of tokens and of
            memory pass in any order and number, some of them within compiled loops.
    """
    if not layer.built:
        layer.build((None, None, hidden_dim))
    given = keras.KerasTensor((2, 3, hidden_dim), layer.compute_dtype)
    found = layer.compute_output_spec(given)
    if getattr(found, "shape", None) != given.shape:
        raise ValueError(
            f"`feed_forward` must return one tensor of its input's shape, [batch, rows, {hidden_dim}]; of "
            f"{given.shape}, {layer.name} makes {keras.tree.map_structure(lambda x: tuple(x.shape), found)}. End it "
            f"with a layer of {hidden_dim} units."
        )
    for part in layer._flatten_layers():
        if part._seed_generators or (part._non_trainable_variables and part.quantization_mode is None):
            raise ValueError(
                "`feed_forward` must act on each row by itself and have no state that calls change; "
                f"{part.name} ({type(part).__name__}) in {layer.name} draws random numbers or keeps statistics. Use "
                "the `dropout` of the block, and norms without statistics such as RMSNormalization."
            )
