"""Noise on the memory that grows while a model is trained."""

import keras


class NoiseRamp(keras.callbacks.Callback):
    """Lets `fam_noise` grow from 0 to its full size during `fit`: first the memory learns to hold, then to last.

    Strong noise from the start keeps a model from learning what to write at all. The share in force is a weight
    (`noise_scale`) of every layer; it is 1 where this callback is not used, and stays what it is after `fit`.

    Args:
        start: epochs without noise, at least 0; counted as `fit` counts them.
        stop: the epoch from which on the noise has its full size; more than `start`.

    Raises:
        ValueError: for other numbers, and in `fit` for a model without `fam_noise`.
    """

    def __init__(self, start: float, stop: float):
        super().__init__()
        if not 0 <= start < stop:
            raise ValueError(f"Noise grows from `start` to `stop`, 0 ≤ start < stop; received {start!r} and {stop!r}.")
        self.start, self.stop = start, stop

    def on_epoch_begin(self, epoch, logs=None):
        scales = [variable for variable in self.model.variables if variable.name == "noise_scale"]
        if not scales:
            raise ValueError(
                f"NoiseRamp needs a model whose layers have noise; {self.model.name} has none. Set `fam_noise` above 0."
            )
        for scale in scales:
            scale.assign(min(max((epoch - self.start) / (self.stop - self.start), 0.0), 1.0))
