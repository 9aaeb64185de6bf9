"""The training of `examples.passkey.length`: a sequence of stages; a later call continues after the last one."""

import time

import keras

import keras_fam
from examples.passkey.curriculum import BATCH, BLOCK, LEVELS, KeyCurriculum
from examples.passkey.question import QuestionTrainer

EPOCH = 100  # steps
WRITTEN_AT = 0.03  # the loss at which the memory has learned to write
RATE = 2e-3


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

    First it learns to write: keys anywhere in texts of one step, until the loss is small. Then texts grow as the loss
    permits, and at the level reached the learning rate falls to 0, twice.

    Args:
        make_task: function of a seed and a key position with a `PassKey`.
        make_model: function without arguments with a model of `TransformerFAMCausalLM`.
        seed: int.
        limits: namespace with the largest numbers of steps of the stages (`write_steps`, `climb_steps`, `steps`,
            `final_steps`), and the share of words replaced from the second stage on (`replaced`).
    """

    def __init__(self, make_task, make_model, seed, limits):
        self.make_task, self.make_model, self.seed, self.limits = make_task, make_model, seed, limits

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
        keras.utils.set_random_seed(self.seed)
        model = self.make_model()
        if result["steps"]:
            model.load_weights(weights)
        stages = [self.write, self.climb, self.settle, *([self.final] if self.limits.final_steps else [])]
        for stage in stages[len(result["steps"]) :]:
            started = time.perf_counter()
            losses = stage(model, result)
            result["training_seconds"] = round(result["training_seconds"] + time.perf_counter() - started, 1)
            result["steps"].append(EPOCH * len(losses))
            result["losses"] += [round(float(loss), 4) for loss in losses]
            result["lengths"] = {}  # those of other weights
            model.save_weights(weights)
            keep()
        return model

    def curriculum(self, number, replaced, level=0):
        """The curriculum of a stage; stages differ in their seeds."""
        curriculum = KeyCurriculum(self.make_task, self.seed + 1000 * number, replaced)
        curriculum.number = level
        return curriculum

    def write(self, model, result):
        curriculum = self.curriculum(0, 0.0)
        until = {"monitor": "loss", "threshold": WRITTEN_AT, "stop": True}
        until = keras_fam.training.Curriculum(curriculum, [0], attribute="number", **until)
        return fit(model, curriculum, self.limits.write_steps, RATE, [until])

    def climb(self, model, result):
        curriculum, levels = self.curriculum(1, self.limits.replaced), []
        until = {"monitor": "loss", "threshold": [level.next_at for level in LEVELS], "stop": True}
        until = keras_fam.training.Curriculum(curriculum, range(len(LEVELS)), attribute="number", **until)
        note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: levels.append(curriculum.number))
        losses = fit(model, curriculum, self.limits.climb_steps, RATE, [until, note])
        result["steps_at_which_levels_began"] = [EPOCH * levels.index(level) for level in sorted(set(levels))]
        result["level"] = curriculum.number
        return losses

    def settle(self, model, result):
        curriculum, steps = self.curriculum(2, self.limits.replaced, result["level"]), self.limits.steps
        return fit(model, curriculum, steps, falling(RATE, steps))

    def final(self, model, result):
        keras.utils.set_random_seed(self.seed)
        curriculum, steps = self.curriculum(3, self.limits.replaced, len(LEVELS) - 1), self.limits.final_steps
        return fit(model, curriculum, steps, falling(RATE / 2, steps))
