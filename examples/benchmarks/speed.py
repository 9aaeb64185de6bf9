"""Speed of keras_fam against TransformerFAM written by hand for the same backend, with the same weights.

    python -m examples.benchmarks.speed --width 256 --layers 4 --block-size 128 --fam-length 16 --memory-segments 1 \
        --tokens 4096 --batch 1 --backends jax,torch,tensorflow --repeats 7 --out speed.json

One process per backend. In each, forward and train step (Adam, mean of squares) of both versions are timed
alternately, so that other load affects both; medians are compared. keras_fam is used in the ordinary way: a functional
model, trained with `train_on_batch`, which is what `fit` compiles. There is no handwritten version for TensorFlow:
keras_fam on TensorFlow is compared with keras_fam on JAX. For compiled train steps, "compile train" is the time of the
first step minus that of the second, at T and at T/4 tokens: the number of blocks must not matter.
"""

import argparse
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from time import perf_counter

import numpy as np

from examples.benchmarks import measuring

AGREEMENT = 1e-4  # relative to the largest output

# Parameter of the versions by hand -> the same variable of a `keras_fam.TransformerFAMBlock`, in the same layout.
BLOCK_VARIABLES = {
    "attention_norm_scale": lambda block: block.attention_norm.scale,  # [D]
    "query_kernel": lambda block: block.attention.query.kernel,  # [D, N, H]
    "key_kernel": lambda block: block.attention.key.kernel,  # [D, N, H]
    "value_kernel": lambda block: block.attention.value.kernel,  # [D, N, H]
    "output_kernel": lambda block: block.attention.output_projection.kernel,  # [N, H, D]
    "feedforward_norm_scale": lambda block: block.feedforward_norm.scale,  # [D]
    "gate_kernel": lambda block: block.gate.kernel,  # [D, M]
    "up_kernel": lambda block: block.up.kernel,  # [D, M]
    "down_kernel": lambda block: block.down.kernel,  # [M, D]
    "initial_fam": lambda block: block.attention.initial_fam_rows,  # [F, D]
}


def copy_weights(block, params):
    """Assigns the parameters of one layer by hand to a built `TransformerFAMBlock`; both must have the same names."""
    assert len(block.weights) == len(BLOCK_VARIABLES) == len(params), [w.path for w in block.weights]
    for name, variable in BLOCK_VARIABLES.items():
        variable(block).assign(params[name])


def sizes(args):
    """L, D, N, H, M, S, m, F: the fields of `Config` of the versions by hand."""
    head_dim, blocks = args.width // args.heads, (args.block_size, args.memory_segments, args.fam_length)
    return args.layers, args.width, args.heads, head_dim, args.intermediate, *blocks


def random_params(args):
    """NumPy parameters in the layout of the versions by hand; the same in every process."""
    L, D, N, H, M, _, _, F = sizes(args)
    shapes = {f"{name}_kernel": (D, N, H) for name in ("query", "key", "value")} | {"output_kernel": (N, H, D)}
    shapes |= {"gate_kernel": (D, M), "up_kernel": (D, M), "down_kernel": (M, D), "initial_fam": (F, D)}
    fan_in = {"down_kernel": M, "initial_fam": 1}
    rng = np.random.default_rng(0)

    def layer():
        weights = {name: rng.normal(size=shape) * fan_in.get(name, D) ** -0.5 for name, shape in shapes.items()}
        weights |= {f"{part}_norm_scale": rng.uniform(0.8, 1.2, D) for part in ("attention", "feedforward")}
        return {name: w.astype("float32") for name, w in weights.items()}

    return {"layers": [layer() for _ in range(L)], "final_norm_scale": np.ones(D, "float32")}


def tokens(args, count):
    return np.random.default_rng(1).normal(size=(args.batch, count, args.width)).astype("float32")


# keras_fam ------------------------------------------------------------------------------------------------------------


