"""Real books: bits per byte and next-token accuracy of FAM against BSWA, by distance from the start of the text.

Small language models are trained from scratch on novels by Jane Austen and on the King James Bible, several seeds each,
with a byte-pair vocabulary made from the training text alone. Each row reads one book across steps, on carried state.
Then texts of books held out are streamed, and every model with memory is read again with its memory zeroed, frozen and
shuffled between texts. Whether tokens further back than the window reaches help is seen at distances beyond it, against
BSWA.

Every training is kept in `--out`, so that seeds and systems can be spread over calls.

    python examples/books.py --backend jax --seeds 0 1 2 --out out/books
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import time

SYSTEMS = {
    "BSWA": {"fam_length": 0},
    "FAM_N": {"fam_feedback": "normalized"},
    "FAM": {},
}
TITLES = {"BSWA": "BSWA", "FAM_N": "FAM, normalized", "FAM": "FAM (paper)"}
NOVELS, BOOKS = ("persuasion",), ("Acts", "Job")  # held out
TEXT = 8192  # tokens of a text that is read

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"], default="jax")
parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=["BSWA", "FAM_N"])
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--chunk-blocks", type=int, default=4, help="blocks that gradients pass through")
parser.add_argument("--block-size", type=int, default=32)
parser.add_argument("--fam-length", type=int, default=8)
parser.add_argument("--memory-segments", type=int, default=1)
parser.add_argument("--layers", type=int, default=2)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--vocabulary", type=int, default=1024)
parser.add_argument("--learning-rate", type=float, default=2e-3)
parser.add_argument("--texts", type=int, default=8, help="most texts of each source that are read")
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/books"))
ARGS = parser.parse_args()
os.environ["KERAS_BACKEND"] = ARGS.backend

import keras  # noqa: E402  (the backend is chosen before)
import numpy as np  # noqa: E402
import tokenizers  # noqa: E402

import keras_fam  # noqa: E402
from examples.datasets.austen import austen  # noqa: E402
from examples.datasets.king_james import king_james  # noqa: E402
from keras_fam.data import DocumentRows  # noqa: E402


def make_tokenizer(texts):
    """Byte-pair encoding that loses nothing: every token stands for whole bytes."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocab_size=ARGS.vocabulary, show_progress=False)
    return made


def read_books():
    """`(documents, held out texts by source [rows, TEXT], bytes of each token)`."""
    novels = {title: "\n".join(lines) + "\n" for title, lines in austen(ARGS.out.parent / "austen").items()}
    bible = king_james(ARGS.out.parent / "king_james")
    training = [text for title, text in novels.items() if title not in NOVELS]
    training += [text for book, text in bible.items() if book not in BOOKS]
    tokenizer = make_tokenizer(training)

    def encode(text):
        return np.array(tokenizer.encode(text).ids, "int32")

    held_out = {}
    for source, texts in (
        ("Austen", [novels[title] for title in NOVELS]),
        ("King James", [bible[book] for book in BOOKS]),
    ):
        ids = [encode(text) for text in texts]
        pieces = [part[i : i + TEXT] for part in ids for i in range(0, len(part) - TEXT + 1, TEXT)]
        held_out[source] = np.stack(pieces[: ARGS.texts])
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    return [encode(text) for text in training], held_out, np.array([len(piece) for piece in pieces])  # a sign a byte


