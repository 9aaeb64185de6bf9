"""What Keras has to know about models that read token ids: the input's shape and dtype, for `summary` and `export`."""

import keras


class TokenInputsMixin:
    """`build()` without a shape stands for int32 token ids `[batch, tokens]` of any size."""

    def _post_build(self):  # Keras has noted the arguments of `build` by now
        if not any(self._build_shapes_dict.values()):
            self._build_shapes_dict = {"input_shape": (None, None)}
        super()._post_build()

    def export(self, filepath, format="tf_saved_model", verbose=None, input_signature=None, **kwargs):
        """As `keras.Model.export`. Without an `input_signature`, inputs are int32 token ids `[batch, tokens]`, or the
        dict of ids and bool padding mask that the model was first called with."""
        if input_signature is None and self.built:
            input_signature = [_signature(self._build_shapes_dict["input_shape"])]
        super().export(filepath, format=format, verbose=verbose, input_signature=input_signature, **kwargs)


def _signature(shape):
    if isinstance(shape, dict):
        return {name: _spec(part, "bool" if name == "padding_mask" else "int32") for name, part in shape.items()}
    return _spec(shape, "int32")


def _spec(shape, dtype):
    return keras.InputSpec(shape=(None, *shape[1:]), dtype=dtype)
