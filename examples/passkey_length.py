"""PassKey with the key anywhere in real prose, streamed to a thousand times the longest text trained on.

Trains TransformerFAM by the recipe for length, with the paper's memory, and TransformerBSWA, several seeds each, on
carried state: a step reads the next four blocks of every row's text and asks for the key on the side, if it has been
stated. Texts and, for the recipe, noise grow whenever the loss is small. Then held-out prose is streamed at constant
memory, with keys at uniformly random places of texts of each length, and the question at the end, in a block of its
own. Each answer is also asked for with the memory zeroed, frozen at F_0, and shuffled between rows before that block.
Without memory segments all that the block sees of the text is the memory, so zeroing it there gives the numbers of
zeroing it after every block.

Goes on where an earlier call with the same `--out` stopped: weights and measured lengths are kept there, so that models
and lengths can be spread over calls, and the lengths be measured without training from weights that are there.

    python examples/passkey_length.py --backend jax --out out/passkey_length
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import time

PROSE = {
    "held_out": "held-out prose of Python's documentation",
    "austen": "Austen's novels",
    "king_james": "the King James Bible",
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"], default="jax")
    parser.add_argument("--models", nargs="+", choices=["recipe", "paper", "bswa"], default=["recipe", "paper", "bswa"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1000], help="of LONGEST")
    parser.add_argument("--rows", type=int, default=64, help="texts of each length and seed")
    parser.add_argument(
        "--texts", type=int, default=0, help="another number: other keys, places and parts of the prose"
    )
    parser.add_argument("--prose", choices=list(PROSE), default="held_out", help="what is read in the end")
    parser.add_argument("--write-steps", type=int, default=4000, help="most steps that teach writing alone, each time")
    parser.add_argument("--write-attempts", type=int, default=2, help="each from other initial weights")
    parser.add_argument("--climb-steps", type=int, default=14000, help="most steps that climb the levels")
    parser.add_argument("--steps", type=int, default=6000, help="steps at the last level, at a rate that falls to 0")
    parser.add_argument("--last-steps", type=int, nargs="*", default=[4000, 6000], help="of each of two last rounds")
    parser.add_argument("--digits", type=int, default=4)
    parser.add_argument("--hidden-dim", type=int, default=96, help="of every model; heads have 16")
    parser.add_argument("--fam-feedback", default="binary", help="of the recipe")
    parser.add_argument("--fam-noise", type=float, default=0.8, help="of the recipe")
    parser.add_argument("--replaced", type=float, default=0.4, help="of the words of a text, at most, in training")
    parser.add_argument("--last-replaced", type=float, default=0.4, help="the same in the last steps")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/passkey_length"))
    parser.add_argument("--draw", action="store_true", help="only put together what is there")
    return parser.parse_args()


ARGS = arguments()
READ = f"{PROSE[ARGS.prose]}, texts {ARGS.texts}"
os.environ["KERAS_BACKEND"] = ARGS.backend

import keras  # noqa: E402  (the backend is chosen before)
import numpy as np  # noqa: E402
from keras import ops  # noqa: E402
from passkey_course import BLOCK, CHUNK, LAST, LONGEST, question_tokens  # noqa: E402
from passkey_results import by_place, first_below, gather, plot  # noqa: E402
from passkey_training import Training  # noqa: E402

import keras_fam  # noqa: E402
from examples.datasets.austen import austen  # noqa: E402
from examples.datasets.king_james import king_james  # noqa: E402
from examples.datasets.python_docs import topics_text  # noqa: E402
from keras_fam.evaluation import ABLATIONS, ablate_memory  # noqa: E402
from keras_fam.ops.backend import compiled  # noqa: E402
from keras_fam.tasks import PassKey  # noqa: E402

MODELS = {
    "recipe": (
        f"FAM ({ARGS.fam_feedback}, noise)",
        {"fam_feedback": ARGS.fam_feedback, "fam_noise": ARGS.fam_noise},
    ),
    "paper": ("FAM (paper)", {}),
    "bswa": ("BSWA", {"fam_length": 0}),
}


def make_task(seed=0, key_position="anywhere"):
    return PassKey(topics_text(), digits=ARGS.digits, key_position=key_position, vocabulary_size=400, seed=seed)


def make_reading(task):
    """The task of the texts that are read: other prose in the words of the training."""
    if ARGS.prose == "held_out":
        return task, "held_out"
    folder = ARGS.out.parent / ARGS.prose
    if ARGS.prose == "austen":
        documents = ["\n".join(lines) for lines in austen(folder).values()]
    else:
        documents = list(king_james(folder).values())
    settings = {"digits": ARGS.digits, "key_position": "anywhere", "tokenizer": task.tokenizer}
    return PassKey(documents=documents, **settings), "train"


def make_model(task, **changes):
    settings = {"fam_length": 8, "memory_segments": 0, "block_size": BLOCK, **changes}
    width = ARGS.hidden_dim
    backbone = keras_fam.TransformerFAMBackbone(task.vocabulary_size, 2, width, width // 16, 2 * width, **settings)
    model = keras_fam.TransformerFAMCausalLM(backbone)
    model.build()
    return model


class Reader:
    """Streams texts through a model without computing what nobody looks at: of a chunk, only the state is asked for."""

    chunk = 32 * BLOCK

    def __init__(self, model):
        self.model = model
        self.read = compiled(lambda ids, state: model.backbone.advance(ids, state, aligned=True)[1], self.variables)
        self.logits = compiled(lambda ids, state: model.advance(ids, state, aligned=True)[0], self.variables)

    def variables(self):
        return self.model.variables

    def answers(self, ids, state):
        """Greedy answers [B, digits] to a question, under teacher forcing (see `keras_fam.tasks.accuracy`)."""
        logits = self.logits(ops.convert_to_tensor(ids), state)
        return ops.convert_to_numpy(ops.argmax(logits[:, -ARGS.digits - 1 : -1], axis=-1))

    def measure(self, task, split, tokens, seed):
        """Which rows are right, and where their keys stand, for texts of a number of tokens before the question."""
        started, state = time.perf_counter(), self.model.get_initial_state(ARGS.rows)
        total, has_memory = tokens + question_tokens(task), bool(self.model.backbone.fam_length)
        for part in task.stream(ARGS.rows, None, self.chunk, total_tokens=total, seed=seed, split=split):
            if part["start"] == tokens:
                break
            if has_memory or part["start"] == tokens - self.chunk:  # BSWA sees no further back: skip what it forgets
                state = self.read(ops.convert_to_tensor(part["token_ids"]), state)
        states = {"": state}
        if has_memory:
            rng = np.random.default_rng(seed)
            states.update({how: ablate_memory(self.model, state, how, rng) for how in ABLATIONS})
        right = {how: (self.answers(part["token_ids"], s) == part["keys"]).all(1) for how, s in states.items()}
        return {
            "filler_tokens": total - task.template_tokens,
            "tokens_since_key": [int(tokens - end) for end in part["statement_ends"]],
            "right": {how: list(map(int, rows)) for how, rows in right.items()},
            "memory_rms": [float(ops.sqrt(ops.mean(ops.square(x.fam)))) for x in state.layers if len(x.fam)],
            "seconds": round(time.perf_counter() - started, 1),
        }


def run(name, seed):
    """Trains and measures one model; what an earlier call finished is not done again."""
    task = make_task(seed)
    weights, path = ARGS.out / f"{name}_seed{seed}.weights.h5", ARGS.out / f"{name}_seed{seed}.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    training = Training(make_task, lambda **settings: make_model(task, **settings), MODELS[name][1], seed, ARGS)
    model = training.run(result, weights, lambda: path.write_text(json.dumps(result) + "\n"))
    reader, (reading, split) = Reader(model), make_reading(task)
    found = result["lengths"].setdefault(READ, {})
    for factor in ARGS.factors:
        if str(factor) in found:
            continue
        got = reader.measure(reading, split, LONGEST * CHUNK * BLOCK * factor, seed + 1 + 1000 * ARGS.texts)
        found[str(factor)] = got
        exact = ", ".join(f"{how or 'exact'} {100 * np.mean(right):.1f}" for how, right in got["right"].items())
        print(f"{MODELS[name][0]}, seed {seed}, {factor} times: {exact} %, {got['seconds']:.0f} s", flush=True)
        path.write_text(json.dumps(result) + "\n")


def main():
    if len(ARGS.last_steps) > len(LAST):
        sys.exit(f"--last-steps: there are {len(LAST)} rounds at the end; received {len(ARGS.last_steps)} numbers")
    if ARGS.write_attempts < 1:
        sys.exit(f"--write-attempts: writing begins at least once; received {ARGS.write_attempts}")
    ARGS.out.mkdir(parents=True, exist_ok=True)
    if not ARGS.draw:
        for name in ARGS.models:
            for seed in ARGS.seeds:
                run(name, seed)
    titles = {name: title for name, (title, _) in MODELS.items()}
    exact, details = gather(ARGS.out, titles)
    task = make_task()
    result = {
        "command": "python " + " ".join(sys.argv),
        "longest_text_trained": LONGEST * CHUNK * BLOCK,
        "digits": ARGS.digits,
        "chance": task.chance,
        "held_out_tokens_before_they_repeat": task.available_tokens("held_out"),
        "exact": exact,
        "drawn": READ,
        "first_below_95_percent": {
            read: {title: first_below(by_factor) for title, by_factor in lines.items()} for read, lines in exact.items()
        },
        "recipe": by_place(ARGS.out, "recipe", READ, LONGEST * CHUNK * BLOCK),
        "models": details,
        "versions": {"python": platform.python_version(), "keras": keras.__version__},
        "backend": keras.backend.backend(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    (ARGS.out / "passkey_length.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, f"PassKey, key anywhere in {PROSE[ARGS.prose]}", ARGS.out / "passkey_length.png")
    for title, by_factor in exact.get(READ, {}).items():
        cells = (f"{f}: {100 * np.mean(list(by_factor[f].values())):.1f}" for f in sorted(by_factor, key=int))
        print(f"{title:<36}" + "  ".join(cells))


if __name__ == "__main__":
    main()
