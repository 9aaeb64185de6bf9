"""PassKey in a long real text: a key is stated, then comes prose, then the question (the paper's Fig. 3a and 10).

Trains three small models from scratch: TransformerFAM whose memory rows are kept or rewritten as a whole,
TransformerFAM with the paper's memory, and TransformerBSWA with the same window. Each training row reads one text
across steps: a step reads the next chunk from the state that the last step left, and asks for the key in a block of its
own, which the text does not see. So no step is long, and the memory is trained on the states that it will meet. Then
held-out texts, much longer than those trained on, are streamed at constant memory. Prints the accuracy by filler
length, for FAM also with its memory ablated; writes `passkey.json` and `passkey.png`.

    KERAS_BACKEND=jax python -m examples.passkey.demo --seed 0 --out out/passkey
"""

import argparse
import json
import pathlib
import sys
import time

import keras
import numpy as np

import keras_fam
from examples.datasets.python_docs import topics_text
from examples.passkey.question import QuestionTrainer
from examples.record import run_record
from keras_fam.evaluation import ABLATIONS, ablate_memory
from keras_fam.tasks import PassKey, accuracy
from keras_fam.tasks.passkey import QUESTION

MODELS = ("hard_gate", "normalized", "paper", "bswa", "normalized_only", "noise_only")


def options():
    """Options of the task, the model and its training, which the scripts of this folder share."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--seed", type=int, default=0)
    shared.add_argument("--steps", type=int, default=2400, help="training steps of each model")
    shared.add_argument("--filler", choices=["prose", "paper"], default="prose")
    shared.add_argument("--digits", type=int, default=5)
    shared.add_argument("--vocabulary", type=int, default=400)
    shared.add_argument("--width", type=int, default=64)
    shared.add_argument("--layers", type=int, default=2)
    shared.add_argument("--heads", type=int, default=4)
    shared.add_argument("--block-size", type=int, default=32)
    shared.add_argument("--memory-segments", type=int, default=0, help="the paper's PassKey models have 0")
    shared.add_argument("--fam-length", type=int, default=8)
    shared.add_argument("--chunk-blocks", type=int, default=2, help="blocks that a training step reads")
    shared.add_argument("--longest", type=int, default=16, help="chunks in the longest text trained on")
    shared.add_argument("--batch", type=int, default=32)
    shared.add_argument("--learning-rate", type=float, default=2e-3)
    shared.add_argument("--noise", type=float, default=0.7, help="noise on the memory in training, where there is some")
    return shared


def parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, parents=[options()]
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["hard_gate", "paper", "bswa"])
    parser.add_argument("--test-rows", type=int, default=64)
    parser.add_argument(
        "--test-factors", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="times the longest text trained on"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/passkey"))
    return parser


def models(args):
    """Title and settings of each model by name; the last two have one of the two additions of `normalized`."""
    return {
        "hard_gate": ("FAM (hard gate)", {"memory_update": "hard_gate"}),
        "normalized": ("FAM (normalized, noise)", {"memory_update": keras_fam.Normalized(noise=args.noise)}),
        "paper": ("FAM (paper)", {}),
        "bswa": ("BSWA", {"fam_length": 0}),
        "normalized_only": ("FAM (normalized)", {"memory_update": "normalized"}),
        "noise_only": ("FAM (paper, noise)", {"memory_update": keras_fam.Residual(noise=args.noise)}),
    }


def make_task(args):
    """The task that the options describe."""
    documents = topics_text() if args.filler == "prose" else None
    return PassKey(documents, digits=args.digits, vocabulary_size=args.vocabulary, seed=args.seed)


class Texts(keras.utils.PyDataset):
    """Training batches: the next chunk of every row's text, and a block that asks for the row's key.

    Rows come in four groups, each with texts of its own. Their length starts at one chunk and grows to `--longest`;
    half of the groups stay with short texts, so that keys are written often.
    """

    groups = 4

    def __init__(self, task, args):
        super().__init__()
        self.task, self.args = task, args
        self.tokens, self.longest = args.chunk_blocks * args.block_size, 1.0
        self.rng = np.random.default_rng(args.seed)
        self.question = np.asarray(task.tokenizer.encode(QUESTION))
        texts = [self.texts(args.batch // self.groups, seed, seed % 2 == 0) for seed in range(self.groups)]
        self.steps = [self.step(i, texts) for i in range(args.steps)]

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, i):
        return self.steps[i]

    def texts(self, rows, seed, short):
        """Yields chunks `(token_ids, keys, is_first)` of one text after another, without end."""
        rng = np.random.default_rng([self.args.seed, seed])
        while True:
            chunks = rng.integers(1, int(min(self.longest, 3) if short else self.longest) + 1)
            total = (chunks + 1) * self.tokens  # the task's own question is in the last chunk, which is left out
            stream = self.task.stream(rows, None, self.tokens, total_tokens=total, seed=rng)
            for i, chunk in zip(range(chunks), stream, strict=False):
                yield chunk["token_ids"], chunk["keys"], i == 0

    def step(self, i, texts):
        progress = i / self.args.steps
        self.longest = 1 + (self.args.longest - 1) * min(max((progress - 0.25) / 0.35, 0.0), 1.0)
        chunks, keys, first = zip(*(next(text) for text in texts), strict=True)
        keys = np.concatenate(keys)
        first = np.repeat(first, len(chunks[0]))
        block, targets, weights = self.ask(keys)
        return {"chunk": np.concatenate(chunks), "question": block, "first": first}, targets, weights

    def ask(self, keys):
        """A block of prose that ends with the question and the key; only the key's digits have a weight."""
        rows, size, digits = len(keys), self.args.block_size, self.args.digits
        room = size - len(self.question) - digits
        prose = self.task.batch(rows, total_tokens=room + self.task.template_tokens, seed=self.rng)["token_ids"]
        end = prose.shape[1] - len(self.question) - digits
        question = np.tile(self.question, (rows, 1))
        block = np.concatenate([prose[:, end - room : end], question, keys], axis=1).astype("int32")
        weights = np.zeros(block.shape, "float32")
        weights[:, -digits - 1 : -1] = size / digits
        return block, np.roll(block, -1, axis=1), weights


