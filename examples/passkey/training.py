"""The training of `examples.passkey.length`: a sequence of stages; a later call continues after the last one."""

import time

import keras

import keras_fam
from examples.passkey.curriculum import BATCH, BLOCK, FINAL_LEVELS, LEVELS, KeyCurriculum
from examples.passkey.question import QuestionTrainer

EPOCH = 100  # steps
WRITTEN_AT = 0.03  # the loss at which the memory has learned to write


def noise_of(model):
    """A function that sets the standard deviation of the noise on a model's memory; None for a model without noise."""
    full = model.backbone.blocks[0].attention.memory_update.noise
    if not full or not model.backbone.fam_length:
        return None
    scale = keras_fam.training.NoiseScale(model)
    return lambda noise: setattr(scale, "share", min(noise / full, 1.0))


def falling(rate, steps):
    return keras.optimizers.schedules.CosineDecay(0.0, steps, warmup_target=rate, warmup_steps=50)


def fit(model, curriculum, steps, rate, callbacks=()):
    """Losses of the epochs of `EPOCH` steps."""
    trainer = QuestionTrainer(model, BATCH, BLOCK)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer.compile(keras.optimizers.Adam(rate, clipnorm=1.0), loss=loss)
    size = min(EPOCH, steps)
    options = {"steps_per_epoch": size, "epochs": steps // size, "verbose": 2, "shuffle": False}
    return trainer.fit(curriculum.batches(), callbacks=list(callbacks), **options).history["loss"]


class Training:
    """Trains a language model with `fit`, from scratch.

    First it learns to write: keys anywhere in texts of one step, until the loss is small. In this stage the memory of
    the recipe is normalized and without noise, since a binary memory learns to write slowly, if at all. Then texts and
    noise grow as the loss permits, and at the level reached the learning rate falls to 0. Up to two final phases
    follow, with less noise.

    Args:
        make_task: function of a seed and a key position with a `PassKey`.
        make_model: function of settings with a model of `TransformerFAMCausalLM`.
        settings: dict, of the model that is trained.
        seed: int.
        limits: namespace with the largest numbers of steps of the stages (`write_steps`, `climb_steps`, `steps`,
            `final_steps`), `write_attempts`, and the shares of words replaced (`replaced`, `final_replaced`).
    """

    def __init__(self, make_task, make_model, settings, seed, limits):
        self.make_task, self.make_model, self.settings = make_task, make_model, settings
        self.seed, self.limits = seed, limits

    def run(self, result, weights, keep):
        """Runs the stages that are missing.

        Args:
            result: dict, results of an earlier call, or empty; it is completed in place.
            weights: `pathlib.Path` of the weights after the last finished stage.
            keep: function that saves `result`, called after each stage.

        Returns:
            The model.
        """
        result |= {"steps": [], "losses": [], "training_seconds": 0.0, "lengths": {}} | result
        stages = [self.write, self.climb, self.settle, *[self.final] * len(self.limits.final_steps)]
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
        """A model of the first stage, which learns to write, or of the later stages."""
        settings = self.settings
        if writes and "memory_update" in settings and settings["memory_update"].noise:
            settings = {**settings, "memory_update": "normalized"}
        return self.make_model(**settings)

    def curriculum(self, model, number, replaced, attempt=0):
        """The curriculum of a stage; stages and attempts differ in their seeds."""
        return KeyCurriculum(self.make_task, self.seed + 1000 * number + 100 * attempt, noise_of(model), replaced)

    def write(self, model, result):
        """Starts again from other initial weights if writing is not learned within `write_steps`."""
        losses = []
        for attempt in range(self.limits.write_attempts):
            if attempt:
                keras.utils.set_random_seed(self.seed + 100 * attempt)
                model = self.make(writes=True)
            curriculum = self.curriculum(model, 0, 0.0, attempt)
            until = {"monitor": "loss", "threshold": WRITTEN_AT, "stop": True}
            until = keras_fam.training.Curriculum(curriculum, [0], attribute="number", **until)
            losses += fit(model, curriculum, self.limits.write_steps, 2e-3, [until])
            if losses[-1] <= WRITTEN_AT:
                break
        result["write_attempts"] = attempt + 1
        return model, losses

    def climb(self, writer, result):
        model = self.make(writes=False)
        for new, old in zip(model.trainable_weights, writer.trainable_weights, strict=True):
            new.assign(old)
        curriculum, levels = self.curriculum(model, 1, self.limits.replaced), []
        until = {"monitor": "loss", "threshold": [level.next_at for level in LEVELS], "stop": True}
        until = keras_fam.training.Curriculum(curriculum, range(len(LEVELS)), attribute="number", **until)
        note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: levels.append(curriculum.number))
        losses = fit(model, curriculum, self.limits.climb_steps, 2e-3, [until, note])
        result["steps_at_which_levels_began"] = [EPOCH * levels.index(level) for level in sorted(set(levels))]
        result["level"] = curriculum.number
        return model, losses

    def settle(self, model, result):
        curriculum, steps = self.curriculum(model, 2, self.limits.replaced), self.limits.steps
        curriculum.number = result["level"]
        return model, fit(model, curriculum, steps, falling(2e-3, steps))

    def final(self, model, result):
        phase = len(result["steps"]) - 3
        keras.utils.set_random_seed(self.seed)
        curriculum, steps = (
            self.curriculum(model, 3 + phase, self.limits.final_replaced),
            self.limits.final_steps[phase],
        )
        curriculum.set(FINAL_LEVELS[phase])
        return model, fit(model, curriculum, steps, falling(1e-3, steps))
