"""Real books: bits per byte and next-token accuracy of FAM against BSWA, by distance from the start of the text.

Small language models are trained from scratch on novels by Jane Austen and on the King James Bible, several seeds each,
with a byte-pair vocabulary built from the training text alone. Each row reads one book across steps, on carried state.
Then held-out books are streamed, also with the memory zeroed, frozen and shuffled between texts. Whether tokens beyond
the reach of the window help shows in the comparison with BSWA at distances beyond it.

Every run is kept in `--out`, so that seeds and systems can be spread over calls.

    KERAS_BACKEND=jax python -m examples.books --seeds 0 1 2 --out out/books
"""

import argparse
import json
import pathlib
import time

import keras
import numpy as np
import tokenizers

import keras_fam
from examples.datasets.austen import austen
from examples.datasets.king_james import king_james
from examples.record import run_record
from keras_fam.data import DocumentRows

SYSTEMS = {
    "BSWA": {"fam_length": 0},
    "FAM_N": {"memory_update": "normalized"},
    "FAM": {},
}
TITLES = {"BSWA": "BSWA", "FAM_N": "FAM, normalized", "FAM": "FAM (paper)"}
NOVELS, BOOKS = ("persuasion",), ("Acts", "Job")  # held out
TEXT = 8192  # tokens of a text


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--texts", type=int, default=8, help="largest number of texts read from each source")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/books"))
    return parser.parse_args(argv)


def make_tokenizer(texts, vocabulary_size):
    """Byte-pair encoding without loss: every token stands for whole bytes."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocabulary_size, show_progress=False)
    return tokenizer


def read_books(args):
    """`(documents, held-out texts [rows, TEXT] by source, bytes of each token)`."""
    novels = {title: "\n".join(lines) + "\n" for title, lines in austen(args.out.parent / "austen").items()}
    bible = king_james(args.out.parent / "king_james")
    training = [text for title, text in novels.items() if title not in NOVELS]
    training += [text for book, text in bible.items() if book not in BOOKS]
    tokenizer = make_tokenizer(training, args.vocabulary)

    def encode(text):
        return np.array(tokenizer.encode(text).ids, "int32")

    held_out = {}
    for source, texts in (
        ("Austen", [novels[title] for title in NOVELS]),
        ("King James", [bible[book] for book in BOOKS]),
    ):
        ids = [encode(text) for text in texts]
        pieces = [part[i : i + TEXT] for part in ids for i in range(0, len(part) - TEXT + 1, TEXT)]
        held_out[source] = np.stack(pieces[: args.texts])
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    return (
        [encode(text) for text in training],
        held_out,
        np.array([len(piece) for piece in pieces]),
    )  # one character per byte


def train(args, name, seed, documents, vocabulary_size):
    keras.utils.set_random_seed(seed)
    settings = {"fam_length": args.fam_length, "memory_segments": args.memory_segments, **SYSTEMS[name]}
    backbone = keras_fam.TransformerFAMBackbone(
        vocabulary_size, args.layers, args.width, 4, 2 * args.width, block_size=args.block_size, **settings
    )
    model = keras_fam.TransformerFAMCausalLM(backbone)
    model.build()
    chunk = args.chunk_blocks * args.block_size
    # Rows are reset after TEXT tokens, the length of the texts that are read in the end.
    rows = DocumentRows(documents, args.batch, chunk, longest=TEXT, seed=seed, steps_per_epoch=min(100, args.steps))
    stream = keras_fam.StreamingModel(model, batch_size=args.batch)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, args.steps, warmup_target=args.learning_rate, warmup_steps=min(50, args.steps // 10 + 1)
    )
    stream.compile(keras.optimizers.Adam(rate, clipnorm=1.0), aligned=True)
    started = time.perf_counter()
    stream.fit(rows, epochs=max(1, args.steps // 100), verbose=2)
    return model, time.perf_counter() - started


def trained(args, name, seed, documents, vocabulary_size):
    """A model, trained by this call or an earlier one, and the seconds that it took."""
    path = args.out / f"{name}_seed{seed}.keras"
    times = args.out / f"{name}_seed{seed}.seconds.json"
    if path.exists():
        return keras.models.load_model(path), json.loads(times.read_text())
    print(f"{TITLES[name]}, seed {seed}: {args.steps} steps", flush=True)
    model, seconds = train(args, name, seed, documents, vocabulary_size)
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
        axis.set(title=source, xlabel="tokens read before", ylabel="bits per byte (mean and range over seeds)")
        axis.tick_params(axis="x", labelrotation=30)
        axis.legend(fontsize="small")
    figure.suptitle(f"Held-out books; attention reaches at most {reach} tokens back")
    figure.savefig(path, dpi=110)


def main(argv=None):
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    documents, held_out, sizes = read_books(args)
    print(f"{sum(map(len, documents)):,} tokens to train on, {len(sizes):,} in the vocabulary", flush=True)
    models, seconds = {}, {}
    for seed in args.seeds:
        for name in args.systems:
            model, took = trained(args, name, seed, documents, len(sizes))
            models.setdefault(TITLES[name], []).append(model)
            seconds.setdefault(TITLES[name], []).append(round(took, 1))
    # In each layer a token sees back to the start of the block m before its own.
    reach = args.layers * (args.memory_segments + 1) * args.block_size
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
        **run_record("examples.books", args, argv),
        "held_out": {"novels": NOVELS, "books": BOOKS},
        "training_tokens_in_the_books": sum(map(len, documents)),
        "window_reaches_tokens": reach,
        "training_seconds": seconds,
        "report": report,
    }
    result["versions"]["tokenizers"] = tokenizers.__version__
    (args.out / "books.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(report, reach, args.out / "books.png")


if __name__ == "__main__":
    main()
