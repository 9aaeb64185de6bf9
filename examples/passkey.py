"""PassKey in a long real text: a key is stated, then comes prose, then the question (the paper's Fig. 3a and 10).

Trains three small models from scratch, side by side: TransformerFAM with a normalised memory that is disturbed by noise
in training, with the paper's memory, and TransformerBSWA of the same window. Each training row reads one text across
steps: a step reads the next chunk from the state that the last step left, and asks for the key on the side. So no step
is long, and the memory is trained on what it will meet. Then texts much longer than any trained on, with held-out
prose, are streamed at constant memory. Prints accuracy by filler length, for FAM also with its memory knocked out;
writes `passkey.json` and `passkey.png`.

    python examples/passkey.py --backend jax --seed 0 --out out/passkey
"""

import argparse
import json
import os
import pathlib
import platform
import time


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"], default=None, help="KERAS_BACKEND")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400, help="training steps of each model")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/passkey"))
    parser.add_argument("--filler", choices=["prose", "paper"], default="prose")
    parser.add_argument("--digits", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=400)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--memory-segments", type=int, default=0, help="the paper's PassKey models have 0")
    parser.add_argument("--fam-length", type=int, default=8)
    parser.add_argument("--chunk-blocks", type=int, default=2, help="blocks that a training step reads")
    parser.add_argument("--longest", type=int, default=16, help="chunks in the longest text trained on")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--fam-noise", type=float, default=0.7, help="noise on the normalised memory in training")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=["normalized", "paper", "bswa", "normalized_only", "noise_only"],
        default=["normalized", "paper", "bswa"],
    )
    parser.add_argument("--test-rows", type=int, default=64)
    parser.add_argument(
        "--test-factors", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="times the longest trained"
    )
    return parser.parse_args()


ARGS = arguments()
if ARGS.backend:
    os.environ["KERAS_BACKEND"] = ARGS.backend
os.environ.setdefault("KERAS_BACKEND", "jax")

import keras  # noqa: E402  (the backend is chosen before)
import numpy as np  # noqa: E402
from passkey_parts import ReadingOn  # noqa: E402

import keras_fam  # noqa: E402
from examples.datasets.python_docs import topics_text  # noqa: E402
from keras_fam.evaluation import ABLATIONS, ablate_memory  # noqa: E402
from keras_fam.tasks import PassKey, accuracy  # noqa: E402
from keras_fam.tasks.passkey import QUESTION  # noqa: E402

MODELS = {
    "normalized": ("FAM (normalized, noise)", {"fam_feedback": "normalized", "fam_noise": ARGS.fam_noise}),
    "paper": ("FAM (paper)", {}),
    "bswa": ("BSWA", {"fam_length": 0}),
    # Ablations: one of the two additions alone.
    "normalized_only": ("FAM (normalized)", {"fam_feedback": "normalized"}),
    "noise_only": ("FAM (paper, noise)", {"fam_noise": ARGS.fam_noise}),
}


