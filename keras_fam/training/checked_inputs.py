"""Token ids are checked before Keras' loops read them: in their compiled steps, values cannot be read.

The batches of a dataset reach compiled steps unseen: there, ids outside the vocabulary are read as the nearest one
inside.
"""

from keras_fam.ops.token_ids import check_ids_of


class CheckedTraining:
    """Training and evaluation of what reads token ids: arrays of ids are checked against the vocabulary first."""

    def fit(self, x=None, *args, **kwargs):
        self._check_ids(x)
        validation_data = kwargs.get("validation_data")
        if isinstance(validation_data, list | tuple) and validation_data:
            self._check_ids(validation_data[0])
        return super().fit(x, *args, **kwargs)

    def evaluate(self, x=None, *args, **kwargs):
        self._check_ids(x)
        return super().evaluate(x, *args, **kwargs)

    def train_on_batch(self, x, *args, **kwargs):
        self._check_ids(x)
        return super().train_on_batch(x, *args, **kwargs)

    def _check_ids(self, inputs):
        lengths = mask = None
        if isinstance(inputs, dict):
            lengths, mask = inputs.get("lengths"), inputs.get("padding_mask")
            inputs = inputs.get("token_ids")
        if hasattr(inputs, "shape"):
            check_ids_of(getattr(self, "model", self), inputs, lengths, mask)


class CheckedInputs(CheckedTraining):
    """The same for all of Keras' loops of a model."""

    def predict(self, x, *args, **kwargs):
        self._check_ids(x)
        return super().predict(x, *args, **kwargs)

    def test_on_batch(self, x, *args, **kwargs):
        self._check_ids(x)
        return super().test_on_batch(x, *args, **kwargs)

    def predict_on_batch(self, x):
        self._check_ids(x)
        return super().predict_on_batch(x)
