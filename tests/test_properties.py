"""Properties over random settings, lengths, paddings and resets: every row is the oracle's row."""

import keras
import numpy as np
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from support import HIDDEN_DIM, ORACLE, close, make, numpy, oracle_inputs

# Eager JAX compiles every new shape, so it gets fewer of them.
EXAMPLES = 5 if keras.backend.backend() == "jax" else 25


def possible(changes):
    """Anchored rows start from a prompt."""
    anchored = changes["fam_query"] == "anchored" and changes["initial_fam"] == "prefix"
    return {**changes, "initial_fam": "prompt"} if anchored else changes


VARIANT_SETTINGS = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([2, 4]),
        "memory_segments": st.sampled_from([0, 1, 2]),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "fam_length": st.sampled_from([0, 1, 2]),
        "num_visible_memories": st.sampled_from([1, 2]),
        "initial_fam": st.sampled_from(["prompt", "prefix", "summary"]),
        "memory_update": st.sampled_from(["residual", "normalized", "hard_gate"]),
        "fam_query": st.sampled_from(["feedback", "anchored", "static"]),
        "fam_query_position": st.sampled_from(["previous", "current"]),
    }
).map(possible)


@settings(max_examples=EXAMPLES, derandomize=True, deadline=None)
@given(VARIANT_SETTINGS, st.data())
def test_chunks_lengths_and_resets(changes, data):
    """Chunks of random lengths per row, with resets, against the oracle's rows."""
    block, weights, cfg, fam0 = make(**changes)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    inputs = oracle_inputs(cfg, fam0)
    state, rows = block.get_initial_state(2), [None, None]
    for _ in range(data.draw(st.integers(1, 4))):
        size = data.draw(st.sampled_from([1, 3, 2 * cfg["block_size"], 3 * cfg["block_size"]]))
        lengths = np.array([data.draw(st.integers(0, size)) for _ in range(2)], "int32")
        reset = np.array([data.draw(st.booleans()) for _ in range(2)])
        x = rng.normal(size=(2, size, HIDDEN_DIM)).astype("float32")
        poisoned = np.where(np.arange(size)[None, :, None] < lengths[:, None, None], x, np.nan).astype("float32")
        y, state = block.advance(poisoned, state, lengths=lengths, reset=reset)
        y = numpy(y)
        for b in range(2):
            row = None if reset[b] else rows[b]
            expected, rows[b], _ = reference.layer(x[b, : lengths[b]], weights, cfg, row=row, **inputs)
            if lengths[b]:
                close(y[b, : lengths[b]], expected, ORACLE["float32"])
            assert not y[b, lengths[b] :].any()


@settings(max_examples=EXAMPLES, derandomize=True, deadline=None)
@given(VARIANT_SETTINGS, st.lists(st.lists(st.booleans(), min_size=11, max_size=11), min_size=2, max_size=2))
def test_padding_anywhere(changes, mask):
    block, weights, cfg, fam0 = make(**changes)
    mask = np.array(mask)
    x = np.random.default_rng(3).normal(size=(2, 11, HIDDEN_DIM)).astype("float32")
    expected = reference.batch_layer(x, mask, weights, cfg, **oracle_inputs(cfg, fam0))[0]
    poisoned = np.where(mask[..., None], x, np.nan).astype("float32")
    y = numpy(block(poisoned, padding_mask=mask))
    assert not y[~mask].any()
    if mask.any():
        close(y, expected, ORACLE["float32"])
