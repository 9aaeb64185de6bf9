"""Associative recall (arXiv 2407.04841): pairs remembered and rewritten, for FAM, RMT and BSWA.

Each block states one pair of a key and a value; the question at the end asks for the value of one key. *Remember*: all
keys differ; how many pairs does a memory of F rows hold? *Rewrite*: a few keys get new values again and again, and the
last one is valid; for how many updates does that work, beyond those trained on? FAM and RMT have no memory segments, so
that all they know of earlier blocks is the memory; BSWA has one segment, and a state that is no smaller.

Training first teaches which value belongs to which key, with pairs and question in one block, which needs no memory:
all systems of a seed start from the same model without memory. Then the number of pairs grows whenever the loss is
small, and training ends once the largest number is learned.

Every run is kept in `--out`, so that systems and seeds can be spread over calls.

    KERAS_BACKEND=jax python -m examples.recall --seeds 0 --out out/recall
"""

import argparse
import itertools
import json
import pathlib
import time

import keras
import numpy as np

import keras_fam
from examples.record import run_record
from keras_fam import TransformerFAMBackbone
from keras_fam.baselines import RMTBackbone
from keras_fam.evaluation import ABLATIONS, StreamScorer, summary
from keras_fam.tasks import AssociativeRecall

SYSTEMS = {
    "FAM": ("FAM (paper)", TransformerFAMBackbone, {}),
    "FAM_N": ("FAM, normalized", TransformerFAMBackbone, {"memory_update": "normalized"}),
    "FAM_G": ("FAM, hard gate", TransformerFAMBackbone, {"memory_update": "hard_gate"}),
    "FAM_AG": (
        "FAM, anchored, hard gate",
        TransformerFAMBackbone,
        {"memory_update": "hard_gate", "fam_query": "anchored"},
    ),
    "RMT": ("RMT", RMTBackbone, {}),
    "BSWA": ("BSWA, one segment", TransformerFAMBackbone, {"fam_length": 0, "memory_segments": 1}),
}
TASKS = {  # name: (settings by pairs, smallest and largest number of pairs trained on, numbers of pairs tested)
    "remember": (lambda pairs: {}, (1, 8), (1, 2, 3, 4, 5, 6, 7, 8)),
    "rewrite": (lambda pairs: {"num_keys": min(pairs, 2)}, (1, 8), (1, 2, 3, 4, 8, 16, 32, 128)),
}
BLOCK, LAYERS, ROWS = 16, 3, 512  # tokens in a block; layers; rows of a test
QUESTION, QUESTIONS = 4, 4  # tokens of a question with its answer; most questions at the end of a text in training
MEMORY_ALONE = ("memory_prompt", "memory_update")  # weights that only a memory has
NEAR = 3  # pairs that fit in one block with a question
EPOCH, LEARNED = 100, 0.08  # steps; the mean loss of an epoch at which another pair is added


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--first-steps", type=int, default=6000, help="most steps with pairs and question in one block")
    parser.add_argument("--steps", type=int, default=6000, help="most steps of each system")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--fam-length", type=int, default=8)
    parser.add_argument("--symbols", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/recall"))
    return parser.parse_args(argv)


def make_task(args, name, pairs, **settings):
    settings = {"symbols": args.symbols, "spread": BLOCK, **TASKS[name][0](pairs), **settings}
    return AssociativeRecall(num_pairs=pairs, **settings)


def make_model(args, backbone_class=TransformerFAMBackbone, **changes):
    settings = {"fam_length": args.fam_length, "memory_segments": 0, **changes}
    vocabulary_size = make_task(args, "remember", NEAR).vocabulary_size
    backbone = backbone_class(vocabulary_size, LAYERS, args.width, 4, 2 * args.width, block_size=BLOCK, **settings)
    model = keras_fam.TransformerFAMCausalLM(backbone)
    model.build()
    return model


class Pairs:
    """Endless batches: half have the current number of pairs, a quarter fewer, and a quarter pairs and question in one
    block. Without a `name`, all have pairs and question in one block.

    About half of the keys are requested: if all were, the last value would follow from the others. All texts of a stage
    have one length, so that one program is compiled for it: blanks with weight 0 follow the questions.
    """

    def __init__(self, args, name, seed):
        self.args, self.name, self.rng = args, name, np.random.default_rng([seed, name is None])
        self.least, self.longest = TASKS[name][1] if name else (0, 0)
        self.most = self.least

    def batches(self):
        while True:
            kind, rows = self.rng.random(), self.args.batch if self.name else 8 * self.args.batch
            total = self.most * BLOCK + QUESTIONS * QUESTION
            if kind < 0.25 or not self.name:
                pairs, questions = int(self.rng.integers(2, NEAR + 1)), 1
                task, tokens = make_task(self.args, "remember", pairs, spread="random"), BLOCK
            else:
                pairs = int(self.rng.integers(self.least, self.most + 1)) if kind < 0.5 else self.most
                keys = TASKS[self.name][0](pairs).get("num_keys", pairs)
                questions = min(QUESTIONS, (keys + 1) // 2)
                task, tokens = make_task(self.args, self.name, pairs, num_questions=questions), None
            batch = task.batch(rows, tokens, seed=self.rng)
            ids, targets, weights = (batch[part] for part in ("token_ids", "targets", "loss_weights"))
            room = [(0, 0), (0, total - ids.shape[1])]
            yield np.pad(ids, room), np.pad(targets, room), np.pad(weights, room) * total / questions


def fit(model, pairs, steps, rate):
    """Trains a model; `(steps, steps by number of pairs at which that number began)`."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Constant but for the last tenth: how long each number of pairs takes is not known in advance.
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([50, steps * 9 // 10], [rate / 4, rate, rate / 10])
    model.compile(keras.optimizers.Adam(schedule, clipnorm=1.0), loss=loss, weighted_metrics=None)
    stages = range(pairs.least, pairs.longest + 1)
    settings = {"attribute": "most", "monitor": "loss", "threshold": LEARNED, "stop": True}
    grow, grown = keras_fam.training.Curriculum(pairs, stages, **settings), []
    note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: grown.append(pairs.most))
    options = {"steps_per_epoch": min(EPOCH, steps), "epochs": max(1, steps // EPOCH), "verbose": 2, "shuffle": False}
    model.fit(pairs.batches(), callbacks=[grow, note], **options)
    return EPOCH * len(grown), {most: EPOCH * grown.index(most) for most in sorted(set(grown))}


def first_model(args, seed):
    """A model without memory that has learned pairs and question in one block; trained once per seed."""
    keras.utils.set_random_seed(seed)
    model = make_model(args, fam_length=0)
    path = args.out / f"first_seed{seed}.weights.h5"
    if path.exists():
        model.load_weights(path)
    else:
        print(f"one block, seed {seed}: at most {args.first_steps} steps", flush=True)
        fit(model, Pairs(args, None, seed), args.first_steps, args.learning_rate)
        model.save_weights(path)
    return model


def train(args, name, task, seed):
    """`(model, steps, seconds, steps by number of pairs)`."""
    first = first_model(args, seed)
    keras.utils.set_random_seed(seed)
    _, backbone_class, settings = SYSTEMS[name]
    model, started = make_model(args, backbone_class, **settings), time.perf_counter()
    shared = [v for v in model.weights if not any(part in v.path for part in MEMORY_ALONE)]
    for new, old in zip(shared, first.weights, strict=True):
        new.assign(old)
    steps, grown = fit(model, Pairs(args, task, seed), args.steps, args.learning_rate)
    return model, steps, round(time.perf_counter() - started, 1), grown


def exact(args, model, task, seed, ablation=None):
    """Share of right answers by number of pairs, streamed."""
    scorer, scores = StreamScorer(model, ablation, boundaries=[0], blocks_per_step=4, seed=seed), []
    for pairs in TASKS[task][2]:
        batch = make_task(args, task, pairs).batch(ROWS, seed=seed, split="held_out")
        scores.append(summary([scorer.score([batch])])["exact"]["mean"][0])
    return scores


def label(args, name):
    """What a system is called in the results."""
    has_memory = SYSTEMS[name][2].get("fam_length", args.fam_length)
    return SYSTEMS[name][0] + (f", F {args.fam_length}" if has_memory and args.fam_length != 8 else "")


def state_numbers(model):
    """How many numbers the state of one row holds between blocks: keys, values and memory, not positions."""
    held = keras.tree.flatten(model.get_initial_state(1).layers)
    return int(sum(np.prod(part.shape) for part in held if "float" in str(part.dtype)))


def run(args, name, task, seed):
    """Trains and tests a system; the results as a dict."""
    model, steps, seconds, grown = train(args, name, task, seed)
    result = {"state_numbers": state_numbers(model), "seconds": seconds, "steps": steps}
    result |= {"steps_at_which_pairs_came_in": grown, "pairs": TASKS[task][2], "trained_pairs": TASKS[task][1]}
    result["exact"] = exact(args, model, task, seed)
    if model.backbone.fam_length:
        result["ablations"] = {ablation: exact(args, model, task, seed, ablation) for ablation in ABLATIONS}
    return result


def main(argv=None):
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "recall.json"
    found = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    for task, name, seed in itertools.product(args.tasks, args.systems, args.seeds):
        key = f"{task}, {label(args, name)}, seed {seed}"
        if key in found["runs"]:
            continue
        print(f"{key}: at most {args.steps} steps", flush=True)
        result = run(args, name, task, seed)
        if path.exists():  # another call may have added to it
            found["runs"] = json.loads(path.read_text())["runs"]
        found["runs"][key] = result
        found |= {**run_record("examples.recall", args, argv), "chance": 1 / args.symbols, "rows": ROWS}
        path.write_text(json.dumps(found, indent=1) + "\n")
    for task in args.tasks:
        least, most = TASKS[task][1]
        print(f"\n{task}: right answers in %, {ROWS} rows, by number of pairs (trained on {least} to {most})")
        print(f"{'':<44}" + "".join(f"{n:>7}" for n in TASKS[task][2]) + "   numbers of state")
        for key, result in found["runs"].items():
            if key.startswith(task):
                cells = "".join(f"{100 * v:>7.1f}" for v in result["exact"])
                print(f"{key.removeprefix(task + ', '):<44}{cells}   {result['state_numbers']:,}")


if __name__ == "__main__":
    main()
