"""PassKey with the key anywhere in real prose, streamed to a thousand times the longest text trained on.

Trains TransformerFAM whose memory rows are kept or rewritten as a whole (`memory_update="hard_gate"`), TransformerFAM
with the paper's memory, and TransformerBSWA, several seeds each, on carried state: a step reads the next four blocks of
every row's text and then asks for the key, if it has been stated. Texts grow whenever the loss is small. Then held-out
prose is streamed at constant memory, with keys at uniformly random positions of texts of each length, and the question
at the end, in a block of its own. Each answer is also computed with the memory zeroed, frozen at F_0, and shuffled
between rows before that block. Without memory segments all that the block sees of the text is the memory, so ablating
it there gives the numbers of ablating it after every block.

A later call with the same `--out` continues where an earlier one stopped: weights and measured lengths are kept there,
so that models and lengths can be spread over calls.

    KERAS_BACKEND=jax python -m examples.passkey.length --out out/passkey_length
"""

import argparse
import json
import pathlib
import time

import numpy as np
from keras import ops

import keras_fam
from examples.datasets.austen import austen
from examples.datasets.king_james import king_james
from examples.datasets.python_docs import topics_text
from examples.passkey.curriculum import BLOCK, CHUNK, LONGEST, question_tokens
from examples.passkey.results import by_position, first_below, gather, plot
from examples.passkey.training import Training
from examples.record import run_record
from keras_fam.evaluation import ABLATIONS, ablate_memory
from keras_fam.ops.backend import compiled
from keras_fam.tasks import PassKey

PROSE = {
    "held_out": "held-out prose of Python's documentation",
    "austen": "Austen's novels",
    "king_james": "the King James Bible",
}
MODELS = {  # title and settings by name
    "hard_gate": ("FAM (hard gate)", {"memory_update": "hard_gate"}),
    "paper": ("FAM (paper)", {}),
    "bswa": ("BSWA", {"fam_length": 0}),
}


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1000], help="times the longest")
    parser.add_argument("--rows", type=int, default=64, help="texts of each length and seed")
    parser.add_argument("--texts", type=int, default=0, help="another number gives other keys, positions and prose")
    parser.add_argument("--prose", choices=list(PROSE), default="held_out", help="the prose that is read in the end")
    parser.add_argument("--write-steps", type=int, default=3000, help="most steps of learning to write")
    parser.add_argument("--climb-steps", type=int, default=4000, help="most steps of the climb through the levels")
    parser.add_argument("--steps", type=int, default=1500, help="steps at the last level, at a rate that falls to 0")
    parser.add_argument("--final-steps", type=int, default=3000, help="steps after that, from half the rate to 0")
    parser.add_argument("--digits", type=int, default=4)
    parser.add_argument("--hidden-dim", type=int, default=96, help="of every model; heads have 16")
    parser.add_argument("--replaced", type=float, default=0.4, help="largest share of words replaced in training")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/passkey_length"))
    parser.add_argument("--draw", action="store_true", help="only collect and draw the results in --out")
    return parser.parse_args(argv)


def make_task(args, seed=0, key_position="anywhere"):
    """The task that models are trained on."""
    return PassKey(topics_text(), digits=args.digits, key_position=key_position, vocabulary_size=400, seed=seed)


def make_reading(task, args):
    """The task of the texts that are read and their split: possibly other prose, with the tokenizer of the training."""
    if args.prose == "held_out":
        return task, "held_out"
    folder = args.out.parent / args.prose
    if args.prose == "austen":
        documents = ["\n".join(lines) for lines in austen(folder).values()]
    else:
        documents = list(king_james(folder).values())
    return PassKey(documents, digits=args.digits, key_position="anywhere", tokenizer=task.tokenizer), "train"


