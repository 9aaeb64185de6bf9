"""TransformerFAM against the same model without memory (BSWA) and against full attention: prefill, train step, memory.

    python -m examples.benchmarks.against_attention --systems fam,bswa --block-size 1024 --memory-segments 3 \
        --fam-length 64 --tokens 32768 --layers 4 --remat --out out/bswa.json
    python -m examples.benchmarks.against_attention --systems fam,full --tokens 16384 --layers 2 --out out/full.json

Width, layers, heads and feed-forward are the same. In one process per backend, the systems are timed alternately and
medians are compared: prefill is a whole sequence from the initial state, with the state for decoding (full attention:
outputs alone); a train step is `train_on_batch` with Adam. Peak memory is the largest resident memory of a separate
process for each system, backend and kind of run. Operations are computed from the sizes: matrix products alone, for
the window of a token, and for full attention once for the whole square and once without the masked half.
`--compiled` reports the temporary memory of each compiled JAX program instead, and runs nothing.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

from examples.benchmarks import measuring

SYSTEMS = ("fam", "bswa", "full")


def build(system, args):
    """A built model from token ids `[1, T]` to hidden states; the model to prefill with, and options of that call."""
    import keras

    sizes = {"layers": args.layers, "width": args.width, "heads": args.heads, "intermediate": args.intermediate}
    keras.utils.set_random_seed(0)
    if system == "full":
        from examples.benchmarks.peers.stock_attention import full_attention_model

        model = full_attention_model(vocabulary=args.vocabulary, tokens=args.tokens, **sizes)
        return model, model, {}
    import keras_fam

    backbone = keras_fam.TransformerFAMBackbone(
        args.vocabulary,
        args.layers,
        args.width,
        args.heads,
        args.intermediate,
        block_size=args.block_size,
        memory_segments=args.memory_segments,
        fam_length=args.fam_length if system == "fam" else 0,
        memory_update=args.memory_update,
        blocks_per_step=args.blocks_per_step,
        remat=args.remat,
        scan_layers=args.scan_layers,
    )
    backbone.build()
    inputs = keras.Input((args.tokens,), dtype="int32")
    return keras.Model(inputs, backbone(inputs)), backbone, {"return_state": True}


def prefill(system, args, ids):
    """A function without arguments that reads the tokens, compiled by the backend, and waits."""
    import keras

    from keras_fam.ops.backend import compiled

    _, model, options = build(system, args)
    ids = keras.ops.convert_to_tensor(ids)
    run = compiled(lambda ids: model(ids, training=False, **options), lambda: model.variables)

    def call():
        outputs = run(ids)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        return float(keras.ops.convert_to_numpy(outputs[0, -1, 0]))

    return call


def train(system, args, ids):
    """A function without arguments that runs one train step and returns the loss."""
    import keras

    model, _, _ = build(system, args)
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss="mean_squared_error")
    ids = keras.ops.convert_to_tensor(ids)
    targets = keras.ops.zeros((*ids.shape, args.width))
    return lambda: float(model.train_on_batch(ids, targets, return_dict=True)["loss"])


KINDS = {"prefill": prefill, "train": train}


def temporary_mib(system, kind, args):
    """Temporary memory of a JAX program as reported by the compiler (`memory_analysis`)."""
    import jax
    import keras

    model, streams, options = build(system, args)

    def spec(v):
        return jax.ShapeDtypeStruct(v.shape, v.dtype)

    ids = jax.ShapeDtypeStruct((1, args.tokens), "int32")
    if kind == "train":
        model.compile(optimizer=keras.optimizers.Adam(1e-3), loss="mean_squared_error")
        model.optimizer.build(model.trainable_variables)
        groups = model.trainable_variables, model.non_trainable_variables, model.optimizer.variables
        state = tuple([spec(v) for v in group] for group in (*groups, model.metrics_variables))
        targets = jax.ShapeDtypeStruct((1, args.tokens, args.width), "float32")
        lowered = jax.jit(model.train_step, donate_argnums=0).lower(state, (ids, targets))
    else:

        def read(values, ids):
            with keras.StatelessScope(state_mapping=list(zip(streams.variables, values, strict=True))):
                return streams(ids, training=False, **options)

        lowered = jax.jit(read).lower([spec(v) for v in streams.variables], ids)
    return lowered.compile().memory_analysis().temp_size_in_bytes / 2**20


def operations(args):
    """Operations of the matrix products of a forward pass, per token and layer."""
    D, S, m, T = args.width, args.block_size, args.memory_segments, args.tokens
    weights = 4 * D * D + 3 * D * args.intermediate

    def layer(rows_per_token, keys):
        return 2 * weights * (1 + rows_per_token) + 4 * D * keys

    F = args.fam_length
    found = {
        "fam": layer(F / S, F + (m + 1) * S) + 4 * D * (F + S) * F / S,
        "bswa": layer(0, (m + 1) * S),
        "full, whole square": layer(0, T),
        "full, masked half skipped": layer(0, T / 2),
    }
    return {name: {"per token and layer": n, "over fam": n / found["fam"]} for name, n in found.items()}


def child(args):
    ids = np.random.default_rng(0).integers(0, args.vocabulary, (1, args.tokens)).astype("int32")
    if args.memory_of:
        system, kind = args.memory_of.split(":")
        run = KINDS[kind](system, args, ids)
        run()
        built = measuring.peak_mib()
        run()
        return {"first run": built, "peak MiB": measuring.peak_mib()}
    if args.compiled:
        return {kind: {s: temporary_mib(s, kind, args) for s in args.systems} for kind in args.what}
    result = {}
    for kind in args.what:
        functions = {system: KINDS[kind](system, args, ids) for system in args.systems}
        result[kind] = measuring.take_turns(functions, args.repeats)
        del functions
    return result


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv

    def words(text):
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", type=words, default=["fam", "full"], help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--what", type=words, default=["prefill", "train"])
    parser.add_argument("--backends", type=words, default=["jax", "torch"])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, help="default: width / 64")
    parser.add_argument("--intermediate", type=int, help="default: 2 * width")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--memory-segments", type=int, default=1)
    parser.add_argument("--fam-length", type=int, default=32)
    parser.add_argument("--memory-update", default="residual")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--blocks-per-step", type=int)
    parser.add_argument("--remat", nargs="?", const=True, default=False, help="or `layers`")
    parser.add_argument("--scan-layers", action="store_true")
    parser.add_argument("--compiled", action="store_true", help="JAX: only the temporary memory of compiled programs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="only times")
    parser.add_argument("--no-times", action="store_true", help="only peak memory")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", help="where to write a JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.heads = args.heads or max(1, args.width // 64)
    args.intermediate = args.intermediate or 2 * args.width
    if args.child:
        measuring.use_cores(args.threads)
        Path(args.child).write_text(json.dumps(child(args)))
        return
    first = args.systems[0]
    settings = {name: value for name, value in vars(args).items() if name not in ("child", "memory_of", "out")}
    result = {"settings": settings, "machine": measuring.machine(args.threads), "operations": operations(args)}
    result["versions"] = measuring.versions("keras", *args.backends)
    if args.compiled:
        result["temporary MiB, jax"] = found = measuring.run_child(
            "examples.benchmarks.against_attention", argv, "jax", args.threads
        )
        for kind, by_system in found.items():
            print(f"{kind}, temporary MiB: " + ", ".join(f"{name} {mib:.0f}" for name, mib in by_system.items()))
        measuring.write(result, args.out)
        return
    for backend in args.backends:
        found = (
            {}
            if args.no_times
            else measuring.run_child("examples.benchmarks.against_attention", argv, backend, args.threads)
        )
        for kind in args.what:
            peaks = {}
            for system in [] if args.no_memory else args.systems:
                of = [*argv, "--memory-of", f"{system}:{kind}"]
                peaks[system] = measuring.run_child("examples.benchmarks.against_attention", of, backend, args.threads)[
                    "peak MiB"
                ]
            found.setdefault(kind, {})
            for system in args.systems:
                entry = found[kind].setdefault(system, {})
                if peaks:
                    entry["peak MiB"] = peaks[system]
            for quantity in ("median", "peak MiB"):
                ours = found[kind][first].get(quantity)
                for system in args.systems[1:] if ours else []:
                    ratio = found[kind][system][quantity] / ours
                    found[kind].setdefault("ratios", {})[f"{quantity}: {system} / {first}"] = ratio
                    print(f"{backend} {kind} {quantity}: {first} {ours:.4g}, {system} {ratio * ours:.4g}: {ratio:.3f}")
        result[backend] = found
        measuring.write(result, args.out)


if __name__ == "__main__":
    main()
