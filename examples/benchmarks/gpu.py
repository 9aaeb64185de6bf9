"""TransformerFAM on one GPU: prefill, train step and decode, against BSWA and against full attention.

    python -m examples.benchmarks.gpu --out gpu.json              # JAX and torch, whatever is installed; about an hour
    python -m examples.benchmarks.gpu --small                     # everything at small sizes, on a CPU, in a minute

The model has the shape of the paper's 1B (18 layers, width 1536, 12 heads, S 1024, m 3, F 64) and random weights, in
bfloat16. Systems: `fam`; `bswa` (the same without memory); `full`, the same width and depth with full attention
through the backend's fused kernel, up to `--longest-full` tokens. Each task of a system runs in its own process,
shortest inputs first, so that the peak memory after an input is that of the input. Running out of memory and other
failures are reported.

prefill: T tokens of one row, in bfloat16 weights; the last hidden state is fetched. FAM and BSWA read one
    chunk at a time, full attention reads all tokens at once, without keeping caches.
train: one step with Adafactor (mixed bfloat16, remat; cross-entropy over the whole vocabulary, in pieces).
decode: one token after a context, `--rows` rows; full attention has a cache of that size.

`share` is the throughput of the model's arithmetic (matrix products of the forward pass; three times that for training,
without rematerialization) relative to that of one large bfloat16 matrix product in the same process. Times are medians
of `--repeats` calls, or of as many as fit into `--seconds`, after a first call that compiles (decoding on torch: after
the calls before a graph is traced).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

K = 1024
SIZES = {
    "prefill": [8 * K, 32 * K, 128 * K, 256 * K, 1024 * K],
    "train": [32 * K, 128 * K],
    "decode": [32 * K, 128 * K],
}
SMALL = {"prefill": [64, 256], "train": [64], "decode": [64]}
SMALL_MODEL = {"vocabulary_size": 128, "num_layers": 1, "hidden_dim": 32, "num_query_heads": 2, "intermediate_dim": 64}
SMALL_MODEL |= {"block_size": 16, "memory_segments": 1, "fam_length": 4}
SYSTEMS = ("fam", "bswa", "full")
RESULT = "result: "  # prefix of the output lines with results
LOSS_PIECE = 2048  # tokens in a piece of the loss


def settings_of(args):
    """Keywords of the backbone: the paper's 1B, or a small one."""
    import keras_fam

    settings = keras_fam.model_config("paper_1b", random_state_passing=0.0, memory_update=args.memory_update)
    return settings | (SMALL_MODEL if args.small else {})


def make_model(args, training):
    """An untrained backbone; if `training`, a compiled `keras.Model` that returns mean losses."""
    import keras

    keras.utils.set_random_seed(0)
    settings = settings_of(args)
    dtype = "mixed_bfloat16" if training else "bfloat16"
    if args.system == "full":
        from examples.benchmarks.peers.full_attention import FullAttention

        names = ("vocabulary_size", "num_layers", "hidden_dim", "num_query_heads", "intermediate_dim")
        model = FullAttention(**{name: settings[name] for name in names}, remat=training, dtype=dtype)
    else:
        import keras_fam

        settings["fam_length"] = settings["fam_length"] if args.system == "fam" else 0
        model = keras_fam.TransformerFAMBackbone(
            **settings, remat=training, blocks_per_step=args.train_blocks if training else None, dtype=dtype
        )
    model.build()
    return model


def work_per_token(args, length, decode=False):
    """Operations per token of a forward pass: products with weights and attention, without the embedding."""
    s = settings_of(args)
    D, L, M = s["hidden_dim"], s["num_layers"], s["intermediate_dim"]
    layer = 2 * (4 * D * D + 2 * D * M)
    if args.system == "full":
        keys = length if decode else length / 2
        return L * (layer + 4 * D * keys)
    S, F = s["block_size"], s["fam_length"] if args.system == "fam" else 0
    keys = F + S * s["memory_segments"] + S / 2
    memory = F / S * (layer + 4 * D * (F + S))
    return L * (layer + 4 * D * keys + memory)


def seconds(function):
    start = perf_counter()
    function()
    return perf_counter() - start


def matrix_throughput(small):
    """Operations per second of a large bfloat16 matrix product."""
    import keras
    from keras import ops

    from keras_fam.ops.backend import compiled

    size, products = (256, 2) if small else (8192, 20)
    a = ops.cast(keras.random.normal((size, size), seed=0), "bfloat16") * size**-0.5

    def chain(a):
        x = a
        for _ in range(products):
            x = ops.matmul(x, a)
        return x[0, :1]

    run = compiled(chain, list)
    times = [seconds(lambda: ops.convert_to_numpy(ops.cast(run(a), "float32"))) for _ in range(8)]
    return 2 * size**3 * products / median(times[3:])


