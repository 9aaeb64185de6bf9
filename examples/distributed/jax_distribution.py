"""Training and streaming over many devices with `keras.distribution` on JAX: the same numbers as one device.

    python -m examples.distributed.jax_distribution                # 8 simulated CPU devices
    python -m examples.distributed.jax_distribution --simulate 0   # this machine's accelerators

Compares one device, `DataParallel` (rows over all devices) and `ModelParallel` with `keras_fam.layout_map` (rows over
2, heads, feed-forward and vocabulary over the rest). Each trains with Random State Passing, trains on carried state,
streams rows of different lengths, and predicts with a stateful layer.
"""

import argparse
import os

import numpy as np

from examples.distributed.common import ROWS, SETTINGS, TOKENS, batches, make_lm, make_optimizer, report


def train(lm, steps):
    """Losses of steps with Random State Passing, and the passed memory."""
    lm.compile(make_optimizer())
    losses = [float(lm.train_on_batch(b[:, :-1], b[:, 1:], return_dict=True)["loss"]) for b in batches(steps)]
    return losses, np.asarray(lm.backbone.random_state_passing.memory)


def train_on_carried_state(stream, steps):
    """Losses of steps on carried state, and the final state."""
    import keras

    stream.compile(make_optimizer())
    losses = [float(stream.train_on_batch(b[:, :-1], b[:, 1:], return_dict=True)["loss"]) for b in batches(steps)]
    return losses, np.concatenate([np.asarray(x).ravel() for x in keras.tree.flatten(stream.state.layers)])


def predict_ragged(stream):
    """Logits of a stream whose rows read chunks of different lengths."""
    rng = np.random.default_rng(1)
    chunks = [rng.integers(0, SETTINGS["vocabulary_size"], (ROWS, SETTINGS["block_size"])) for _ in range(4)]
    lengths = [rng.integers(0, SETTINGS["block_size"] + 1, ROWS) for _ in chunks]
    return np.stack([stream.predict(chunk, count) for chunk, count in zip(chunks, lengths, strict=True)])


def predict_stateful():
    """Outputs of a stateful layer in a Keras model for successive chunks."""
    import keras

    import keras_fam

    keras.utils.set_random_seed(0)
    x = keras.Input(batch_shape=(ROWS, TOKENS, 16))
    y = keras_fam.TransformerFAMBlock(4, 4, 32, block_size=8, memory_segments=1, fam_length=4, stateful=True)(x)
    model = keras.Model(x, y)
    chunks = np.random.default_rng(2).normal(size=(3, ROWS, TOKENS, 16)).astype("float32")
    return np.stack([model.predict(chunk, batch_size=ROWS, verbose=0) for chunk in chunks])


def run(distribution, steps):
    """All results under `distribution`, or on one device if it is None."""
    import contextlib

    import keras_fam

    with contextlib.nullcontext() if distribution is None else distribution.scope():
        lm = make_lm(random_state_passing=0.8)
        losses, memory = train(lm, steps)
        stream = keras_fam.StreamingModel(lm, ROWS)
        carried, state = train_on_carried_state(stream, steps)
        if distribution is not None:
            sharding = stream.state.layers[0].key.sharding
            mesh, axes = dict(sharding.mesh.shape), tuple(sharding.spec)
            print(f"{type(distribution).__name__}: keys of a stream are sharded as {axes} on {mesh}")
        found = {"training, RSP 0.8": losses, "training, carried state": carried, "after: passed memory": memory}
        found |= {"after: carried state": state, "after: logits, ragged rows": predict_ragged(stream)}
        return found | {"outputs of a stateful layer": predict_stateful()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--simulate", type=int, default=8, help="CPU devices to simulate; 0 uses the accelerators of the machine"
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--layers", type=int, default=SETTINGS["num_layers"])
    args = parser.parse_args(argv)
    SETTINGS["num_layers"] = args.layers
    os.environ["KERAS_BACKEND"] = "jax"
    if args.simulate:
        flag = f"--xla_force_host_platform_device_count={args.simulate}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
        os.environ["JAX_PLATFORMS"] = "cpu"
    import keras

    import keras_fam

    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((2, len(devices) // 2), ("batch", "model"), devices)
    layouts = keras_fam.layout_map(mesh, SETTINGS)
    runs = {
        "one device": None,
        f"data parallel {len(devices)}": keras.distribution.DataParallel(devices=devices),
        f"data 2 x model {len(devices) // 2}": keras.distribution.ModelParallel(
            layout_map=layouts, batch_dim_name="batch"
        ),
    }
    report({name: run(distribution, args.steps) for name, distribution in runs.items()})


if __name__ == "__main__":
    main()