def train(title, settings, task, args, backbone_class=keras_fam.TransformerFAMBackbone):
    """Trains a language model with `fit`; returns it and the seconds that it took."""
    keras.utils.set_random_seed(args.seed)
    settings = {"fam_length": args.fam_length, "memory_segments": args.memory_segments, **settings}
    backbone = backbone_class(
        task.vocabulary_size,
        args.layers,
        args.width,
        args.heads,
        2 * args.width,
        block_size=args.block_size,
        **settings,
    )
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.build()
    trainer = QuestionTrainer(lm, args.batch, args.block_size)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, args.steps, warmup_target=args.learning_rate, warmup_steps=min(50, args.steps // 10 + 1)
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer.compile(keras.optimizers.Adam(rate, clipnorm=1.0), loss=loss)
    print(f"{title}: {args.steps} steps", flush=True)
    started = time.perf_counter()
    trainer.fit(Texts(task, args), epochs=1, verbose=1 if sys.stdout.isatty() else 2, shuffle=False)
    return lm, time.perf_counter() - started


def exact(model, task, blocks, args, ablation=None):
    """Exact-match accuracy on held-out prose, streamed, with the memory ablated after every block if asked for."""
    total = blocks * args.block_size
    stream = keras_fam.StreamingModel(model, args.test_rows)
    step = args.block_size if ablation else stream.step_size
    last, expected, rng = [], None, np.random.default_rng(args.seed)
    for chunk in task.stream(args.test_rows, None, step, total_tokens=total, seed=args.seed + 1, split="held_out"):
        if ablation and chunk["start"]:
            stream.set_state(ablate_memory(model, stream.state, ablation, rng))
        logits = stream.predict(chunk["token_ids"])
        last = [*last[-1:], logits]  # the answer may begin in the chunk before the last one
        expected = chunk
    logits = np.concatenate(last, axis=1)
    offset = total - logits.shape[1]
    answers = np.take_along_axis(logits, (expected["answer_positions"] - offset)[..., None], axis=1)
    return accuracy(answers, expected["keys"]).exact


def plot(table, lengths, title, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, row in table.items():
        known = [(x, y) for x, y in zip(lengths, row, strict=True) if y is not None]
        ablated = "memory" in name
        axes.plot(*zip(*known, strict=True), marker="o", linestyle=":" if ablated else "-", label=name)
    axes.axvline(lengths[0], color="grey", linewidth=1)
    axes.annotate(" longest text in training", (lengths[0], 0.5), color="grey")
    axes.set(xscale="log", xlabel="tokens between key and question", ylabel="exact keys", ylim=(-0.02, 1.02))
    axes.set_title(title)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main(argv=None):
    args = parser().parse_args(argv)
    started, task = time.perf_counter(), make_task(args)
    longest = args.chunk_blocks * args.longest + 1
    blocks = [longest * factor for factor in args.test_factors]
    lengths = [count * args.block_size - task.template_tokens for count in blocks]
    table, seconds = {}, {}
    for name in args.models:
        title, settings = models(args)[name]
        model, seconds[title] = train(title, settings, task, args)
        table[title] = [exact(model, task, count, args) for count in blocks]
        if name == "hard_gate":
            for ablation in ABLATIONS:  # one block at a time is slow: the first three lengths are enough
                row = [exact(model, task, count, args, ablation) for count in blocks[:3]]
                table[f"{title}, memory {ablation}"] = row + [None] * (len(blocks) - 3)
    print(f"\nexact keys in %, {args.test_rows} held-out rows; chance {100 * task.chance:.3g} %")
    width = 2 + max(map(len, [*table, "times the longest text trained on"]))
    print(f"{'filler tokens':<{width}}" + "".join(f"{n:>9,}" for n in lengths))
    print(f"{'times the longest text trained on':<{width}}" + "".join(f"{n:>9}" for n in args.test_factors))
    for title, row in table.items():
        print(f"{title:<{width}}" + "".join(f"{'' if v is None else f'{100 * v:.1f}':>9}" for v in row))
    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        **run_record("examples.passkey.demo", args, argv),
        "filler_tokens": lengths,
        "exact": table,
        "chance": task.chance,
        "training_seconds": seconds,
        "seconds": time.perf_counter() - started,
    }
    (args.out / "passkey.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(
        table,
        lengths,
        f"PassKey, {args.filler} filler, {result['backend']}, seed {args.seed}",
        args.out / "passkey.png",
    )
    print(f"\n{result['seconds']:.0f} s in all; wrote {args.out / 'passkey.json'} and {args.out / 'passkey.png'}")


if __name__ == "__main__":
    main()
