"""Choosing one token from logits on the host: each row of a batch with options and a seed of its own.

What is drawn depends on the seed and the token's position in its stream alone: neither on the other rows of the batch,
nor on the backend's random numbers, nor on where a turn was taken up after a failure.
"""

import numpy as np


def draw(logits, temperature, top_p, seed, position):
    """A token id.

    Args:
        logits: float `[V]`, finite.
        temperature: positive; the logits are divided by it.
        top_p: above 0, at most 1: drawn among the fewest tokens that together have at least this probability.
        seed: an integer from 0 to 2⁶⁴ − 1.
        position: how many tokens the stream has read.
    """
    scaled = np.asarray(logits, "float64") / temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-weights, kind="stable")  # ties in the order of the ids
    cumulative = np.cumsum(weights[order])
    if top_p < 1:
        cumulative = cumulative[: 1 + np.searchsorted(cumulative, top_p * cumulative[-1])]
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, position], "uint64")))
    place = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
    return int(order[min(place, len(cumulative) - 1)])
