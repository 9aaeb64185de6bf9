"""Time of the data pipelines against that of a train step.

    KERAS_BACKEND=jax python -m examples.benchmarks.data

The model is that of `make demo` (2 layers of width 64), so the step is short. Batches are generated one after the other
in the thread of the step; the script prints both times and the ratio.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import keras
import numpy as np

import keras_fam
from examples.datasets.python_docs import topics_text
from examples.record import run_record
from keras_fam.data import DocumentRows, TaskBatches, pack
from keras_fam.tasks import AssociativeRecall, Copy, PassKey, SeveralKeys


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=8, help="blocks in a chunk or sequence")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args(argv)


def pipelines(args):
    """Datasets by name; all batches have `[B, blocks · S]` tokens."""
    rng, size = np.random.default_rng(0), args.blocks * args.block_size
    texts = [rng.integers(1, 2000, n) for n in rng.integers(1_000, 100_000, 100)]
    short = [rng.integers(1, 2000, n) for n in rng.integers(20, 400, 20_000)]
    tasks = {
        "PassKey": PassKey(topics_text()),
        "several keys": SeveralKeys(topics_text()),
        "associative recall": AssociativeRecall(num_pairs=8, num_keys=4),
        "copy": Copy(length=16),
    }
    found = {
        "documents in rows": DocumentRows(texts, args.batch, size),
        "packed examples in rows": DocumentRows(pack(short, 8_500), args.batch, size),
    }
    for name, task in tasks.items():
        found[name] = TaskBatches(task, args.batch, block_size=args.block_size, blocks=args.blocks)
    return found


def mapped(folder, args):
    """Memory-mapped documents on disk."""
    rng, texts = np.random.default_rng(0), []
    for i in range(20):
        np.save(Path(folder) / f"{i}.npy", rng.integers(1, 2000, 100_000).astype("int32"))
        texts.append(np.load(Path(folder) / f"{i}.npy", mmap_mode="r"))
    return DocumentRows(texts, args.batch, args.blocks * args.block_size)


def seconds(function, repeats):
    found = []
    for i in range(repeats + 2):
        started = time.perf_counter()
        function(i)
        found.append(time.perf_counter() - started)
    return median(found[2:])


def main(argv=None):
    args = arguments(argv)
    keras.utils.set_random_seed(0)
    backbone = keras_fam.TransformerFAMBackbone(
        2000, args.layers, args.width, 4, 2 * args.width, block_size=args.block_size, memory_segments=0, fam_length=8
    )
    stream = keras_fam.StreamingModel(keras_fam.TransformerFAMCausalLM(backbone), args.batch)
    stream.compile("adam")
    with tempfile.TemporaryDirectory() as folder:
        datasets = {**pipelines(args), "documents on disk in rows": mapped(folder, args)}
        rows = datasets["documents in rows"]
        step = seconds(lambda i: stream.train_on_batch(*rows[i]), args.repeats)
        result = {"step_ms": 1e3 * step, "tokens": args.batch * args.blocks * args.block_size, "data_ms": {}}
        print(f"{keras.backend.backend()}: train step {1e3 * step:.1f} ms for {result['tokens']:,} tokens")
        for name, dataset in datasets.items():
            taken = seconds(dataset.__getitem__, args.repeats)
            result["data_ms"][name] = 1e3 * taken
            print(f"{name:<26}{1e3 * taken:7.2f} ms, {100 * taken / step:6.2f} % of a step")
    result.update(
        largest_ratio=max(result["data_ms"].values()) / result["step_ms"],
        **run_record("examples.benchmarks.data", args, argv),
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
