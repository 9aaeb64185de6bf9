"""Noise on the memory that grows while a model is trained."""

import keras


class NoiseScale:
    """The share of a memory update's `noise` in force in a model, as one number that may be set between epochs.

    It is a weight (`noise_scale`) of every layer, 1 in a new model. `NoiseRamp` sets it by epochs; to let it grow as
    the loss permits, give this object to `keras_fam.training.Curriculum` with `attribute="share"`.

    Args:
        model: a model whose memory update has noise, or a Keras model around one.

    Raises:
        ValueError: for a model without noise.
    """

    def __init__(self, model):
        self._scales = [variable for variable in model.variables if variable.name == "noise_scale"]
        if not self._scales:
            raise ValueError(
                f"{model.name} has no noise to scale. Give it a memory update with noise, such as "
                "`Normalized(noise=0.7)`."
            )

    @property
    def share(self) -> float:
        return round(float(keras.ops.convert_to_numpy(self._scales[0])), 6)

    @share.setter
    def share(self, share):
        if not 0 <= share <= 1:
            raise ValueError(f"`share` lies between 0 and 1; received {share!r}.")
        for scale in self._scales:
            scale.assign(share)


class NoiseRamp(keras.callbacks.Callback):
    """Lets the noise of a memory update grow from 0 to its full size during `fit`.

    The model first learns to write its memory, then to keep it.

    Strong noise from the start keeps a model from learning what to write at all. The share in force (`NoiseScale`) is 1
    where this callback is not used, and stays what it is after `fit`.

    Args:
        start: epochs without noise, at least 0; counted as `fit` counts them.
        stop: the epoch from which on the noise has its full size; more than `start`.

    Raises:
        ValueError: for other numbers, and in `fit` for a model without noise.
    """

    def __init__(self, start: float, stop: float):
        super().__init__()
        if not 0 <= start < stop:
            raise ValueError(f"Noise grows from `start` to `stop`, 0 ≤ start < stop; received {start!r} and {stop!r}.")
        self.start, self.stop = start, stop

    def on_epoch_begin(self, epoch, logs=None):
        NoiseScale(self.model).share = min(max((epoch - self.start) / (self.stop - self.start), 0.0), 1.0)
