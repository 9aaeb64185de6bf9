"""What training needs, as files for a machine without a network: weights, token ids, tokenizer and Python packages."""

import json
import pathlib
import shutil
import subprocess
import sys

import keras
import numpy as np

import keras_fam
from examples.datasets.austen import austen, chapters
from examples.datasets.king_james import king_james
from examples.smollm2 import weights
from examples.smollm2.books import HELD_OUT, TRAINING, plain
from examples.smollm2.memory.prepared import PARTS, Prepared, build, read_config
from examples.smollm2.model import load
from examples.smollm2.untrained import text_ids

WHEELS = ("gguf", "keras", "namex", "optree")  # what a machine with JAX, h5py and tokenizers may lack
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def prepare(args):
    """Writes `args.data/part1`, `args.data/part2`, …, each small enough for one transfer; checks what it wrote."""
    if args.data.exists():
        shutil.rmtree(args.data)
    folders = [args.data / f"part{i + 1}" for i in range(args.parts)]
    for folder in folders:
        folder.mkdir(parents=True)
    source = load()
    lm = keras_fam.hub.convert(
        source, block_size=128, memory_segments=1, fam_length=16, weights="share", seed=args.seed
    )
    config = {
        key: value for key, value in lm.backbone.get_config().items() if key not in ("name", "dtype", "trainable")
    }
    (folders[0] / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folders[0] / "tokenizer.json").write_text(source.preprocessor.tokenizer._tokenizer.to_str())
    write_texts(folders[0] / "texts.npz", source.preprocessor.tokenizer, args)
    split_weights(folders)
    if args.wheels:
        download_wheels(folders[0] / "wheels", args.wheels, args.python)
    check_model(lm, args)
    report_sizes(folders, args.limit)


def write_texts(path, tokenizer, args):
    """Token ids of the books: prose for training and held-out prose with its gaps, and the one long stream."""
    novels = austen(args.cache / "austen")
    texts = {title: "\n\n".join(plain(chapter) for chapter in chapters(lines)) for title, lines in novels.items()}
    bible = list(king_james(args.cache / "king_james").values())
    fast = tokenizer._tokenizer
    train = keras_fam.tasks.Prose.from_texts([*(texts[title] for title in TRAINING), *bible], fast)
    held_out = keras_fam.tasks.Prose.from_texts([texts[title] for title in HELD_OUT], fast)
    args.out.mkdir(parents=True, exist_ok=True)
    stream = text_ids(tokenizer, args.out)
    arrays = {"stream": stream.astype("uint16")}
    for name, prose in (("train", train), ("held_out", held_out)):
        arrays |= {f"{name}_ids": prose.token_ids.astype("uint16"), f"{name}_gaps": prose.gaps.astype("int32")}
    np.savez_compressed(path, **arrays)
    print(f"{len(train):,} tokens to train on, {len(held_out):,} held out, {len(stream):,} in the stream")


def split_weights(folders):
    """The weights' file, cut into as many pieces as there are folders."""
    whole = weights.find_file().read_bytes()
    size = -(-len(whole) // len(folders))
    for i, folder in enumerate(folders):
        (folder / f"{PARTS}{i}").write_bytes(whole[i * size : (i + 1) * size])


def download_wheels(folder, names, python):
    """Packages for another machine, with `pip download`; Keras in the version that is installed here."""
    names = [f"keras=={keras.__version__}" if name == "keras" else name for name in names]
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
    subprocess.run([*command, "--python-version", python, "--implementation", "cp", "-d", folder, *names], check=True)


def check_model(lm, args):
    """The model made from the files is the converted one: AssertionError unless logits agree."""
    prepared = Prepared(args.data)
    here = build(prepared, read_config(prepared, args), dtype="float32", seed=args.seed)
    ids = prepared.held_out.token_ids[None, :300]
    theirs, ours = (keras.ops.convert_to_numpy(model(ids)) for model in (lm, here))
    difference = float(np.abs(theirs - ours).max())
    assert difference < 1e-3, f"the logits of the prepared model differ by {difference}"
    print(f"the prepared model is the converted one: no logit differs by more than {difference:.1e}")


def report_sizes(folders, limit):
    """Prints what each transfer of a folder beside the repository's own files weighs; RuntimeError above the limit."""
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], capture_output=True, check=True).stdout
    own = sum(_size(name) for name in listed.decode().split("\0") if name)
    for folder in folders:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        total = (size + own) / 2**20
        print(f"{folder}: {size / 2**20:.1f} MiB, with the repository's files {total:.1f} MiB")
        if total > limit:
            raise RuntimeError(
                f"A transfer may have {limit} MiB; {folder} and the repository's files have {total:.1f} MiB. Raise "
                "--parts, or --limit."
            )


def _size(name):
    path = pathlib.Path(name)
    return path.stat().st_size if path.is_file() and not path.is_symlink() else 0