def keras_model(args, params, count):
    """A compiled functional model of `TransformerFAMBlock`s for `count` tokens."""
    import keras

    import keras_fam

    _, D, N, H, M, S, m, F = sizes(args)
    inputs = x = keras.Input((count, D))
    for layer in params["layers"]:
        block = keras_fam.TransformerFAMBlock(
            N, H, M, block_size=S, memory_segments=m, fam_length=F, initial_fam="prefix"
        )
        x = block(x)
        copy_weights(block, layer)
    norm = keras.layers.RMSNormalization(epsilon=1e-6)
    model = keras.Model(inputs, norm(x))
    norm.scale.assign(params["final_norm_scale"])
    model.compile(optimizer=keras.optimizers.Adam(1e-3, epsilon=1e-7), loss="mean_squared_error")
    return model


def keras_forward(model, x):
    """A function without arguments that returns the outputs, compiled by the backend, and waits for them."""
    import keras

    backend = keras.backend.backend()
    x = keras.ops.convert_to_tensor(x)
    if backend == "jax":
        import jax

        call = jax.jit(lambda *state_and_x: model.stateless_call(*state_and_x, training=False)[0])
        groups = model.trainable_variables, model.non_trainable_variables
        return lambda: jax.block_until_ready(call(*([v.value for v in group] for group in groups), x))
    if backend == "torch":
        import torch

        return torch.no_grad()(lambda: model(x, training=False))
    import tensorflow as tf

    call = tf.function(lambda x: model(x, training=False), jit_compile=model.jit_compile)
    return lambda: call(x).numpy()


def keras_train(model, x):
    """A function without arguments that runs one train step and returns the loss."""
    import keras

    x, target = keras.ops.convert_to_tensor(x), keras.ops.zeros(x.shape)
    return lambda: float(model.train_on_batch(x, target, return_dict=True)["loss"])


# By hand --------------------------------------------------------------------------------------------------------------


def by_hand(backend, args, params, x):
    """`(forward, train)`, functions without arguments like those above; None if there is no version for the backend."""
    if backend == "jax":
        import jax

        from examples.benchmarks.peers import handwritten_jax as hand

        params, x, config = jax.tree.map(jax.numpy.asarray, params), jax.numpy.asarray(x), hand.Config(*sizes(args))
        call = jax.jit(hand.forward, static_argnums=2)
        step = jax.jit(hand.train_step, static_argnums=3, donate_argnums=(0, 1))
        trained = jax.tree.map(jax.numpy.copy, params)
        held = trained, hand.init_optimizer(trained)

        def train():
            nonlocal held
            *held, loss = step(*held, x, config)
            return float(loss)

        return lambda: jax.block_until_ready(call(params, x, config)), train
    if backend == "torch":
        import torch

        from examples.benchmarks.peers import handwritten_torch as hand

        trained, fixed, x = hand.from_numpy(params), hand.from_numpy(params), torch.tensor(x)
        config, optimizer = hand.Config(*sizes(args)), hand.init_optimizer(trained)
        forward = torch.no_grad()(lambda: hand.forward(fixed, x, config))
        return forward, lambda: float(hand.train_step(trained, optimizer, x, config))
    return None


# Measuring ------------------------------------------------------------------------------------------------------------


def require_agreement(what, ours, expected):
    ours, expected = np.asarray(ours), np.asarray(expected)
    difference = float(np.abs(ours - expected).max() / np.abs(expected).max())
    assert difference <= AGREEMENT, f"{what}: relative difference {difference:.1e}, allowed {AGREEMENT:.0e}"
    return difference


