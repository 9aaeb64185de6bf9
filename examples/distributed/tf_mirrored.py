"""Training over several devices with TensorFlow's MirroredStrategy: the same numbers as one device.

    python -m examples.distributed.tf_mirrored --devices 2     # logical devices of one CPU, or as many GPUs

The model is made inside the strategy's scope and trained with `fit`. Random State Passing passes on the memory of row 0
of the first replica, and chooses the rows that one device would choose.
"""

import argparse
import os

import numpy as np

from examples.distributed.common import ROWS, SETTINGS, batches, make_lm, make_optimizer, report


def train(strategy, steps):
    """Losses of all steps, final weights and passed memory."""
    import keras
    import tensorflow as tf

    losses = []
    record = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: losses.append(logs["loss"]))
    with strategy.scope():
        lm = make_lm(random_state_passing=0.8)
        lm.compile(make_optimizer(), weighted_metrics=None, jit_compile=False)
    text = batches(steps)
    data = tf.data.Dataset.from_tensor_slices((text[:, :, :-1], text[:, :, 1:])).unbatch().batch(ROWS)
    # One step an epoch, because Keras' loss is the mean over an epoch.
    lm.fit(data.repeat(), epochs=steps, steps_per_epoch=1, callbacks=[record], verbose=0)
    weights = np.concatenate([v.numpy().ravel() for v in lm.trainable_variables])
    memory = np.asarray(lm.backbone.random_state_passing.memory)
    return {"training, RSP 0.8": losses, "after: weights": weights, "after: passed memory": memory}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--layers", type=int, default=SETTINGS["num_layers"])
    args = parser.parse_args(argv)
    SETTINGS["num_layers"] = args.layers
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import tensorflow as tf

    kind = "GPU" if len(tf.config.list_physical_devices("GPU")) >= args.devices else "CPU"
    if kind == "CPU":
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * args.devices)
    names = [f"{kind}:{i}" for i in range(args.devices)]
    runs = {"one device": names[:1], f"{args.devices} devices": names}
    report({name: train(tf.distribute.MirroredStrategy(found), args.steps) for name, found in runs.items()})


if __name__ == "__main__":
    main()
