"""Schedules by training steps."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_fam")
class Ramp(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that is 0 for `delay` steps and then rises linearly to `value` within `ramp` steps.

    For `random_state_passing`, and wherever Keras takes a learning rate schedule.

    Args:
        value: the final value, reached at step `delay + ramp` and kept from there on.
        delay: steps at 0, a whole number of at least 0.
        ramp: steps of the rise, a whole number of at least 0; 0 jumps.
    """

    def __init__(self, value: float, delay: int = 0, ramp: int = 0):
        for name, steps in (("delay", delay), ("ramp", ramp)):
            if not isinstance(steps, int) or steps < 0:
                raise ValueError(f"`{name}` is a number of steps, 0 or more; received {steps!r}.")
        self.value, self.delay, self.ramp = value, delay, ramp

    def __call__(self, step):
        risen = (ops.cast(step, "float32") - (self.delay - 1)) / (self.ramp + 1)
        return self.value * ops.clip(risen, 0.0, 1.0)

    def get_config(self):
        return {"value": self.value, "delay": self.delay, "ramp": self.ramp}
