"""Kills training runs at random steps, resumes them, and compares every loss with that of an uninterrupted run.

    python -m examples.verification.resume --backends jax,torch,tensorflow --kills 2 --out out/resume.json

Each run is a process of its own and is killed by SIGKILL, without a chance to save. Dropout and noise on the memory
draw from seed generators, Adam has moments, rows carry state across steps, and the order of documents is random: all of
it must be restored for the losses to be equal.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

MODULE = "examples.verification.resume"


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backends", default="jax,torch,tensorflow")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="batches in an epoch")
    parser.add_argument("--every", type=int, default=7, help="batches after which progress is saved")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="seed of the steps at which runs are killed")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--worker", type=Path, default=None, help="internal: a run in this folder")
    return parser.parse_args(argv)


def worker(args):
    """Trains, resuming what is in the folder, and appends a line per batch."""
    import keras

    import keras_fam
    from keras_fam.data import DocumentRows
    from keras_fam.training import SaveProgress

    class Losses(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.first = rows.position

        def on_train_batch_end(self, batch, logs=None):
            with open(args.worker / "losses", "a") as file:
                file.write(f"{self.first + batch} {float(logs['loss'])!r}\n")

    keras.utils.set_random_seed(int.from_bytes(os.urandom(2), "little") if (args.worker / "losses").exists() else 0)
    rng = np.random.default_rng(0)
    texts = [np.cumsum(rng.integers(1, 3, n)) % 50 for n in rng.integers(100, 1000, 20)]
    backbone = keras_fam.TransformerFAMBackbone(
        50,
        2,
        32,
        4,
        64,
        block_size=16,
        memory_segments=1,
        fam_length=4,
        dropout=0.1,
        memory_update=keras_fam.Residual(noise=0.1),
    )
    stream = keras_fam.StreamingModel(keras_fam.TransformerFAMCausalLM(backbone), 4)
    stream.compile(keras.optimizers.Adam(1e-3))
    rows = DocumentRows(texts, 4, 64, steps_per_epoch=args.steps)
    progress = SaveProgress(args.worker / "progress.safetensors", stream, rows, every=args.every)
    progress.fit(args.epochs, callbacks=[Losses()], verbose=0)


def start(argv, backend, folder):
    environment = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, "-m", MODULE, *argv, "--worker", str(folder)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    errors = process.communicate()[1]
    if process.returncode:
        raise SystemExit(errors[-4000:])


def lines(folder):
    path = folder / "losses"
    return path.read_text().splitlines() if path.exists() else []


def losses(folder):
    """Pairs `(batch, loss)`; batches repeated after a kill occur twice."""
    return [(int(number), float(loss)) for number, loss in map(str.split, lines(folder))]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    if args.worker:
        return worker(args)
    rng, reports = np.random.default_rng(args.seed), []
    for backend in args.backends.split(","):
        with tempfile.TemporaryDirectory() as folder:
            whole, broken = Path(folder) / "whole", Path(folder) / "broken"
            whole.mkdir()
            broken.mkdir()
            finish(start(argv, backend, whole))
            expected, stops = dict(losses(whole)), []
            for part in range(args.kills):
                total = args.epochs * args.steps
                stops.append(int(rng.integers(part * total // args.kills + 1, (part + 1) * total // args.kills)))
                process = start(argv, backend, broken)
                while not lines(broken) or losses(broken)[-1][0] < stops[-1]:
                    if process.poll() is not None:
                        raise SystemExit(process.stderr.read()[-4000:])
                    time.sleep(0.002)
                process.send_signal(signal.SIGKILL)
                process.communicate()
                stops[-1] = losses(broken)[-1][0]
            finish(start(argv, backend, broken))
            found = losses(broken)
        assert {number for number, _ in found} == set(expected), "batches were skipped"
        report = {
            "backend": backend,
            "batches": len(expected),
            "killed_after_batch": stops,
            "batches_taken_again": len(found) - len(expected),
            "largest_difference": max(abs(loss - expected[number]) / expected[number] for number, loss in found),
        }
        reports.append(report)
        print(json.dumps(report), flush=True)
    if args.out:
        from examples.record import run_record

        result = {"runs": reports, **run_record(MODULE, args, argv)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
