"""What each process of a training does, on every engine: its part of the data, and the phases of the comparison."""

import argparse
import json
import pathlib

import numpy as np

from examples.distributed.common import ROWS, SETTINGS, TOKENS, batches, make_lm, make_optimizer

RATE = 0.5  # of Random State Passing: about half of the rows start from the memory that was passed on


def arguments(description, variants):
    """A parser of the options that `starting.start` hands to each process.

    Args:
        description: of the module.
        variants: the ways of training that it knows.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--addresses", default="", help="host:port of every process, with commas, process 0 first")
    parser.add_argument("--process", type=int, default=0, help="the number of this one")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="one that all processes share")
    parser.add_argument("--variants", nargs="+", choices=variants, default=list(variants))
    parser.add_argument("--phases", nargs="+", default=["passing", "carried"], help='"passing", "carried", or a step')
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--layers", type=int, default=2)
    return parser


def parse(parser, argv):
    """The parsed arguments, the addresses as a list; sets the size of the model."""
    args = parser.parse_args(argv)
    args.addresses = args.addresses.split(",") if args.addresses else ["localhost:0"]
    args.processes = len(args.addresses)
    SETTINGS["num_layers"] = args.layers
    return args


def documents():
    """Texts of 20 to 120 tokens, so that rows come to an end at different steps."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(20, 121, 40)
    return [np.cumsum(rng.integers(0, 5, length)) % SETTINGS["vocabulary_size"] for length in lengths]


def document_rows():
    """This process's rows of the documents. An epoch is one step, so that Keras reports the loss of each step."""
    import keras_fam

    shard = keras_fam.distribution.process_shard()
    return keras_fam.data.DocumentRows(documents(), ROWS // shard[1], TOKENS // 2, shard=shard, steps_per_epoch=1)


def own_batches(steps):
    """This process's rows of `common.batches`: int32 `[steps, rows, TOKENS + 1]`."""
    import keras_fam

    index, count = keras_fam.distribution.process_shard()
    return batches(steps)[:, index * ROWS // count : (index + 1) * ROWS // count]


def stream_of(lm):
    """A compiled `StreamingModel`: its rows are those of this process, on JAX those of all."""
    import keras

    import keras_fam

    _, count = keras_fam.distribution.process_shard()
    stream = keras_fam.StreamingModel(lm, ROWS if keras.backend.backend() == "jax" else ROWS // count)
    stream.compile(make_optimizer(momentum=0.9), weighted_metrics=None, jit_compile=keras.backend.backend() == "jax")
    return stream


def passing(steps):
    """Losses of steps with Random State Passing, and the memory that is passed on."""
    from keras_fam.ops.processes import whole_value

    lm = make_lm(random_state_passing=RATE)
    lm.compile(make_optimizer(), weighted_metrics=None)
    losses = [float(lm.train_on_batch(b[:, :-1], b[:, 1:], return_dict=True)["loss"]) for b in own_batches(steps)]
    return losses, whole_value(lm.backbone.random_state_passing.memory.value)


def carried(steps):
    """Losses of steps on carried state, by `fit`, and the state after them, of all rows."""
    import keras_fam

    stream = stream_of(make_lm(random_state_passing=0.0))
    history = stream.fit(document_rows(), epochs=steps, verbose=0)
    return history.history["loss"], keras_fam.distribution.gather_rows(stream.state)


def resumed(until, path):
    """Losses of the steps from those that the file at `path` has seen, if it exists, to number `until`."""
    import keras_fam

    stream = stream_of(make_lm(random_state_passing=0.0))
    progress = keras_fam.training.SaveProgress(path, stream, document_rows())
    histories = progress.fit(until, verbose=0)
    return [loss for history in histories for loss in history.history["loss"]]


def run_phases(args, variant, passing=passing, carried=carried, resumed=resumed):
    """A dict of the results of `args.phases`: "passing", "carried", or the number of a step to resume until."""
    found = {}
    for phase in args.phases:
        if phase == "passing":
            found[f"training, RSP {RATE}"], memory = passing(args.steps)
            found["after: passed memory"] = np.ravel(memory).tolist()
        elif phase == "carried":
            found["training, carried state"], state = carried(args.steps)
            found["after: carried state"] = flat(state)
        else:
            found["resumed"] = resumed(int(phase), args.folder / f"{variant}.progress")
    return found


def flat(state):
    """All numbers of a state in one list."""
    import keras

    return np.concatenate([np.asarray(x, "float64").ravel() for x in keras.tree.flatten(state)]).tolist()


def write(args, found):
    """Process 0 writes what was found, where `starting.start` reads it."""
    if args.process == 0:
        (args.folder / "result.json").write_text(json.dumps(found))
