"""Shared by the three examples: a small language model, its data, and the table that compares the runs."""

import sys

import numpy as np

SETTINGS = {
    "vocabulary_size": 64,
    "num_layers": 2,
    "hidden_dim": 32,
    "num_query_heads": 4,
    "intermediate_dim": 64,
    "block_size": 8,
    "memory_segments": 1,
    "fam_length": 4,
    "attention_sinks": 2,
}
ROWS, TOKENS = 8, 32
DECIMALS = 5
TRAINED = 1e-4


def make_lm(random_state_passing):
    """A `TransformerFAMCausalLM` with the same random weights in every run."""
    import keras

    import keras_fam

    keras.utils.set_random_seed(0)
    backbone = keras_fam.TransformerFAMBackbone(**SETTINGS, random_state_passing=random_state_passing)
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.build()
    return lm


def make_optimizer(momentum=0.0):
    """Plain SGD: Adam divides by the size of each gradient, which amplifies rounding errors near zero."""
    import keras

    return keras.optimizers.SGD(0.1 if momentum else 0.5, momentum=momentum)


def batches(steps):
    """Token ids `[steps, ROWS, TOKENS + 1]`; each batch continues the rows of the one before."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, SETTINGS["vocabulary_size"], (ROWS, steps * TOKENS + 1))
    text = np.cumsum(text % 5, axis=1) % SETTINGS["vocabulary_size"]  # learnable
    return np.stack([text[:, i * TOKENS : (i + 1) * TOKENS + 1] for i in range(steps)]).astype("int32")


def same_to(decimals):
    """How far two numbers may lie apart that agree to so many decimals."""
    return 0.5 * 10**-decimals


def report(runs):
    """Prints the losses of each run side by side and exits with 1 unless all agree with the first one's.

    Losses and outputs must agree to `DECIMALS` decimals. Weights and states after training accumulate rounding errors,
    and must agree to `TRAINED`, relative to the largest of them.

    Args:
        runs: dict from the name of each run to a dict from the name of each quantity to its values. Names that start
            with "training" are losses, those that start with "after" weights or states after training.
    """
    (_, first), *others = runs.items()
    same = True
    for what, expected in first.items():
        expected = np.asarray(expected, "float64")
        differences = [np.abs(np.asarray(run[what], "float64") - expected).max() for _, run in others]
        if what.startswith("training"):
            print(f"\n{what:30}" + "".join(f"{name:>20}" for name in runs))
            for i, row in enumerate(zip(*(run[what] for run in runs.values()), strict=True)):
                print(f"{'step ' + str(i + 1):>30}" + "".join(f"{loss:20.7f}" for loss in row))
        after = what.startswith("after")
        if after:
            differences = [d / np.abs(expected).max() for d in differences]
        same &= max(differences) <= (TRAINED if after else same_to(DECIMALS))
        label = what if not what.startswith("training") else ""
        kind = "relative difference" if after else "largest difference"
        print(f"{label:30}{kind:>20}" + "".join(f"{d:20.1e}" for d in differences))
    print(f"\n{'the same' if same else 'NOT the same'} to {DECIMALS} decimals")
    sys.exit(0 if same else 1)