class Texts(keras.utils.PyDataset):
    """Training batches: the next chunk of every row's text, and a block that asks for the row's key.

    Rows come in four groups, each with texts of its own. Their length starts at one chunk and grows to `--longest`;
    half of the groups stay with short texts, so that keys are written often.
    """

    groups = 4

    def __init__(self, task):
        super().__init__()
        self.task, self.tokens, self.growing = task, ARGS.chunk_blocks * ARGS.block_size, 1.0
        self.rng = np.random.default_rng(ARGS.seed)
        self.question = np.asarray(task.tokenizer.encode(QUESTION))
        texts = [self.texts(ARGS.batch // self.groups, seed, seed % 2 == 0) for seed in range(self.groups)]
        self.steps = [self.step(i, texts) for i in range(ARGS.steps)]

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, i):
        return self.steps[i]

    def texts(self, rows, seed, short):
        """Chunks `(token_ids, keys, is_first)` of one text after another, without end."""
        rng = np.random.default_rng([ARGS.seed, seed])
        while True:
            chunks = rng.integers(1, int(min(self.growing, 3) if short else self.growing) + 1)
            total = (chunks + 1) * self.tokens  # the task's own question stands in the last chunk, which is left out
            stream = self.task.stream(rows, None, self.tokens, total_tokens=total, seed=rng)
            for i, chunk in zip(range(chunks), stream, strict=False):
                yield chunk["token_ids"], chunk["keys"], i == 0

    def step(self, i, texts):
        progress = i / ARGS.steps
        self.growing = 1 + (ARGS.longest - 1) * min(max((progress - 0.25) / 0.35, 0.0), 1.0)
        chunks, keys, first = zip(*(next(text) for text in texts), strict=True)
        keys = np.concatenate(keys)
        first = np.repeat(first, len(chunks[0]))
        block, targets, weights = self.ask(keys)
        return {"chunk": np.concatenate(chunks), "question": block, "first": first}, targets, weights

    def ask(self, keys):
        """A block of prose that ends with the question and the key; only the key's digits count."""
        rows, size = len(keys), ARGS.block_size
        room = size - len(self.question) - ARGS.digits
        prose = self.task.batch(rows, total_tokens=room + self.task.template_tokens, seed=self.rng)["token_ids"]
        end = prose.shape[1] - len(self.question) - ARGS.digits
        question = np.tile(self.question, (rows, 1))
        block = np.concatenate([prose[:, end - room : end], question, keys], axis=1).astype("int32")
        weights = np.zeros(block.shape, "float32")
        weights[:, -ARGS.digits - 1 : -1] = size / ARGS.digits
        return block, np.roll(block, -1, axis=1), weights


def train(name, task):
    """A language model trained with `fit` and Keras' progress bar."""
    keras.utils.set_random_seed(ARGS.seed)
    title, changes = MODELS[name]
    settings = {"fam_length": ARGS.fam_length, "memory_segments": ARGS.memory_segments, **changes}
    backbone = keras_fam.TransformerFAMBackbone(
        task.vocabulary_size,
        ARGS.layers,
        ARGS.width,
        ARGS.heads,
        2 * ARGS.width,
        block_size=ARGS.block_size,
        **settings,
    )
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.build()
    reader = ReadingOn(lm, ARGS.batch, ARGS.block_size)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, ARGS.steps, warmup_target=ARGS.learning_rate, warmup_steps=min(50, ARGS.steps // 10 + 1)
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    reader.compile(keras.optimizers.Adam(rate, clipnorm=1.0), loss=loss)
    print(f"{title}: {ARGS.steps} steps", flush=True)
    started = time.perf_counter()
    reader.fit(Texts(task), epochs=1, verbose=1, shuffle=False)
    return lm, time.perf_counter() - started


def test(model, task, blocks, how=None):
    """Exact-match accuracy on held-out prose, streamed; memory is knocked out after every block if `how` is given."""
    total = blocks * ARGS.block_size
    stream = keras_fam.StreamingModel(model, ARGS.test_rows)
    step = ARGS.block_size if how else stream.step_size
    last, expected, rng = [], None, np.random.default_rng(ARGS.seed)
    for chunk in task.stream(ARGS.test_rows, None, step, total_tokens=total, seed=ARGS.seed + 1, split="held_out"):
        if how and chunk["start"]:
            stream.set_state(ablate_memory(model, stream.state, how, rng))
        logits = stream.predict(chunk["token_ids"])
        last = [*last[-1:], logits]  # the answer's last digits may stand in the chunk before
        expected = chunk
    logits = np.concatenate(last, axis=1)
    places = total - logits.shape[1]
    answers = np.take_along_axis(logits, (expected["answer_positions"] - places)[..., None], axis=1)
    return accuracy(answers, expected["keys"]).exact


def plot(table, lengths, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, row in table.items():
        known = [(x, y) for x, y in zip(lengths, row, strict=True) if y is not None]
        knocked = "memory" in name
        axes.plot(*zip(*known, strict=True), marker="o", linestyle=":" if knocked else "-", label=name)
    axes.axvline(lengths[0], color="grey", linewidth=1)
    axes.annotate(" longest text trained on", (lengths[0], 0.5), color="grey")
    axes.set(xscale="log", xlabel="tokens between key and question", ylabel="exact keys", ylim=(-0.02, 1.02))
    axes.set_title(f"PassKey in real prose, {ARGS.backend or keras.backend.backend()}, seed {ARGS.seed}")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main():
    started = time.perf_counter()
    task = PassKey(
        topics_text() if ARGS.filler == "prose" else None,
        digits=ARGS.digits,
        vocabulary_size=ARGS.vocabulary,
        seed=ARGS.seed,
    )
    longest = ARGS.chunk_blocks * ARGS.longest + 1
    blocks = [longest * factor for factor in ARGS.test_factors]
    lengths = [count * ARGS.block_size - task.template_tokens for count in blocks]
    table, seconds = {}, {}
    for key in ARGS.models:
        name = MODELS[key][0]
        model, seconds[name] = train(key, task)
        table[name] = [test(model, task, count) for count in blocks]
        if key == "normalized":
            for how in ABLATIONS:  # one block at a time is slow: the first three lengths tell
                row = [test(model, task, count, how) for count in blocks[:3]]
                table[f"{name}, memory {how}"] = row + [None] * (len(blocks) - 3)
    print(f"\nexact keys in %, {ARGS.test_rows} held-out rows; chance {100 * task.chance:.3g} %")
    print(f"{'filler tokens':<34}" + "".join(f"{n:>9,}" for n in lengths))
    print(f"{'times the longest trained':<34}" + "".join(f"{n:>9}" for n in ARGS.test_factors))
    for name, row in table.items():
        print(f"{name:<34}" + "".join(f"{'' if v is None else f'{100 * v:.1f}':>9}" for v in row))
    ARGS.out.mkdir(parents=True, exist_ok=True)
    result = {
        "arguments": {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in vars(ARGS).items()},
        "filler_tokens": lengths,
        "exact": table,
        "chance": task.chance,
        "training_seconds": seconds,
        "seconds": time.perf_counter() - started,
        "versions": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            "keras_fam": keras_fam.__version__,
        },
        "backend": keras.backend.backend(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    (ARGS.out / "passkey.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(table, lengths, ARGS.out / "passkey.png")
    print(f"\n{result['seconds']:.0f} s in all; wrote {ARGS.out / 'passkey.json'} and {ARGS.out / 'passkey.png'}")


if __name__ == "__main__":
    main()
