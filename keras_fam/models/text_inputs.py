"""Strings in `fit`, `evaluate` and `predict`, by way of the model's preprocessor, as in KerasHub."""

import numpy as np
from keras import ops

from keras_fam.ops.token_ids import check_ids_of


def is_text(x):
    """Whether `x` is strings: one, a list, an array, a tensor, or a `tf.data.Dataset` of them."""
    if hasattr(x, "element_spec"):
        spec = x.element_spec
        return "string" in str(getattr(spec, "dtype", ""))
    if isinstance(x, str | bytes):
        return True
    if isinstance(x, list | tuple):
        return bool(x) and all(isinstance(text, str | bytes) for text in x)
    dtype = getattr(x, "dtype", None)
    return getattr(dtype, "kind", None) in ("U", "S") or "string" in str(dtype) or _holds_text(x)


def _holds_text(x):
    return isinstance(x, np.ndarray) and x.dtype.kind == "O" and x.size > 0 and isinstance(x.flat[0], str | bytes)


def preprocessed(model, x, y=None, sample_weight=None):
    """`(x, y, sample_weight)` with strings turned into token ids, next tokens and the weights of real ones.

    Raises:
        ValueError: for strings without a preprocessor, or with targets beside them.
    """
    if not is_text(x):
        return x, y, sample_weight
    if model.preprocessor is None:
        raise ValueError(
            f"Strings need a preprocessor, and {model.name} has none: convert a CausalLM that has one, or set "
            "`model.preprocessor` to a CausalLMPreprocessor of KerasHub."
        )
    if y is not None or sample_weight is not None:
        raise ValueError("The preprocessor makes targets and weights from the strings; leave `y` and weights out.")
    if hasattr(x, "element_spec"):
        return x.map(model.preprocessor), None, None
    if hasattr(x, "tolist"):
        x = x.tolist()
    texts = [x] if isinstance(x, str | bytes) else list(x)
    texts = [text.decode() if isinstance(text, bytes) else text for text in texts]
    inputs, targets, weights = model.preprocessor(texts)
    inputs = {name: _array(value) for name, value in inputs.items()}
    return inputs, _array(targets), _array(weights).astype("float32")


def _array(x):
    return np.asarray(ops.convert_to_numpy(x))


class TextTask:
    """Keras' loops on strings, and KerasHub's `score`."""

    def fit(self, x=None, y=None, *args, sample_weight=None, validation_data=None, **kwargs):
        """As `keras.Model.fit`. Strings (a list, an array or a `tf.data.Dataset`) pass the preprocessor first, which
        makes targets and weights; so do strings in `validation_data`."""
        x, y, sample_weight = preprocessed(self, x, y, sample_weight)
        if is_text(validation_data):
            validation_data = preprocessed(self, validation_data)
            validation_data = validation_data[0] if hasattr(validation_data[0], "element_spec") else validation_data
        return super().fit(x, y, *args, sample_weight=sample_weight, validation_data=validation_data, **kwargs)

    def evaluate(self, x=None, y=None, *args, sample_weight=None, **kwargs):
        """As `keras.Model.evaluate`; strings as in `fit`."""
        x, y, sample_weight = preprocessed(self, x, y, sample_weight)
        return super().evaluate(x, y, *args, sample_weight=sample_weight, **kwargs)

    def predict(self, x, *args, **kwargs):
        """As `keras.Model.predict`: logits. Strings pass the preprocessor first."""
        return super().predict(preprocessed(self, x)[0], *args, **kwargs)

    def score(self, token_ids, padding_mask=None, scoring_mode="logits", target_ids=None):
        """Scores token ids, as in KerasHub; every row is read from its beginning.

        Args:
            token_ids: int `[B, T]`.
            padding_mask: None, or bool `[B, T]`, True at real tokens.
            scoring_mode: `"logits"`, or `"loss"`: the negative log-likelihood of each target.
            target_ids: int `[B, T]`, for `"loss"`: for next tokens, `ops.roll(token_ids, -1, axis=1)`.

        Returns:
            `[B, T, V]` logits, or float32 `[B, T]` losses. Ignore entries at padding: logits are 0 there.

        Raises:
            ValueError: for another mode, or `"loss"` without targets.
        """
        if scoring_mode not in ("logits", "loss"):
            raise ValueError(f"`scoring_mode` must be 'logits' or 'loss'; received {scoring_mode!r}.")
        if scoring_mode == "loss" and target_ids is None:
            raise ValueError("scoring_mode='loss' needs `target_ids` [B, T], the tokens to score.")
        if target_ids is not None:
            check_ids_of(self, target_ids, padding_mask=padding_mask)
        logits = self(token_ids, padding_mask=padding_mask, training=False)
        if scoring_mode == "logits":
            return logits
        logits, targets = ops.cast(logits, "float32"), ops.expand_dims(ops.convert_to_tensor(target_ids, "int32"), -1)
        chosen = ops.take_along_axis(logits, targets, axis=-1)[..., 0]
        return ops.logsumexp(logits, axis=-1) - chosen
