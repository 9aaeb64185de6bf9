"""Random State Passing (App. B.2.3): training steps start from the memory that an earlier step ended with."""

import keras
from keras import ops

from keras_fam.ops.processes import agree, from_first, row_shard

Schedule = keras.optimizers.schedules.LearningRateSchedule


@keras.saving.register_keras_serializable(package="keras_fam")
class RandomStatePassing(keras.layers.Layer):
    """Keeps row 0's final memory of every layer, and hands it to a random part of the next step's rows.

    The memory is held in non-trainable weights, so it is saved with the model. It is detached: no gradient crosses
    training steps.

    Over several devices or processes, each training step does what one device does with all rows: the memory that is
    kept is that of row 0 of process 0, and rows are drawn by their numbers among all rows, from the state of one seed
    generator, which is a weight too. So a run may be resumed by another number of processes. All processes take each
    training step together (under torch, all of the default process group; see
    `keras_fam.distribution.independent_processes`), with equal numbers of rows.

    Args:
        rate: p, the probability that a row starts from the kept memory instead of the learned one (0.8 in the paper).
            Or a Keras schedule of p by training steps, such as `Ramp(0.8, delay=1000, ramp=500)`; the steps are then
            counted in a non-trainable weight, so that compiled steps and loaded models follow it too.
        num_layers: L.
        fam_length: F.
        seed: None or an int.
    """

    def __init__(self, rate, num_layers: int, fam_length: int, seed: int | None = None, **kwargs):
        super().__init__(**kwargs)
        if isinstance(rate, dict):
            rate = keras.saving.deserialize_keras_object(rate)
        if not isinstance(rate, Schedule) and not 0 <= rate <= 1:
            raise ValueError(f"`rate` is a probability from 0 to 1; received {rate!r}.")
        self.rate, self.num_layers, self.fam_length, self.seed = rate, num_layers, fam_length, seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        self.memory = self.add_weight(
            shape=(self.num_layers, self.fam_length, input_shape[-1]),
            dtype=keras.backend.result_type(self.variable_dtype, "float32"),
            initializer="zeros",
            trainable=False,
            autocast=False,
            aggregation="only_first_replica",
            name="memory",
        )
        self.filled = self.add_weight(
            shape=(),
            dtype="bool",
            initializer="zeros",
            trainable=False,
            aggregation="only_first_replica",
            name="filled",
        )
        self.steps = None
        if isinstance(self.rate, Schedule):
            self.steps = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="steps")

    @property
    def current_rate(self):
        """p of the next training step: the float `rate`, or a float32 scalar tensor if that is a schedule."""
        return self.rate if self.steps is None else self.rate(self.steps.value)

    def choose(self, batch_size):
        """bool `[B]`: the rows of this process that start from the kept memory; none before the first `keep`."""
        shard, count = row_shard()
        agree([self.seed_generator.state])
        draw = keras.random.uniform((batch_size * count,), seed=self.seed_generator)
        if count > 1:  # as in one process with all rows: each takes its own
            draw = ops.slice(draw, [shard * batch_size], [batch_size])
        return ops.logical_and(draw < self.current_rate, self.filled)

    def keep(self, fams, written):
        """Stores row 0's memory, which ends a training step.

        Args:
            fams: a list of L memories `[B, F, D]`.
            written: bool scalar, whether row 0 wrote a memory in this step; if not, the old one stays.
        """
        memory = ops.stop_gradient(ops.stack([fam[0] for fam in fams], axis=0))
        memory, written = from_first([memory, written])
        self.memory.assign(ops.where(written, ops.cast(memory, self.memory.dtype), self.memory.value))
        self.filled.assign(ops.logical_or(self.filled.value, written))
        if self.steps is not None:
            self.steps.assign(self.steps.value + 1)

    def get_config(self):
        config = super().get_config()
        rate = keras.saving.serialize_keras_object(self.rate) if isinstance(self.rate, Schedule) else self.rate
        config.update(rate=rate, num_layers=self.num_layers, fam_length=self.fam_length, seed=self.seed)
        return config
