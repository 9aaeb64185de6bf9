"""Exports a model under each backend, streams through it from C and from a bare TensorFlow process, and compares.

    python -m examples.serving.load_c [--backends jax torch tensorflow]

Needs gcc, and TensorFlow for its headers and libraries. Ends with an error if a difference exceeds 1e-5.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = pathlib.Path(__file__).parent
ROWS, CHUNKS, TOLERANCE = 3, (1, 7, 1, 8, 20, 3, 1, 1), 1e-5


def export(folder):
    """Exports the model under this process's backend, and saves Keras' outputs for the same tokens."""
    import keras

    import keras_fam
    from examples.serving.small_model import VOCABULARY, small_model
    from keras_fam.export import export_serving

    lm = small_model()
    export_serving(lm, folder, sessions=4)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (ROWS, sum(CHUNKS))).astype("int32")
    expected = keras_fam.StreamingModel(lm, ROWS).predict(tokens)
    np.savez(folder / "keras.npz", tokens=tokens, expected=expected, backend=keras.backend.backend())


def build(folder):
    """Compiles load.c against the libraries of the installed TensorFlow."""
    import tensorflow as tf

    library = pathlib.Path(tf.sysconfig.get_lib())
    program = folder / "load"
    command = ["gcc", "-O2", "-Wall", "-Werror", str(HERE / "load.c"), "-o", str(program)]
    command += ["-I", tf.sysconfig.get_include(), f"-L{library}", f"-Wl,-rpath,{library}"]
    command += [
        f"-l:{next(library.glob(name)).name}" for name in ("libtensorflow_cc.so*", "libtensorflow_framework.so*")
    ]
    subprocess.run(command, check=True)
    return program


def write_plan(exported, tokens, plan):
    """Writes the tensor names of the signatures in saved_model.pb, and the chunks to read."""
    from tensorflow.core.protobuf import saved_model_pb2

    model = saved_model_pb2.SavedModel.FromString((exported / "saved_model.pb").read_bytes())
    signatures = model.meta_graphs[0].signature_def

    def name(signature, side, key):
        return getattr(signatures[signature], side)[key].name.replace(":", " ")

    states = sorted(signatures["init_state"].outputs)
    lines = [f"rows {ROWS}", "batch_size " + name("init_state", "inputs", "batch_size")]
    lines += [f"{key} " + name("step", "inputs", key) for key in ("token_ids", "lengths")]
    lines += ["logits " + name("step", "outputs", "logits"), f"states {len(states)}"]
    for key in states:
        ends = (("init_state", "outputs"), ("step", "inputs"), ("step", "outputs"))
        lines.append(" ".join(name(*end, key) for end in ends))
    lines.append(f"chunks {len(CHUNKS)}")
    for first, size in zip(np.cumsum((0, *CHUNKS)), CHUNKS, strict=False):
        numbers = [size, *[size] * ROWS, *tokens[:, first : first + size].ravel()]
        lines.append(" ".join(map(str, numbers)))
    plan.write_text("\n".join(lines) + "\n")


def run_c(program, folder, tokens):
    write_plan(folder / "1", tokens, folder / "plan.txt")
    done = subprocess.run([program, folder / "1", folder / "plan.txt"], stdout=subprocess.PIPE, text=True, check=True)
    numbers = np.array(done.stdout.split(), "float32")
    sizes = np.array(CHUNKS) * (len(numbers) // sum(CHUNKS))
    parts = np.split(numbers, np.cumsum(sizes)[:-1])
    return np.concatenate([p.reshape(ROWS, size, -1) for p, size in zip(parts, CHUNKS, strict=True)], axis=1)


PLAIN = """
import sys
sys.modules["keras"] = sys.modules["keras_fam"] = None  # an import of either fails
import numpy as np
import tensorflow as tf
folder, *chunks = sys.argv[1:]
signatures = tf.saved_model.load(folder + "/1").signatures
tokens = np.load(folder + "/keras.npz")["tokens"]
state, first, found = signatures["init_state"](batch_size=tf.constant(len(tokens))), 0, []
for size in map(int, chunks):
    chunk = tf.constant(tokens[:, first : first + size])
    results = signatures["step"](token_ids=chunk, lengths=tf.constant([size] * len(tokens)), **state)
    state = {name: x for name, x in results.items() if name.startswith("state_")}
    found.append(results["logits"].numpy())
    first += size
np.save(folder + "/plain.npy", np.concatenate(found, axis=1))
"""


def run_plain(folder):
    subprocess.run([sys.executable, "-c", PLAIN, str(folder), *map(str, CHUNKS)], check=True)
    return np.load(folder / "plain.npy")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["jax", "torch", "tensorflow"])
    parser.add_argument("--export", type=pathlib.Path, help=argparse.SUPPRESS)  # internal: one backend's export
    arguments = parser.parse_args(argv)
    if arguments.export:
        return export(arguments.export)
    worst = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        start = time.perf_counter()
        program = build(pathlib.Path(temporary))
        print(f"load.c built in {time.perf_counter() - start:.1f} s")
        for backend in arguments.backends:
            folder = pathlib.Path(temporary) / backend
            folder.mkdir()
            environment = {**os.environ, "KERAS_BACKEND": backend}
            subprocess.run(
                [sys.executable, "-m", "examples.serving.load_c", "--export", folder], env=environment, check=True
            )
            given = np.load(folder / "keras.npz")
            start = time.perf_counter()
            by_c = run_c(program, folder, given["tokens"])
            seconds = time.perf_counter() - start
            plain = run_plain(folder)
            differences = [float(np.abs(x - given["expected"]).max()) for x in (plain, by_c)]
            worst = max(worst, *differences)
            print(
                f"exported under {given['backend']}: {ROWS} rows, chunks {CHUNKS}, largest logit "
                f"{np.abs(given['expected']).max():.2f}; difference from Keras: "
                f"tf.saved_model.load {differences[0]:.1e}, C {differences[1]:.1e} ({seconds:.1f} s)",
                flush=True,
            )
    if not worst <= TOLERANCE:
        raise SystemExit(f"The largest difference, {worst:.1e}, exceeds {TOLERANCE:.0e}.")


if __name__ == "__main__":
    main()