def make_model(task, width, **changes):
    settings = {"fam_length": 8, "memory_segments": 0, "block_size": BLOCK, **changes}
    backbone = keras_fam.TransformerFAMBackbone(task.vocabulary_size, 2, width, width // 16, 2 * width, **settings)
    model = keras_fam.TransformerFAMCausalLM(backbone)
    model.build()
    return model


class Reader:
    """Streams texts through a model, computing logits for the question alone."""

    chunk = 32 * BLOCK

    def __init__(self, model, args):
        self.model, self.rows, self.digits = model, args.rows, args.digits
        self.read = compiled(lambda ids, state: model.backbone.advance(ids, state, aligned=True)[1], self.variables)
        self.logits = compiled(lambda ids, state: model.advance(ids, state, aligned=True)[0], self.variables)

    def variables(self):
        return self.model.variables

    def answers(self, ids, state):
        """Greedy answers `[B, digits]` to a question, under teacher forcing (see `keras_fam.tasks.accuracy`)."""
        logits = self.logits(ops.convert_to_tensor(ids), state)
        return ops.convert_to_numpy(ops.argmax(logits[:, -self.digits - 1 : -1], axis=-1))

    def measure(self, task, split, tokens, seed):
        """Which rows are right, and where their keys are, for texts of `tokens` tokens before the question."""
        started, state = time.perf_counter(), self.model.get_initial_state(self.rows)
        total, has_memory = tokens + question_tokens(task), bool(self.model.backbone.fam_length)
        for part in task.stream(self.rows, None, self.chunk, total_tokens=total, seed=seed, split=split):
            if part["start"] == tokens:
                break
            if has_memory or part["start"] == tokens - self.chunk:  # BSWA sees only its window: skip the rest
                state = self.read(ops.convert_to_tensor(part["token_ids"]), state)
        states = {"": state}
        if has_memory:
            rng = np.random.default_rng(seed)
            states |= {ablation: ablate_memory(self.model, state, ablation, rng) for ablation in ABLATIONS}
        right = {name: (self.answers(part["token_ids"], s) == part["keys"]).all(1) for name, s in states.items()}
        return {
            "filler_tokens": total - task.template_tokens,
            "tokens_since_key": [int(tokens - end) for end in part["statement_ends"]],
            "right": {name: list(map(int, rows)) for name, rows in right.items()},
            "memory_rms": [float(ops.sqrt(ops.mean(ops.square(x.fam)))) for x in state.layers if len(x.fam)],
            "seconds": round(time.perf_counter() - started, 1),
        }


def run(name, seed, args):
    """Trains and measures one model; skips what an earlier call finished."""
    title, settings = MODELS[name]
    weights, path = args.out / f"{name}_seed{seed}.weights.h5", args.out / f"{name}_seed{seed}.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    task = make_task(args, seed)
    training = Training(
        lambda seed, key_position: make_task(args, seed, key_position),
        lambda: make_model(task, args.hidden_dim, **settings),
        seed,
        args,
    )
    model = training.run(result, weights, lambda: path.write_text(json.dumps(result) + "\n"))
    reader, (reading, split) = Reader(model, args), make_reading(task, args)
    found = result["lengths"].setdefault(texts_read(args), {})
    for factor in args.factors:
        if str(factor) in found:
            continue
        got = reader.measure(reading, split, LONGEST * CHUNK * BLOCK * factor, seed + 1 + 1000 * args.texts)
        found[str(factor)] = got
        exact = ", ".join(
            f"{ablation or 'exact'} {100 * np.mean(right):.1f}" for ablation, right in got["right"].items()
        )
        print(f"{title}, seed {seed}, {factor} times: {exact} %, {got['seconds']:.0f} s", flush=True)
        path.write_text(json.dumps(result) + "\n")


def texts_read(args):
    """The name of the texts in the results."""
    return f"{PROSE[args.prose]}, texts {args.texts}"


def main(argv=None):
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.draw:
        for name in args.models:
            for seed in args.seeds:
                run(name, seed, args)
    exact, details = gather(args.out, {name: title for name, (title, _) in MODELS.items()})
    task, read, longest = make_task(args), texts_read(args), LONGEST * CHUNK * BLOCK
    result = {
        **run_record("examples.passkey.length", args, argv),
        "longest_text_trained": longest,
        "digits": args.digits,
        "chance": task.chance,
        "held_out_tokens_before_they_repeat": task.available_tokens("held_out"),
        "exact": exact,
        "drawn": read,
        "first_below_95_percent": {
            texts: {title: first_below(by_factor) for title, by_factor in lines.items()}
            for texts, lines in exact.items()
        },
        "by_position": by_position(args.out, "hard_gate", read, longest),
        "models": details,
    }
    (args.out / "passkey_length.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, f"PassKey, key at a random position in {PROSE[args.prose]}", args.out / "passkey_length.png")
    for title, by_factor in exact.get(read, {}).items():
        cells = (f"{f}: {100 * np.mean(list(by_factor[f].values())):.1f}" for f in sorted(by_factor, key=int))
        print(f"{title:<38}" + "  ".join(cells))


if __name__ == "__main__":
    main()
