"""Schedules by training steps."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_fam")
class Ramp(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that is 0 for `delay` steps and then rises linearly to `value` within `ramp` steps.

    For `random_state_passing`, and wherever Keras takes a learning rate schedule.

    ```python
    ramp = keras_fam.training.Ramp(0.8, delay=1000, ramp=500)
    ramp(0), ramp(1250), ramp(2000)     # 0, about 0.4, 0.8
    ```

    Args:
        value: float, the final value, from step `delay + ramp` on.
        delay: int, number of steps at 0, ≥ 0.
        ramp: int, number of steps of the rise, ≥ 0; 0 is a jump.

    Raises:
        ValueError: for negative or fractional steps.
    """

    def __init__(self, value: float, delay: int = 0, ramp: int = 0):
        for name, steps in (("delay", delay), ("ramp", ramp)):
            if not isinstance(steps, int) or steps < 0:
                raise ValueError(f"`{name}` must be a non-negative integer. Received: {name}={steps!r}")
        self.value, self.delay, self.ramp = value, delay, ramp

    def __call__(self, step):
        risen = (ops.cast(step, "float32") - (self.delay - 1)) / (self.ramp + 1)
        return self.value * ops.clip(risen, 0.0, 1.0)

    def get_config(self):
        return {"value": self.value, "delay": self.delay, "ramp": self.ramp}
