"""Signatures of an export for TF Serving against whole sequences in Keras, on every backend."""

import numpy as np
import pytest
import served as export
import support
from served import CHUNKS, OPTIONS, ROWS, SESSIONS, STATELESS, TOTAL, V, state_of


@pytest.fixture(scope="module")
def folder():
    return export.exported()


@pytest.fixture(scope="module")
def served():
    return export.loaded()


@pytest.fixture(scope="module")
def tokens():
    return export.some_tokens()


@pytest.fixture(scope="module")
def whole():
    return export.whole_logits()


def test_signatures_are_flat_and_named(served, folder):
    assert set(served.signatures) == STATELESS | SESSIONS | {"list"}
    assert (folder.name, (folder / "saved_model.pb").exists()) == ("1", True)
    state = {name for name in served.signatures["init_state"].structured_outputs}
    assert {"state_position_offset", "state_layers_1_value", "state_layers_0_fam", "state_logits"} <= state
    assert state == set(state_of(served.signatures["step"].structured_outputs))
    assert state <= set(served.signatures["generate"].structured_input_signature[1])


def test_whole_sequences_of_any_shape(served, tokens, whole):
    for rows, total in ((ROWS, TOTAL), (1, 1), (3, 7), (2, 4)):
        logits = served("serving_default", token_ids=tokens[:rows, :total])["logits"]
        support.close(logits, whole[:rows, :total], 1e-5)


def test_padding_is_ignored(served, tokens, whole):
    mask = np.random.default_rng(2).random((ROWS, TOTAL)) < 0.6
    mask[0] = False
    ids = np.full((ROWS, TOTAL), -7, "int32")  # padding may hold anything
    expected = np.zeros_like(whole)
    for row in range(ROWS):
        count = mask[row].sum()
        ids[row, mask[row]] = tokens[row, :count]
        expected[row, mask[row]] = whole[row, :count]
    logits = served("padded", token_ids=ids, padding_mask=mask)["logits"]
    assert np.isfinite(logits).all() and not logits[~mask].any()
    support.close(logits, expected, 1e-5)


def test_steps_carry_the_state(served, tokens, whole):
    state = served("init_state", batch_size=ROWS)
    first, found = 0, []
    for size in CHUNKS:
        chunk = tokens[:, first : first + size]
        results = served("step", token_ids=chunk, lengths=[size] * ROWS, **state)
        state, first = state_of(results), first + size
        found.append(results["logits"])
    support.close(np.concatenate(found, axis=1), whole, 1e-5)
    support.close(state["state_logits"], whole[:, -1], 1e-5)


def test_steps_of_rows_with_lengths_of_their_own(served, tokens, whole):
    rng = np.random.default_rng(3)
    state, place = served("init_state", batch_size=ROWS), np.zeros(ROWS, int)
    for size in (5, 1, 9, 3):
        lengths = rng.integers(0, size + 1, ROWS)
        chunk = np.full((ROWS, size), 10**6, "int32")
        for row, n in enumerate(lengths):
            chunk[row, :n] = tokens[row, place[row] : place[row] + n]
        results = served("step", token_ids=chunk, lengths=lengths, **state)
        state = state_of(results)
        for row, n in enumerate(lengths):
            support.close(results["logits"][row, :n], whole[row, place[row] : place[row] + n], 1e-5)
            assert not results["logits"][row, n:].any()
        place += lengths
    assert (state["state_position_block_index"] * 4 + state["state_position_offset"] == place).all()


def test_checks_of_stateless_calls(served, tokens):
    state = served("init_state", batch_size=2)
    two = {"token_ids": tokens[:2, :3], "lengths": [3, 3], **state}
    served.refuses("T ≥ 1", "serving_default", token_ids=np.zeros((2, 0)))
    served.refuses("integers from 0 to 30", "serving_default", token_ids=[[0, V]])
    served.refuses("integers from 0 to 30", "step", **{**two, "token_ids": [[0, 1, -1]] * 2})
    served.refuses("from 0 to T", "step", **{**two, "lengths": [4, 0]})
    served.refuses("one entry per row", "step", **{**two, "lengths": [1]})
    served.refuses("one row per row", "step", **{**two, **served("init_state", batch_size=1)})
    served.refuses("shape of token_ids", "padded", token_ids=[[1, 2]], padding_mask=[[True]])
    served.refuses("at least 0", "init_state", batch_size=-1)
    given = {**two, **OPTIONS, "seed": [0, 0]}
    served.refuses("temperature", "generate", **{**given, "temperature": float("nan")})
    served.refuses("top_k", "generate", **{**given, "top_k": -1})
    served.refuses("max_new_tokens", "generate", **{**given, "max_new_tokens": -1})
    served.refuses("seed has one entry", "generate", **{**given, "seed": [0]})
    served.refuses("needs a prompt", "generate", **{**given, "lengths": [3, 0]})


def test_draws_follow_the_distribution(served, tokens, whole):
    draws = 3000
    state = {k: np.repeat(v, draws, axis=0) for k, v in served("init_state", batch_size=1).items()}
    given = {"token_ids": np.repeat(tokens[:1, :3], draws, axis=0), "lengths": [3] * draws, "seed": np.arange(draws)}
    given |= {**OPTIONS, "max_new_tokens": 1, "temperature": 0.8}
    for top_k in (0, 4):
        scores = whole[0, 2].astype("float64") / 0.8
        if top_k:
            scores[scores < np.sort(scores)[-top_k]] = -np.inf
        expected = np.exp(scores - scores.max())
        expected /= expected.sum()
        drawn = served("generate", **{**given, "top_k": top_k}, **state)["tokens"][:, 0]
        seen = np.bincount(drawn, minlength=V) / draws
        assert not seen[expected == 0].any()
        assert np.abs(seen - expected).max() < 5 * np.sqrt(0.25 / draws)  # five standard deviations
