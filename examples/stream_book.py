"""Reads a novel chapter by chapter, stops, and continues under another backend from the session on disk.

A small character model trains for some minutes on one novel by Jane Austen, on carried state: each row of a batch reads
its part of the book from start to end. Then it reads another novel as a single stream. After some chapters the session
is saved to a safetensors file; a second process with another backend loads it and continues, and must agree with the
stream that never stopped.

    KERAS_BACKEND=jax python -m examples.stream_book --resume torch --out out/book
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np

import keras_fam
from examples.datasets.austen import austen, chapters

VOCABULARY = 97  # printable ASCII, the end of a line, and one for all others
BLOCK, CHUNK = 64, 256


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--resume", choices=["jax", "torch", "tensorflow"], default="torch", help="the backend that continues"
    )
    parser.add_argument("--train", default="emma", help="the novel to train on")
    parser.add_argument("--read", default="persuasion", help="the novel to read")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--chapters", type=int, default=6, help="chapters to read, half of them before the stop")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/book"))
    parser.add_argument("--resumed", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def encode(text):
    ids = np.frombuffer(text.encode("ascii", "replace"), "uint8").astype("int32")
    return np.where(ids == 10, 95, np.where((ids >= 32) & (ids < 127), ids - 32, 96)).astype("int32")


class Rows(keras.utils.PyDataset):
    """Row b of every batch reads part b of one text, in order, and returns to its start at the end."""

    def __init__(self, ids, rows, steps):
        super().__init__()
        length = len(ids) // rows
        self.parts, self.steps, self.chunks = ids[: rows * length].reshape(rows, length), steps, (length - 1) // CHUNK

    def __len__(self):
        return self.steps

    def __getitem__(self, i):
        first = i % self.chunks * CHUNK
        part = self.parts[:, first : first + CHUNK + 1]
        reset = np.full(len(part), first == 0)
        return {"token_ids": part[:, :-1], "reset": reset}, part[:, 1:]


def bits_per_character(logits, ids):
    """Mean bits of the characters after the first, each from the logits before it."""
    logits = logits[0, :-1].astype("float64")
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, ids[0, 1:, None], -1)[:, 0]
    return float((np.log(np.exp(logits).sum(-1)) - chosen).mean() / np.log(2))


def read(stream, book, first, last):
    results = []
    for number in range(first, last):
        ids = encode(book[number])[None]
        results.append(bits_per_character(stream.predict(ids), ids))
        print(
            f"{keras.backend.backend():<11} chapter {number + 1:>2}: {ids.size:>6} characters, "
            f"{results[-1]:.5f} bits each; read so far {stream.position[0]:>7}",
            flush=True,
        )
    return results


def main(argv=None):
    args = arguments(argv)
    books = austen(args.out.parent / "austen")
    book, half = chapters(books[args.read]), args.chapters // 2
    model, session, report = args.out / "lm.keras", args.out / "session.safetensors", args.out / "resumed.json"
    if args.resumed:
        stream = keras_fam.StreamingModel(keras.models.load_model(model), 1)
        stream.load_state(session)
        report.write_text(json.dumps(read(stream, book, half, args.chapters)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    lm = keras_fam.TransformerFAMCausalLM(
        keras_fam.TransformerFAMBackbone(
            VOCABULARY, 2, 128, 4, 384, block_size=BLOCK, memory_segments=1, fam_length=8, memory_update="normalized"
        )
    )
    rows = keras_fam.StreamingModel(lm, args.rows)
    rate = keras.optimizers.schedules.CosineDecay(0.0, args.steps, warmup_target=3e-3, warmup_steps=30)
    rows.compile(keras.optimizers.Adam(rate, clipnorm=1.0))
    text = encode("\n".join(chapters(books[args.train])))
    rows.fit(Rows(text, args.rows, args.steps), verbose=1 if sys.stdout.isatty() else 2)
    lm.save(model)
    stream = keras_fam.StreamingModel(lm, 1)
    read(stream, book, 0, half)
    stream.save_state(session)
    print(f"saved {session} ({session.stat().st_size / 1e6:.2f} MB)")
    options = ["--chapters", str(args.chapters), "--read", args.read, "--out", str(args.out)]
    command = [sys.executable, "-m", "examples.stream_book", "--resumed", *options]
    subprocess.run(command, env={**os.environ, "KERAS_BACKEND": args.resume}, check=True)
    there, here = json.loads(report.read_text()), read(stream, book, half, args.chapters)
    difference = max(abs(a - b) for a, b in zip(there, here, strict=True))
    print(f"resumed under {args.resume} against never stopped: {difference:.1e} bits per character")
    assert difference < 1e-4


if __name__ == "__main__":
    main()
