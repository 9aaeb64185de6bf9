"""Associative recall (arXiv 2407.04841): pairs remembered and rewritten, for FAM, RMT and BSWA of one code base.

Each block states one pair of a key and a value; the question at the end asks for the value of one key. *Remember*: all
keys differ, and the question is how many pairs a memory of F rows holds. *Rewrite*: a few keys get new values again and
again, the last one counts, and the question is for how many updates that goes on, beyond those trained on. FAM and RMT
have no memory segments, so that all they know of earlier blocks is the memory; BSWA has one, and no smaller a state.

To which key a value belongs is learned first, with pairs and question in one block, which needs no memory: one model
without any, which all systems of a seed start from. Then the number of pairs grows whenever the loss is small, and
training ends once the most pairs are learned.

Every training is kept in `--out`, so that systems and seeds can be spread over calls.

    python examples/recall.py --backend jax --seeds 0 --out out/recall
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import time

SYSTEMS = {
    "FAM": ("FAM (paper)", {}),
    "FAM_N": ("FAM, normalized", {"fam_feedback": "normalized"}),
    "RMT": ("RMT", {"fam_recurrence": "stack"}),
    "BSWA": ("BSWA, one segment", {"fam_length": 0, "memory_segments": 1}),
}
TASKS = {  # name: (settings by pairs, fewest and most pairs trained on, pairs asked for)
    "remember": (lambda pairs: {}, (1, 8), (1, 2, 3, 4, 5, 6, 7, 8)),
    "rewrite": (lambda pairs: {"num_keys": min(pairs, 2)}, (1, 8), (1, 2, 3, 4, 8, 16, 32, 128)),
}
BLOCK, LAYERS, ROWS = 16, 3, 512  # tokens in a block; layers; rows asked
QUESTION, QUESTIONS = 4, 4  # tokens of a question and its answer; questions at the end of a text in training, at most
NEAR = 3  # pairs that fit in one block with a question
EPOCH, LEARNED = 100, 0.08  # steps; the mean loss of an epoch at which one more pair comes in

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"], default="jax")
parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
parser.add_argument("--seeds", type=int, nargs="+", default=[0])
parser.add_argument("--first-steps", type=int, default=6000, help="at most, with pairs and question in one block")
parser.add_argument("--steps", type=int, default=6000, help="at most, of each system")
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--fam-length", type=int, default=8)
parser.add_argument("--symbols", type=int, default=16)
parser.add_argument("--learning-rate", type=float, default=2e-3)
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/recall"))
ARGS = parser.parse_args()
os.environ["KERAS_BACKEND"] = ARGS.backend

import keras  # noqa: E402  (the backend is chosen before)
import numpy as np  # noqa: E402

import keras_fam  # noqa: E402
from keras_fam.evaluation import ABLATIONS, StreamScorer, summary  # noqa: E402
from keras_fam.tasks import AssociativeRecall  # noqa: E402


def make_task(name, pairs, **settings):
    settings = {"symbols": ARGS.symbols, "spread": BLOCK, **TASKS[name][0](pairs), **settings}
    return AssociativeRecall(num_pairs=pairs, **settings)


def make_model(vocabulary_size, **changes):
    settings = {"fam_length": ARGS.fam_length, "memory_segments": 0, **changes}
    backbone = keras_fam.TransformerFAMBackbone(
        vocabulary_size, LAYERS, ARGS.width, 4, 2 * ARGS.width, block_size=BLOCK, **settings
    )
    model = keras_fam.TransformerFAMCausalLM(backbone)
    model.build()
    return model


class Pairs:
    """Batches without end: half of them have as many pairs as there may be now, a quarter fewer, and a quarter have
    pairs and question in one block, as all have if `name` is None.

    About half of the keys are asked for: were all of them, the last value would follow from the others. All texts of a
    stage have one length, so that one program is compiled for it: blanks follow the questions, at no weight.
    """

    def __init__(self, name, seed):
        self.name, self.rng = name, np.random.default_rng([seed, name is None])
        self.least, self.longest = TASKS[name][1] if name else (0, 0)
        self.most = self.least

    def batches(self):
        while True:
            kind, rows = self.rng.random(), ARGS.batch if self.name else 8 * ARGS.batch
            total = self.most * BLOCK + QUESTIONS * QUESTION
            if kind < 0.25 or not self.name:
                pairs, questions = int(self.rng.integers(2, NEAR + 1)), 1
                task, tokens = make_task("remember", pairs, spread="random"), BLOCK
            else:
                pairs = int(self.rng.integers(self.least, self.most + 1)) if kind < 0.5 else self.most
                keys = TASKS[self.name][0](pairs).get("num_keys", pairs)
                questions = min(QUESTIONS, (keys + 1) // 2)
                task, tokens = make_task(self.name, pairs, num_questions=questions), None
            batch = task.batch(rows, tokens, seed=self.rng)
            ids, targets, weights = (batch[part] for part in ("token_ids", "targets", "loss_weights"))
            room = [(0, 0), (0, total - ids.shape[1])]
            yield np.pad(ids, room), np.pad(targets, room), np.pad(weights, room) * total / questions


def fit(model, pairs, steps):
    """`(steps, the steps at which another pair came in)`."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Held, and lowered in the last tenth: how long each number of pairs takes is not known before.
    rate = keras.optimizers.schedules.PiecewiseConstantDecay(
        [50, steps * 9 // 10], [ARGS.learning_rate / 4, ARGS.learning_rate, ARGS.learning_rate / 10]
    )
    model.compile(keras.optimizers.Adam(rate, clipnorm=1.0), loss=loss, weighted_metrics=None)
    stages = range(pairs.least, pairs.longest + 1)
    settings = {"attribute": "most", "monitor": "loss", "threshold": LEARNED, "stop": True}
    grow, grown = keras_fam.training.Curriculum(pairs, stages, **settings), []
    note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: grown.append(pairs.most))
    options = {"steps_per_epoch": min(EPOCH, steps), "epochs": max(1, steps // EPOCH), "verbose": 2, "shuffle": False}
    model.fit(pairs.batches(), callbacks=[grow, note], **options)
    return EPOCH * len(grown), {most: EPOCH * grown.index(most) for most in sorted(set(grown))}


def first_model(seed):
    """A model without memory that has learned pairs and question in one block; trained once a seed."""
    keras.utils.set_random_seed(seed)
    model = make_model(make_task("remember", 3).vocabulary_size, fam_length=0)
    path = ARGS.out / f"first_seed{seed}.weights.h5"
    if path.exists():
        model.load_weights(path)
    else:
        print(f"one block, seed {seed}: {ARGS.first_steps} steps at most", flush=True)
        fit(model, Pairs(None, seed), ARGS.first_steps)
        model.save_weights(path)
    return model


def train(name, task, seed):
    """`(model, steps, seconds, the steps at which another pair came in)`."""
    first = first_model(seed)
    keras.utils.set_random_seed(seed)
    model, started = make_model(make_task(task, 3).vocabulary_size, **SYSTEMS[name][1]), time.perf_counter()
    for new, old in zip((v for v in model.weights if "memory_prompt" not in v.path), first.weights, strict=True):
        new.assign(old)
    steps, grown = fit(model, Pairs(task, seed), ARGS.steps)
    return model, steps, round(time.perf_counter() - started, 1), grown


def exact(model, task, seed, how=None):
    """Share of right answers by number of pairs, streamed."""
    scorer, scores = StreamScorer(model, how, boundaries=[0], blocks_per_step=4, seed=seed), []
    for pairs in TASKS[task][2]:
        batch = make_task(task, pairs).batch(ROWS, seed=seed, split="held_out")
        scores.append(summary([scorer.score([batch])])["exact"]["mean"][0])
    return scores


def state_numbers(model):
    """Numbers that a stream of one row keeps between blocks (weights aside): what was seen, not where it is."""
    held = keras.tree.flatten(model.get_initial_state(1).layers)
    return int(sum(np.prod(part.shape) for part in held if "float" in str(part.dtype)))


def main():
    ARGS.out.mkdir(parents=True, exist_ok=True)
    path = ARGS.out / "recall.json"
    found = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    for task in ARGS.tasks:
        for name in ARGS.systems:
            for seed in ARGS.seeds:
                key = f"{task}, {SYSTEMS[name][0]}, seed {seed}"
                if key in found["runs"]:
                    continue
                print(f"{key}: {ARGS.steps} steps", flush=True)
                model, steps, seconds, grown = train(name, task, seed)
                run = {"state_numbers": state_numbers(model), "seconds": seconds, "steps": steps}
                run["steps_at_which_pairs_came_in"] = grown
                run |= {"pairs": TASKS[task][2], "trained_pairs": TASKS[task][1], "exact": exact(model, task, seed)}
                if model.backbone.fam_length:
                    run["ablations"] = {how: exact(model, task, seed, how) for how in ABLATIONS}
                if path.exists():  # another call may have added to it
                    found["runs"] = json.loads(path.read_text())["runs"]
                found["runs"][key] = run
                found |= {
                    "command": "python " + " ".join(sys.argv),
                    "arguments": {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in vars(ARGS).items()},
                    "chance": 1 / ARGS.symbols,
                    "rows": ROWS,
                    "backend": keras.backend.backend(),
                    "versions": {"python": platform.python_version(), "keras": keras.__version__},
                    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                }
                path.write_text(json.dumps(found, indent=1) + "\n")
    for task in ARGS.tasks:
        least, most = TASKS[task][1]
        print(f"\n{task}: right answers in %, {ROWS} rows, by pairs (trained on {least} to {most})")
        print(f"{'':<44}" + "".join(f"{n:>7}" for n in TASKS[task][2]) + "   numbers of state")
        for key, run in found["runs"].items():
            if key.startswith(task):
                cells = "".join(f"{100 * v:>7.1f}" for v in run["exact"])
                print(f"{key.removeprefix(task + ', '):<44}{cells}   {run['state_numbers']:,}")


if __name__ == "__main__":
    main()
