"""Ablation of the memory: what a score loses by it is what the memory was good for."""

import numpy as np
from keras import ops

ABLATIONS = ("zeroed", "frozen", "shuffled")
CLOSED = "closed"  # an ablation of the reading, not of the state
MEMORY_FIELDS = ("fam", "fam_key", "fam_value")


def ablate_memory(model, state, how: str, seed=0):
    """A state with its memory ablated: what is left of a score does not depend on the memory.

    Args:
        model: the model or layer that the state belongs to.
        state: `StreamState` of B rows.
        how: `"zeroed"` (memory rows and their keys and values are 0), `"frozen"` (the first memory F_0 in place of
            what was written; refused for `initial_fam="summary"`, which has none before a text) or `"shuffled"` (each
            row gets the memory of another row).
        seed: int, or a `numpy.random.Generator`, of the permutation, which leaves no row in its place.

    Returns:
        `StreamState`; keys and values of tokens stay as they are, and so does a model without memory.

    Raises:
        ValueError: for another `how`, for a way that the model does not have, or if there is one row to shuffle.
    """
    if how == CLOSED:
        raise ValueError(
            "A closed memory is not read, whatever the state holds: no state can say that. Score with "
            'StreamScorer(model, ablation="closed") or evaluate(..., ablations=["closed"]), or make the model with '
            f'fam_gate=float("-inf"); received how={how!r}, which is none of {ABLATIONS}.'
        )
    check_how(model, how)
    rows = int(state.position.offset.shape[0])
    order = derangement(rows, np.random.default_rng(seed)) if how == "shuffled" else None
    return ablate_state(state, how, model.get_initial_state(rows), order)


def derangement(count, rng):
    """A permutation of `count` numbers, int32, that leaves none in its place."""
    if count < 2:
        raise ValueError(
            f"Memories are shuffled between rows, so there are at least two; received {count}. Read more rows."
        )
    cycle = rng.permutation(count)
    order = np.empty(count, "int32")
    order[cycle] = np.roll(cycle, 1)
    return order


def ways(model):
    """The ablations that mean something for a model: none without memory, and `"frozen"` only where there is an F_0.

    With `initial_fam="summary"` the first memory passes up the layers with block 1; the state before it holds zeros,
    and freezing at those would be `"zeroed"` under another name.
    """
    if not model.fam_length:
        return ()
    summary = layers_of(model)[0].initial_fam == "summary"
    return tuple(how for how in ABLATIONS if not (summary and how == "frozen"))


def check_how(model, how):
    if how not in (*ABLATIONS, CLOSED):
        raise ValueError(f"A memory is ablated in one of the ways {(*ABLATIONS, CLOSED)}; received {how!r}.")
    if how == "frozen" and model.fam_length and how not in ways(model):
        raise ValueError(
            "A memory is frozen at F_0, and with initial_fam='summary' there is none before a text: it would be the "
            f"same as 'zeroed'. Choose one of {ways(model)}; received {how!r}."
        )


def ablate_state(state, how, first, order=None):
    """`ablate_memory` for tensors; `order` is int32 `[B]`, read for `"shuffled"`."""

    def ablated(memory, start):
        if isinstance(memory, tuple):  # no memory in this configuration
            return memory
        if how == "shuffled":
            return ops.take(memory, order, axis=0)
        return ops.zeros_like(memory) if how == "zeroed" else start

    layers = [
        layer._replace(**{name: ablated(getattr(layer, name), getattr(start, name)) for name in MEMORY_FIELDS})
        for layer, start in zip(state.layers, first.layers, strict=True)
    ]
    return state._replace(layers=tuple(layers))


def layers_of(model):
    """The `FeedbackAttention` of every layer of a model, or of a layer."""
    blocks = getattr(getattr(model, "backbone", model), "blocks", [model])
    return [block.attention_layer() for block in blocks]
