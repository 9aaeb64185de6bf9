"""LoRA fine-tuning of SmolLM2 on four Austen novels: Random State Passing and the repeated random segment (Sec. 3.1).

Steps read consecutive parts of a novel, `run` of them from each random position. At the end of each step, `repeat`
random consecutive tokens of its text are repeated after a tag, at weight 0.1, so that there is something to remember.
Training resumes where it was stopped: LoRA updates, optimizer and the memory of Random State Passing are saved after
every `epoch` steps.
"""

import importlib.util
import json
import os
import pathlib
import time

import keras
import numpy as np
from keras import ops

from examples.smollm2.books import TRAINING, book_ids
from examples.smollm2.model import load, with_memory

TAG = "\n\n[repeat random segment]:"


class Reading(keras.utils.PyDataset):
    """Steps of one row: text, tag, segment. A step depends on its number and the seed alone."""

    def __init__(self, ids, tokenizer, args, first=0):
        super().__init__()
        self.books = [ids[title] for title in TRAINING]
        self.tag = np.asarray(tokenizer(TAG), "int32")
        self.args, self.first = args, first
        self.text = args.tokens + 1 - len(self.tag) - args.repeat

    def __len__(self):
        return self.args.epoch

    def on_epoch_end(self):
        self.first += len(self)

    def __getitem__(self, i):
        step = self.first + i
        run = np.random.default_rng([self.args.seed, step // self.args.run])
        weights = np.array([len(book) for book in self.books], "float64")
        book = self.books[run.choice(len(self.books), p=weights / weights.sum())]
        start = run.integers(len(book) - self.args.run * self.text) + step % self.args.run * self.text
        text = book[start : start + self.text]
        first = np.random.default_rng([self.args.seed, step, 1]).integers(self.text - self.args.repeat + 1)
        segment = text[first : first + self.args.repeat]
        ids = np.concatenate([text, self.tag, segment])[None]
        weights = np.ones(self.args.tokens, "float32")
        weights[self.text - 1 :] = 0  # the tag
        weights[len(text) + len(self.tag) - 1 :] = self.args.repeat_weight
        return ids[:, :-1], ids[:, 1:], weights[None]


class Checkpoint(keras.callbacks.Callback):
    """Saves what training needs to resume, and a log; after a crash the last complete state is intact."""

    def __init__(self, folder, args):
        super().__init__()
        self.folder, self.args = pathlib.Path(folder), args
        self.log, self.began = [], time.time()

    def other_variables(self):
        """Variables that are not in the LoRA file: those of the optimizer and of Random State Passing."""
        passing = self.model.backbone.random_state_passing
        return [*self.model.optimizer.variables, *([] if passing is None else passing.variables)]

    def restore(self):
        """Restores the last state; returns the number of steps done, 0 if there is none."""
        report = self.folder / "training.json"
        if not report.exists():
            return 0
        record = json.loads(report.read_text())
        same = {
            k: v
            for k, v in vars(self.args).items()
            if k in record["args"] and k not in ("steps", "out", "verbose", "tensorboard")
        }
        changed = {k for k, v in same.items() if record["args"][k] != v}
        if changed:
            raise ValueError(
                f"{self.folder} has a run with other values of {sorted(changed)}. Choose another --run-name."
            )
        self.log = record["log"]
        self.model.load_lora_weights(self.folder / record["weights"])
        with np.load(self.folder / record["state"]) as saved:
            for i, variable in enumerate(self.other_variables()):
                variable.assign(ops.cast(saved[str(i)], variable.dtype))
        return record["steps"]

    def on_epoch_end(self, epoch, logs=None):
        steps = (epoch + 1) * self.args.epoch
        seconds = round(time.time() - self.began, 1)
        self.log.append({"step": steps, "seconds": seconds, **{k: float(v) for k, v in logs.items()}})
        self.began = time.time()
        slot = "ab"[(epoch + 1) % 2]  # the report names the two files of one state, so that they always match
        names = {"weights": f"{slot}.lora.h5", "state": f"{slot}.npz"}
        self.model.save_lora_weights(self.folder / names["weights"])
        np.savez(
            self.folder / names["state"],
            **{str(i): ops.convert_to_numpy(v) for i, v in enumerate(self.other_variables())},
        )
        args = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in vars(self.args).items()}
        report = self.folder / "training.json.part"
        report.write_text(json.dumps({"args": args, "steps": steps, **names, "log": self.log}, indent=1) + "\n")
        os.replace(report, self.folder / "training.json")


def train(args):
    """Trains until step `args.steps`, resuming an earlier call."""
    keras.utils.set_random_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    lm = with_memory(load(), args, random_state_passing=args.passing if args.fam else 0.0)
    lm.enable_lora(args.rank)
    count = sum(int(np.prod(v.shape)) for v in lm.trainable_variables)
    print(f"{count:,} trainable parameters in {len(lm.trainable_variables)} weights; {lm.count_params():,} in all")
    rate = keras.optimizers.schedules.CosineDecay(0.0, args.steps, warmup_target=args.rate, warmup_steps=10, alpha=0.05)
    lm.compile(keras.optimizers.Adam(rate, global_clipnorm=1.0))
    lm.optimizer.build(lm.trainable_variables)
    checkpoint = Checkpoint(args.out, args)
    checkpoint.set_model(lm)
    done = checkpoint.restore()
    if done:
        print(f"resuming after step {done}")
    data = Reading(book_ids(lm.preprocessor.tokenizer, args.out.parent), lm.preprocessor.tokenizer, args, done)
    callbacks = [checkpoint]
    writers = all(importlib.util.find_spec(name) for name in ("tensorboard", "tensorflow"))
    if args.tensorboard and writers:
        callbacks.append(keras.callbacks.TensorBoard(args.out / "logs", write_graph=False))
    elif args.tensorboard:
        print("no TensorBoard logs: they need the packages tensorboard and tensorflow")
    epochs = {"epochs": args.steps // args.epoch, "initial_epoch": done // args.epoch}
    lm.fit(data, **epochs, callbacks=callbacks, verbose=args.verbose)
    return lm
