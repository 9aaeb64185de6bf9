"""Token ids are checked before Keras' loops read them: in their compiled steps, values cannot be read.

Arrays, lists and iterators of batches are checked. The batches of other datasets reach compiled steps unseen: there,
ids outside the vocabulary are read as the nearest one inside.
"""

from keras_fam.ops.token_ids import check_ids_of


class CheckedTraining:
    """Training and evaluation of what reads token ids, which are checked against the vocabulary first."""

    def fit(self, x=None, *args, **kwargs):
        validation_data = kwargs.get("validation_data")
        if isinstance(validation_data, list | tuple) and validation_data:
            self._check_ids(validation_data[0])
        return super().fit(self._checked(x), *args, **kwargs)

    def evaluate(self, x=None, *args, **kwargs):
        return super().evaluate(self._checked(x), *args, **kwargs)

    def train_on_batch(self, x, *args, **kwargs):
        self._check_ids(x)
        return super().train_on_batch(x, *args, **kwargs)

    def _checked(self, x):
        """`x`, all of it checked, or to be checked batch by batch."""
        if isinstance(x, list | tuple):
            for batch in x:
                self._check_batch(batch)
        elif hasattr(x, "__next__") and not hasattr(x, "state_dict"):
            return (self._check_batch(batch) for batch in x)
        else:
            self._check_ids(x)
        return x

    def _check_batch(self, batch):
        self._check_ids(batch[0] if isinstance(batch, list | tuple) and batch else batch)
        return batch

    def _check_ids(self, inputs):
        lengths = mask = None
        if isinstance(inputs, dict):
            lengths, mask = inputs.get("lengths"), inputs.get("padding_mask")
            inputs = inputs.get("token_ids")
        if inputs is not None and (hasattr(inputs, "shape") or isinstance(inputs, list | tuple)):
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
