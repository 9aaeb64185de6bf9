"""Lengths of texts and sizes of steps that fit the time and the device."""

import math

FEWEST_STEPS = 400  # below that many, steps are made smaller
FEWEST_ROWS = 4  # of the longest texts


def device_bytes():
    """Bytes of the accelerator's memory, or of 4 GiB where it does not say (a CPU)."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 4 * 2**30)


def bytes_per_token(config):
    """About what a training step with each layer rematerialized keeps per token of a batch.

    Inputs of all layers in 16 bits, and of one layer the activations and softmax weights, several times over.
    """
    width, inner, heads = config["hidden_dim"], config["intermediate_dim"], config["num_query_heads"]
    keys = (config["memory_segments"] + 1) * config["block_size"] + config["fam_length"]
    rows = config["fam_length"] / config["block_size"]
    layers = config["num_layers"] * width * (2 + 4 * rows)
    return layers + 2 * (6 * width + 3 * inner) + 3 * 4 * heads * keys


def largest_step(config, available):
    """Tokens of a step, a power of two, for half of the memory that is available."""
    return 2 ** int(math.log2(max(0.5 * available / bytes_per_token(config), config["block_size"])))


def plan(speed, seconds, step_tokens, levels, block_size):
    """Levels and step that fit.

    Args:
        speed: float, tokens a second, as measured.
        seconds: float, time for training.
        step_tokens: int, the largest step.
        levels: sequence of int, blocks in a text, increasing.
        block_size: int, S.

    Returns:
        `(levels, step_tokens)`: the first of the levels, up to the longest one of which a twentieth of the time allows
        `FEWEST_ROWS` rows in 10 steps; tokens of a step, halved while there are fewer than `FEWEST_STEPS` steps and
        rows enough.
    """
    total = speed * seconds
    fitting = [n for n in levels if total / 20 >= 10 * FEWEST_ROWS * n * block_size] or list(levels[:1])
    smallest = FEWEST_ROWS * fitting[-1] * block_size
    while total / step_tokens < FEWEST_STEPS and step_tokens // 2 >= smallest:
        step_tokens //= 2
    return fitting, step_tokens