def prefill(args):
    """A function of a length: a function that reads so many tokens and waits for the last hidden state."""
    from keras import ops

    from keras_fam.ops.backend import compiled

    model, vocabulary = make_model(args, training=False), settings_of(args)["vocabulary_size"]

    def last(hidden):
        return ops.cast(hidden[:, -1], "float32")

    def step(ids, state):
        hidden, state = model.advance(ids, state, aligned=True)
        return last(hidden), state

    whole = compiled(lambda ids: last(model(ids)), lambda: model.variables)
    run = compiled(step, lambda: model.variables, record="gpu")

    def at(length):
        ids = np.random.default_rng(0).integers(0, vocabulary, (1, length)).astype("int32")
        if args.system == "full":
            return lambda: ops.convert_to_numpy(whole(ops.convert_to_tensor(ids)))
        size = min(length, args.blocks_per_step * model.block_size)

        def read():
            state = model.get_initial_state(1)
            for first in range(0, length, size):
                hidden, state = run(ops.convert_to_tensor(ids[:, first : first + size]), state)
            return ops.convert_to_numpy(hidden)

        return read

    return at


def train(args):
    """A function of a length: a function that runs one train step and waits for the loss."""
    import keras
    from keras import ops

    from keras_fam.ops.backend import remat
    from keras_fam.ops.scan import scan

    model, vocabulary = make_model(args, training=True), settings_of(args)["vocabulary_size"]

    class WithLoss(keras.Model):
        """`(ids, targets)` to the mean cross-entropy, with logits for `LOSS_PIECE` tokens at a time."""

        def __init__(self):
            super().__init__(dtype=model.dtype_policy)
            self.backbone, self.built = model, True

        def call(self, inputs, training=None):
            ids, targets = inputs
            hidden, length = self.backbone(ids, training=training), ids.shape[1]
            count = max(1, length // LOSS_PIECE)

            def piece(total, x):
                # Not through the embedding layer: in a mixed model Keras computes its reverse call in float32.
                kernel = ops.cast(ops.convert_to_tensor(model.token_embedding.embeddings), x["hidden"].dtype)
                logits = ops.cast(ops.matmul(x["hidden"], ops.transpose(kernel)), "float32")
                loss = keras.losses.sparse_categorical_crossentropy(x["targets"], logits, from_logits=True)
                return total + ops.sum(loss), (total,)

            if training:
                piece = remat(piece, model.trainable_variables)
            xs = {"hidden": ops.reshape(hidden, (count, -1, hidden.shape[-1]))}
            xs["targets"] = ops.reshape(targets, (count, -1))
            zero = ops.zeros((), "float32")
            total, _ = scan(piece, zero, xs, (zero,))
            return ops.expand_dims(total / length, 0)

    whole = WithLoss()
    whole.compile("adafactor", loss=lambda y_true, y_pred: ops.mean(y_pred))

    def at(length):
        ids = np.random.default_rng(0).integers(0, vocabulary, (1, length + 1)).astype("int32")
        inputs = (ids[:, :-1], ids[:, 1:])
        return lambda: float(whole.train_on_batch(inputs, np.zeros((1,), "float32"), return_dict=True)["loss"])

    return at


def step_program(step, variables):
    """A compiled `step(ids, state)`; on JAX the new state reuses the buffers of the old one."""
    import keras

    from keras_fam.ops.backend import compiled

    if os.environ["KERAS_BACKEND"] == "torch":
        return compiled(step, lambda: variables, record="anywhere")
    import jax

    def pure(values, state, ids):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return step(ids, state)

    program = jax.jit(pure, donate_argnums=1)
    return lambda ids, state: program([v.value for v in variables], state, ids)


def decode(args):
    """A function of a context length: a function that reads one token per row and waits for its logits."""
    import keras
    from keras import ops

    model, rows = make_model(args, training=False), args.rows
    ids = np.random.default_rng(0).integers(0, settings_of(args)["vocabulary_size"], (rows, 1)).astype("int32")
    ids = ops.convert_to_tensor(ids)

    def logits(hidden):
        return ops.cast(model.token_embedding(hidden[:, -1], reverse=True), "float32")

    def over_cache(ids, state):
        caches, position = state
        hidden, caches = model.step(ids, caches, position)
        return logits(hidden), (caches, position + 1)

    def stream(ids, state):
        hidden, state = model.advance(ids, state)
        return logits(hidden), state

    run = step_program(over_cache if args.system == "full" else stream, model.variables)

    def at(length):
        if args.system == "full":
            held = (model.get_cache(rows, length + 64 * args.repeats), ops.convert_to_tensor(np.int32(length)))
        else:  # a state has constant size, so one context represents all; this one has full segments
            held = model.get_initial_state(rows)
            full = ops.full((rows,), model.block_settings["memory_segments"], "int32")
            held = held._replace(position=held.position._replace(block_index=full))
        held = keras.tree.map_structure(ops.copy, held)  # without shared buffers

        def read():
            nonlocal held
            found, held = run(ids, held)
            return ops.convert_to_numpy(found)

        return read

    return at


TASKS = {"prefill": prefill, "train": train, "decode": decode}


def peak_bytes():
    """Peak memory of the device; None if the backend does not report it (CPUs)."""
    if os.environ["KERAS_BACKEND"] == "torch":
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def device_name():
    if os.environ["KERAS_BACKEND"] == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    import jax

    return jax.local_devices()[0].device_kind


def measure(args, lengths):
    """Yields the results of one task of one system."""
    from keras_fam.ops.torch_graph import WARMUP_CALLS

    throughput, backend = matrix_throughput(args.small), os.environ["KERAS_BACKEND"]
    at = TASKS[args.task](args)
    for length in lengths:
        run = at(length)
        compiling = seconds(run)
        if args.task == "decode":  # torch traces its graph after some calls
            for _ in range(WARMUP_CALLS):
                run()
        times, most = [], args.repeats * (16 if args.task == "decode" else 1)
        while len(times) < most and sum(times) <= args.seconds:
            times.append(seconds(run))
        taken = median(times)
        tokens = args.rows if args.task == "decode" else length
        work = tokens * work_per_token(args, length, args.task == "decode") * (3 if args.task == "train" else 1)
        yield {
            "length": length,
            "device": device_name(),
            "seconds": taken,
            "all_seconds": times,
            "first_call_seconds": compiling,
            "tokens_per_second": tokens / taken,
            "peak_bytes": peak_bytes(),
            "matrix_product_per_second": throughput,
            "share": work / taken / throughput,
            "versions": {name: metadata.version(name) for name in ("keras", backend)},
        }


def run_child(argv, backend, system, task, lengths):
    """Yields the results of `measure` in a new process; a result with `"error"` for the length at which it fails."""
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, "KERAS_BACKEND": backend, "PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        "-m",
        "examples.benchmarks.gpu",
        *argv,
        "--child",
        ",".join(map(str, lengths)),
        "--system",
        system,
    ]
    lines, found = [], 0
    with subprocess.Popen(
        [*command, "--task", task], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        for line in child.stdout:
            if line.startswith(RESULT):
                found += 1
                yield json.loads(line.removeprefix(RESULT))
            elif line.strip():
                lines.append(line.strip())
    if found < len(lengths):
        lines = lines or [f"exit status {child.returncode}"]
        memory = [line for line in lines if "out of memory" in line.lower() or "RESOURCE_EXHAUSTED" in line]
        error = "out of memory: " + memory[0] if memory else lines[-1]
        yield {"length": lengths[found], "error": error[:300]}


def row(result):
    name = f"{result['backend']:6}{result['task']:9}{result['system']:6}{result['length']:>9}"
    if "error" in result:
        return f"{name}  {result['error']}"
    peak = "-" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**30:.1f}"
    speed = f"{result['seconds'] * 1e3:11.1f} ms{result['tokens_per_second']:12.0f} /s"
    return f"{name}{speed}{100 * result['share']:8.1f} %{peak:>8}"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="jax,torch", help="of which those that are installed are used")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--tasks", default="prefill,train,decode")
    parser.add_argument("--small", action="store_true", help="small model and inputs, for a CPU")
    parser.add_argument("--lengths", help="tokens for all tasks, instead of the defaults")
    parser.add_argument("--rows", type=int, default=1, help="rows that decode together")
    parser.add_argument("--blocks-per-step", type=int, default=8, help="blocks that a prefill reads at a time")
    parser.add_argument("--train-blocks", type=int, default=2, help="blocks between checkpoints of a train step")
    parser.add_argument("--memory-update", choices=("residual", "normalized"), default="residual")
    parser.add_argument("--longest-full", type=int, default=256 * K, help="most tokens read with full attention")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls (of a token: 16 times as many)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time after which no call is started")
    parser.add_argument("--out", type=Path, help="where to write a JSON file")
    for name in ("child", "system", "task"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        for result in measure(args, map(int, args.child.split(","))):
            print(RESULT + json.dumps(result), flush=True)
        return
    results = []
    print(f"{'':6}{'':9}{'':6}{'tokens':>9}{'time':>14}{'tokens':>15}{'share':>10}{'GiB':>8}", flush=True)
    for backend in args.backends.split(","):
        if find_spec(backend) is None:
            print(f"{backend} is not installed", flush=True)
            continue
        for task in args.tasks.split(","):
            sizes = (
                [int(n) for n in args.lengths.split(",")] if args.lengths else (SMALL if args.small else SIZES)[task]
            )
            for system in args.systems.split(","):
                lengths = sorted(n for n in sizes if system != "full" or n <= args.longest_full)
                for found in run_child(argv, backend, system, task, lengths) if lengths else ():
                    results.append({"backend": backend, "task": task, "system": system, **found})
                    print(row(results[-1]), flush=True)
                    if args.out:
                        args.out.parent.mkdir(parents=True, exist_ok=True)
                        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
                        args.out.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    if any("error" in r and "memory" not in r["error"] for r in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
