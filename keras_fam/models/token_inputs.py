"""What backbone and language model share: token ids as inputs."""

import keras

from keras_fam.layers.recurrent import Recurrent
from keras_fam.ops.token_ids import check_ids_of


class TokenInputs(Recurrent):
    """A `Recurrent` model that reads token ids: int `[B, T]`, or a dict of `"token_ids"` and `"padding_mask"`.

    `build()` without a shape stands for int32 token ids `[batch, tokens]` of any size.
    """

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

    def check_inputs(self, inputs, padding_mask=None):
        if isinstance(inputs, dict):
            unknown = sorted(set(inputs) - {"token_ids", "padding_mask"})
            if unknown or "token_ids" not in inputs:
                raise ValueError(
                    f"Inputs of {self.name} must be token ids, or a dict of 'token_ids' and 'padding_mask'; received "
                    f"the keys {sorted(inputs)}."
                )
            padding_mask = inputs.get("padding_mask") if padding_mask is None else padding_mask
            inputs = inputs["token_ids"]
        if len(inputs.shape) != 2:
            raise ValueError(
                f"{self.name} reads token ids [batch, tokens]; received shape {tuple(inputs.shape)}. Add or drop axes."
            )
        if inputs.shape[1] == 0:
            raise ValueError(
                f"{self.name} reads at least one token (T ≥ 1); received shape {tuple(inputs.shape)}. Skip empty ones."
            )
        return inputs, padding_mask

    def check_values(self, x, lengths=None, padding_mask=None):
        check_ids_of(self, x, lengths, padding_mask=padding_mask)

    def compute_output_shape(self, input_shape, *args, **kwargs):
        shape = input_shape["token_ids"] if isinstance(input_shape, dict) else input_shape
        return (*shape, self.output_width)


def _signature(shape):
    if isinstance(shape, dict):
        return {name: _spec(part, "bool" if name == "padding_mask" else "int32") for name, part in shape.items()}
    return _spec(shape, "int32")


def _spec(shape, dtype):
    return keras.InputSpec(shape=(None, *shape[1:]), dtype=dtype)