def train(name, seed, documents, vocabulary_size):
    keras.utils.set_random_seed(seed)
    settings = {"fam_length": ARGS.fam_length, "memory_segments": ARGS.memory_segments, **SYSTEMS[name]}
    backbone = keras_fam.TransformerFAMBackbone(
        vocabulary_size, ARGS.layers, ARGS.width, 4, 2 * ARGS.width, block_size=ARGS.block_size, **settings
    )
    model = keras_fam.TransformerFAMCausalLM(backbone)
    model.build()
    chunk = ARGS.chunk_blocks * ARGS.block_size
    # A row starts anew after 8,192 tokens, as what is read does.
    rows = DocumentRows(documents, ARGS.batch, chunk, longest=TEXT, seed=seed, steps_per_epoch=min(100, ARGS.steps))
    stream = keras_fam.StreamingModel(model, batch_size=ARGS.batch)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, ARGS.steps, warmup_target=ARGS.learning_rate, warmup_steps=min(50, ARGS.steps // 10 + 1)
    )
    stream.compile(keras.optimizers.Adam(rate, clipnorm=1.0), aligned=True)
    started = time.perf_counter()
    stream.fit(rows, epochs=max(1, ARGS.steps // 100), verbose=2)
    return model, time.perf_counter() - started


def kept(name, seed, documents, vocabulary_size):
    """A model trained by this or an earlier call, and the seconds that it took."""
    path = ARGS.out / f"{name}_seed{seed}.keras"
    times = ARGS.out / f"{name}_seed{seed}.seconds.json"
    if path.exists():
        return keras.models.load_model(path), json.loads(times.read_text())
    print(f"{TITLES[name]}, seed {seed}: {ARGS.steps} steps", flush=True)
    model, seconds = train(name, seed, documents, vocabulary_size)
    times.write_text(json.dumps(seconds) + "\n")
    model.save(path)
    return model, seconds


def plot(report, reach, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(report), figsize=(6 * len(report), 4.2), layout="constrained", squeeze=False)
    for axis, (source, found) in zip(axes[0], report.items(), strict=True):
        names = [f"{a:,}–{'' if b is None else f'{b:,}'}" for a, b in found["buckets"]]
        for title, scores in found["systems"].items():
            bits = np.array(scores["bits_per_byte"]["seeds"], "float64")
            (line,) = axis.plot(
                names, bits.mean(0), marker="o", linestyle=":" if "memory" in title else "-", label=title
            )
            axis.fill_between(names, bits.min(0), bits.max(0), color=line.get_color(), alpha=0.15)
        axis.set(title=source, xlabel="tokens read before", ylabel="bits per byte (mean and span of seeds)")
        axis.tick_params(axis="x", labelrotation=30)
        axis.legend(fontsize="small")
    figure.suptitle(f"Held-out books; the window reaches back at most {reach} tokens")
    figure.savefig(path, dpi=110)


def main():
    ARGS.out.mkdir(parents=True, exist_ok=True)
    documents, held_out, sizes = read_books()
    print(f"{sum(map(len, documents)):,} tokens to train on, {len(sizes):,} in the vocabulary", flush=True)
    models, seconds = {}, {}
    for seed in ARGS.seeds:
        for name in ARGS.systems:
            model, took = kept(name, seed, documents, len(sizes))
            models.setdefault(TITLES[name], []).append(model)
            seconds.setdefault(TITLES[name], []).append(round(took, 1))
    # In each layer a token sees back to the start of the block m before its own.
    reach = ARGS.layers * (ARGS.memory_segments + 1) * ARGS.block_size
    report = {}
    for source, texts in held_out.items():
        boundaries = [0, reach, 1024, 2048, 4096]
        report[source] = keras_fam.evaluate(models, texts, boundaries=boundaries, bytes_per_token=sizes)
        print(f"\n{source}, {len(texts)} texts of {TEXT:,} tokens; bits per byte by tokens read before, mean (spread)")
        print(" " * 34 + "".join(f"{a:>16,}" for a, _ in report[source]["buckets"]) + "   accuracy beyond the window")
        for title, scores in report[source]["systems"].items():
            bits, right = scores["bits_per_byte"], scores["accuracy"]["mean"]
            cells = (
                f"{m:.4f}" + ("" if s is None else f" ({s:.4f})")
                for m, s in zip(bits["mean"], bits["spread"], strict=True)
            )
            weights = np.array(report[source]["tokens"][1:])
            beyond = float((weights * right[1:]).sum() / weights.sum())
            print(f"{title:<34}" + "".join(f"{cell:>16}" for cell in cells) + f"   {100 * beyond:.2f} %")
    result = {
        "command": "python " + " ".join(sys.argv),
        "arguments": {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in vars(ARGS).items()},
        "held_out": {"novels": NOVELS, "books": BOOKS},
        "training_tokens_in_the_books": sum(map(len, documents)),
        "window_reaches_tokens": reach,
        "training_seconds": seconds,
        "report": report,
        "backend": keras.backend.backend(),
        "versions": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    (ARGS.out / "books.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(report, reach, ARGS.out / "books.png")


if __name__ == "__main__":
    main()