def measure(args):
    """All measurements of one backend; runs in its own process."""
    import keras

    backend = keras.backend.backend()
    params, x = random_params(args), tokens(args, args.tokens)
    model = keras_model(args, params, args.tokens)
    forward, train = {"keras_fam": keras_forward(model, x)}, {"keras_fam": keras_train(model, x)}
    peer = by_hand(backend, args, params, x)
    outputs = {"keras_fam": keras.ops.convert_to_numpy(forward["keras_fam"]())}
    versions = {name: metadata.version(name) for name in ("keras", backend, "numpy")}
    result = {"versions": versions | {"python": platform.python_version()}}
    if peer:
        forward["by hand"], train["by hand"] = peer
        outputs["by hand"] = np.asarray(peer[0]())
        result["difference"] = require_agreement("outputs", outputs["keras_fam"], outputs["by hand"])
    result["sample"] = outputs["keras_fam"][-1, -4:, :8].tolist()
    result["forward"] = measuring.take_turns(forward, args.repeats)
    compiling, losses = {}, {}
    for name, step in train.items():
        start = perf_counter()
        losses[name] = step()
        compiling[name] = perf_counter() - start - measuring.seconds(step)
    if peer:
        require_agreement("loss", losses["keras_fam"], losses["by hand"])
    result["train"] = measuring.take_turns(train, args.repeats)
    quarter = args.tokens // 4
    if backend != "torch" and quarter % args.block_size == 0 and quarter > args.block_size:
        step = keras_train(keras_model(args, params, quarter), tokens(args, quarter))
        compiling["keras_fam, T/4"] = measuring.seconds(step) - measuring.seconds(step)
    return result if backend == "torch" else result | {"compile train": compiling}


def print_table(results):
    print(f"\n{'':34}{'keras_fam':>12}{'by hand':>12}{'ratio':>8}")
    for backend, result in results.items():
        for what in [name for name in ("forward", "train", "compile train") if name in result]:
            row = {name: t if what.startswith("compile") else t["median"] for name, t in result[what].items()}
            ours, hand = row["keras_fam"], row.get("by hand")
            peer = f"{hand * 1e3:9.0f} ms{ours / hand:8.2f}" if hand else ""
            print(f"{f'{backend}: {what}':34}{ours * 1e3:9.0f} ms{peer}")
            if "keras_fam, T/4" in row:
                print(f"{f'{backend}: {what}, T/4':34}{row['keras_fam, T/4'] * 1e3:9.0f} ms")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"width": 256, "layers": 4, "block-size": 128, "fam-length": 16, "memory-segments": 1, "tokens": 4096}
    for name, default in (defaults | {"batch": 1, "repeats": 7}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--heads", type=int, help="default: width / 64")
    parser.add_argument("--intermediate", type=int, help="default: 4 * width")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="number of cores to use; default: all")
    parser.add_argument("--backends", default="jax,torch,tensorflow")
    parser.add_argument("--out", help="where to write a JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.heads = args.heads or max(1, args.width // 64)
    args.intermediate = args.intermediate or 4 * args.width
    if args.tokens % args.block_size or args.width % args.heads:
        parser.error("--tokens must be a multiple of --block-size, and --width of --heads")
    if args.child:
        measuring.use_cores(args.threads)
        Path(args.child).write_text(json.dumps(measure(args)))
        return
    results = {
        backend: measuring.run_child("examples.benchmarks.speed", argv, backend, args.threads)
        for backend in args.backends.split(",")
    }
    samples = [result.pop("sample") for result in results.values()]
    for backend, sample in zip(results, samples, strict=True):
        require_agreement(f"{backend} against {next(iter(results))}", sample, samples[0])
    ratios = {
        f"{backend} {what}": result[what]["keras_fam"]["median"] / result[what]["by hand"]["median"]
        for backend, result in results.items()
        for what in ("forward", "train")
        if "by hand" in result[what]
    }
    print_table(results)
    if {"jax", "tensorflow"} <= results.keys():
        for what in ("forward", "train"):
            ours, jax = (results[backend][what]["keras_fam"]["median"] for backend in ("tensorflow", "jax"))
            ratios[f"tensorflow / jax {what}"] = ours / jax
            print(f"{f'tensorflow / jax: {what}':58}{ours / jax:8.2f}")
    machine = measuring.machine(args.threads)
    print(f"{machine['cpu']}, {args.threads} of {machine['cores']} cores")
    if args.out:
        settings = {name: value for name, value in vars(args).items() if name not in ("child", "out")}
        report = {"settings": settings, "machine": machine, "ratios": ratios, "backends": results}
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
