"""How `passkey_length.py` trains: one stage after another, each of which an earlier call may have finished."""

import time

import keras
from passkey_course import BATCH, BLOCK, LAST, LEVELS, Course
from passkey_parts import ReadingOn

import keras_fam

EPOCH = 100  # steps
WRITTEN_AT = 0.03  # the loss at which writing has been learned


def noise_of(model):
    """A function that sets the standard deviation of the noise on a model's memories, at most the model's own."""
    full = model.backbone.block_settings.get("fam_noise")
    if not full:
        return None
    scale = keras_fam.NoiseScale(model)
    return lambda noise: setattr(scale, "share", min(noise / full, 1.0))


def falling(rate, steps):
    return keras.optimizers.schedules.CosineDecay(0.0, steps, warmup_target=rate, warmup_steps=50)


def fit(model, course, steps, rate, callbacks=()):
    """Losses of the epochs of `EPOCH` steps."""
    reader = ReadingOn(model, BATCH, BLOCK)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    reader.compile(keras.optimizers.Adam(rate, clipnorm=1.0), loss=loss)
    size = min(EPOCH, steps)
    options = {"steps_per_epoch": size, "epochs": steps // size, "verbose": 2, "shuffle": False}
    return reader.fit(course.batches(), callbacks=list(callbacks), **options).history["loss"]


class Training:
    """Trains a language model with `fit`, from scratch.

    First it learns to write: keys anywhere in texts of one step, until the loss is small. A memory that is to be binary
    is normalized for that, without noise, since a binary one learns to write slowly, if at all; then its signs alone
    are fed back. From there on texts and noise grow as the loss permits, and at the level reached the learning rate
    falls. One or two rounds of last steps follow, with less noise.

    Args:
        make_task: function of a seed and a key position with a `PassKey`.
        make_model: function of settings with a model of `TransformerFAMCausalLM`.
        settings: dict, of the model that is trained.
        seed: int.
        limits: namespace with the steps of the stages, at most (`write_steps`, `climb_steps`, `steps`, `last_steps`),
            how often writing may begin (`write_attempts`), and the shares of words `replaced` and `last_replaced`.
    """

    def __init__(self, make_task, make_model, settings, seed, limits):
        self.make_task, self.make_model, self.settings = make_task, make_model, settings
        self.seed, self.limits = seed, limits

    def run(self, result, weights, keep):
        """Goes through the stages that are missing.

        Args:
            result: dict, what an earlier call found, or empty; it is completed.
            weights: `pathlib.Path` of the weights that the last finished stage left.
            keep: function that is called after each stage, when `result` and the weights are complete.

        Returns:
            The model.
        """
        result |= {"steps": [], "losses": [], "training_seconds": 0.0, "lengths": {}} | result
        stages = [self.write, self.climb, self.settle, *[self.last] * len(self.limits.last_steps)]
        keras.utils.set_random_seed(self.seed)
        model = self.make(writes=len(result["steps"]) < 2)
        if result["steps"]:
            model.load_weights(weights)
        for stage in stages[len(result["steps"]) :]:
            started = time.perf_counter()
            model, losses = stage(model, result)
            result["training_seconds"] = round(result["training_seconds"] + time.perf_counter() - started, 1)
            result["steps"].append(EPOCH * len(losses))
            result["losses"] += [round(float(loss), 4) for loss in losses]
            result["lengths"] = {}  # those of other weights
            model.save_weights(weights)
            keep()
        return model

    def make(self, writes):
        """A model of the first stage, which learns to write, or of the later ones."""
        settings = self.settings
        if writes and "fam_feedback" in settings:
            settings = {**settings, "fam_feedback": "normalized", "fam_noise": 0.0}
        return self.make_model(**settings)

    def course(self, model, number, replaced, attempt=0):
        """The stages' courses differ in their seeds."""
        return Course(self.make_task, self.seed + 1000 * number + 100 * attempt, noise_of(model), replaced)

    def write(self, model, result):
        """Begins anew, from other initial weights, where writing has not been learned in time."""
        losses = []
        for attempt in range(self.limits.write_attempts):
            if attempt:
                keras.utils.set_random_seed(self.seed + 100 * attempt)
                model = self.make(writes=True)
            course = self.course(model, 0, 0.0, attempt)
            until = {"monitor": "loss", "threshold": WRITTEN_AT, "stop": True}
            until = keras_fam.training.Curriculum(course, [0], attribute="number", **until)
            losses += fit(model, course, self.limits.write_steps, 2e-3, [until])
            if losses[-1] <= WRITTEN_AT:
                break
        result["write_attempts"] = attempt + 1
        return model, losses

    def climb(self, writer, result):
        model = self.make(writes=False)
        for new, old in zip(model.trainable_weights, writer.trainable_weights, strict=True):
            new.assign(old)
        course, levels = self.course(model, 1, self.limits.replaced), []
        until = {"monitor": "loss", "threshold": [level.next_at for level in LEVELS], "stop": True}
        until = keras_fam.training.Curriculum(course, range(len(LEVELS)), attribute="number", **until)
        note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: levels.append(course.number))
        losses = fit(model, course, self.limits.climb_steps, 2e-3, [until, note])
        result["steps_at_which_levels_began"] = [EPOCH * levels.index(level) for level in sorted(set(levels))]
        result["level"] = course.number
        return model, losses

    def settle(self, model, result):
        course, steps = self.course(model, 2, self.limits.replaced), self.limits.steps
        course.number = result["level"]
        return model, fit(model, course, steps, falling(2e-3, steps))

    def last(self, model, result):
        round_ = len(result["steps"]) - 3
        keras.utils.set_random_seed(self.seed)
        course, steps = self.course(model, 3 + round_, self.limits.last_replaced), self.limits.last_steps[round_]
        course.set(LAST[round_])
        return model, fit(model, course, steps, falling(1e-3, steps))
