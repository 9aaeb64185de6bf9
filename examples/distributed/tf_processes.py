"""One worker of TensorFlow's MultiWorkerMirroredStrategy, as each machine would run it.

    python -m examples.distributed.tf_processes --folder SHARED --addresses HOST_0:1234,HOST_1:1234 --process 0

and with `--process 1` on the second machine. `python -m examples.distributed.processes tensorflow` starts two on this
machine and compares them with one.
"""

import json
import os

from examples.distributed import starting, work
from examples.distributed.common import make_lm, make_optimizer


def passing(steps):
    """As `work.passing`, by `fit`, which gets this worker's own batches. An epoch is one step."""
    import tensorflow as tf

    from keras_fam.ops.processes import whole_value

    lm, text = make_lm(random_state_passing=work.RATE), work.own_batches(steps)
    lm.compile(make_optimizer(), weighted_metrics=None, jit_compile=False)
    data = tf.data.Dataset.from_tensor_slices((text[:, :, :-1], text[:, :, 1:]))
    if isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy):
        own = data
        data = tf.distribute.get_strategy().distribute_datasets_from_function(lambda _: own)
    history = lm.fit(data, epochs=steps, steps_per_epoch=1, shuffle=False, verbose=0)
    return history.history["loss"], whole_value(lm.backbone.random_state_passing.memory.value)


def parser():
    return work.arguments(__doc__, ("fit",))


def results(args):
    """What was found, by variant."""
    import tensorflow as tf

    many = args.processes > 1
    strategy = tf.distribute.MultiWorkerMirroredStrategy() if many else tf.distribute.get_strategy()
    with strategy.scope():
        return {variant: work.run_phases(args, variant, passing=passing) for variant in args.variants}


def main(argv=None):
    args = work.parse(parser(), argv)
    starting.environment("tensorflow", args.folder)
    if args.processes > 1:
        task = {"type": "worker", "index": args.process}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": args.addresses}, "task": task})
    work.write(args, results(args))


if __name__ == "__main__":
    main()
