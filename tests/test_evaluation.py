"""Scores by distance against NumPy, knock-outs against the same thing done by hand, and what the memory looks like."""

import json

import keras
import numpy as np
import pytest
from keras import ops
from support import TINY_VOCABULARY, close, copy_weights, numpy, quick_compile, tiny

import keras_fam
from keras_fam.evaluation import ABLATIONS, StreamScorer
from keras_fam.evaluation.ablation import derangement
from keras_fam.evaluation.memory_monitor import effective_rank
from keras_fam.evaluation.scorer import pieces
from keras_fam.ops.backend import compiled

S, V, D = 4, TINY_VOCABULARY, 8
TOKENS = np.random.default_rng(3).integers(0, V, (3, 30)).astype("int32")
EDGES = [0, 5, 12]


@pytest.fixture(scope="module")
def lm():
    return tiny()


@pytest.fixture(scope="module")
def whole(lm):
    """Logits of TOKENS, and what is to be summed of them."""
    return numpy(compiled(lm, lambda: lm.variables)(ops.convert_to_tensor(TOKENS)))


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def expected_sums(logits):
    """What `score` sums, from logits `[B, T, V]` of TOKENS."""
    scores, targets = log_softmax(numpy(logits).astype("float64"))[:, :-1], TOKENS[:, 1:]
    nats = -np.take_along_axis(scores, targets[..., None], 2)[..., 0]
    right, bucket = scores.argmax(-1) == targets, np.searchsorted(EDGES, np.arange(1, 30), side="right") - 1
    result = np.zeros((3, 3, 5))
    for k in range(3):
        inside = bucket == k
        result[:, k, 0] = result[:, k, 2] = inside.sum()
        result[:, k, 1] = result[:, k, 4] = right[:, inside].sum(1)
        result[:, k, 3] = nats[:, inside].sum(1)
    return result


def test_scores_are_those_of_the_whole(lm, whole):
    expected = expected_sums(whole)
    scorer = StreamScorer(lm, boundaries=EDGES, blocks_per_step=2)
    close(scorer.score(TOKENS), expected, 1e-5)
    close(scorer.score([TOKENS[:, :1], TOKENS[:, 1:14], TOKENS[:, 14:]]), expected, 1e-5)


@pytest.mark.parametrize("how", ABLATIONS)
def test_ablations_happen_after_every_block(lm, how):
    """One compiled program against reading block by block and spoiling by hand."""
    scorer = StreamScorer(lm, how, boundaries=EDGES, blocks_per_step=2, seed=5)
    state, logits, rng = lm.get_initial_state(3), [], np.random.default_rng(5)
    padded = np.pad(TOKENS, [(0, 0), (0, 2)])
    advance = compiled(lambda x, state: lm.advance(x, state, aligned=True), lambda: lm.variables)
    for first in range(0, 32, S):
        y, state = advance(padded[:, first : first + S], state)
        logits.append(numpy(y))
        state = keras_fam.ablate_memory(lm, state, how, rng)
    close(scorer.score(TOKENS), expected_sums(np.concatenate(logits, axis=1)[:, :30]), 1e-5)


def test_ablate_memory(lm):
    advance = compiled(lambda x, state: lm.advance(x, state, aligned=True), lambda: lm.variables)
    _, state = advance(TOKENS[:, :S], lm.get_initial_state(3))
    fresh = lm.get_initial_state(3)
    for how in ABLATIONS:
        spoilt = keras_fam.ablate_memory(lm, state, how)
        for before, after, start in zip(state.layers, spoilt.layers, fresh.layers, strict=True):
            np.testing.assert_array_equal(numpy(after.key), numpy(before.key))
            for name in ("fam", "fam_key", "fam_value"):
                old, new = numpy(getattr(before, name)), numpy(getattr(after, name))
                if how == "shuffled":
                    assert sorted(old.sum((1, 2)) if old.ndim == 3 else old.sum((1, 2, 3))) == pytest.approx(
                        sorted(new.sum((1, 2)) if new.ndim == 3 else new.sum((1, 2, 3)))
                    )
                    assert all(np.abs(a - b).max() > 0 for a, b in zip(old, new, strict=True))
                else:
                    np.testing.assert_array_equal(new, 0 * old if how == "zeroed" else numpy(getattr(start, name)))
    with pytest.raises(ValueError, match="one of the ways"):
        keras_fam.ablate_memory(lm, state, "deleted")
    with pytest.raises(ValueError, match=r"StreamScorer\(model, ablation=\"closed\"\)"):
        keras_fam.ablate_memory(lm, state, "closed")


def test_a_closed_memory_is_no_memory(lm):
    """The scores are those of block-wise sliding window attention with the same weights."""
    bswa = tiny(fam_length=0)
    copy_weights(lm, bswa)
    closed = StreamScorer(lm, "closed", boundaries=EDGES, blocks_per_step=2).score(TOKENS)
    np.testing.assert_array_equal(closed, StreamScorer(bswa, boundaries=EDGES, blocks_per_step=2).score(TOKENS))


def test_frozen_is_refused_where_it_would_be_zeroed():
    """A summary has no memory before a text: two controls with one number would look like two."""
    lm = tiny(initial_fam="summary")
    state = lm.get_initial_state(2)
    assert all(not numpy(layer.fam).any() for layer in state.layers)
    with pytest.raises(ValueError, match=r"the same as 'zeroed'.*received 'frozen'"):
        keras_fam.ablate_memory(lm, state, "frozen")
    with pytest.raises(ValueError, match="the same as 'zeroed'"):
        StreamScorer(lm, "frozen")
    report = keras_fam.evaluate(lm, TOKENS[:2], boundaries=EDGES)
    assert list(report["systems"]) == ["model", "model, memory zeroed", "model, memory shuffled"]
    assert "model: memory frozen" in report["missing"]


def test_derangements():
    rng = np.random.default_rng(0)
    for count in (2, 3, 17):
        for _ in range(20):
            order = derangement(count, rng)
            assert sorted(order) == list(range(count)) and (order != np.arange(count)).all()
    with pytest.raises(ValueError, match="at least two"):
        derangement(1, rng)


def test_pieces():
    weights = np.ones((1, 7), "float32")
    chunks = [{"token_ids": np.arange(7)[None], "targets": np.arange(7)[None] + 1, "loss_weights": weights}]
    chunks.append({**chunks[0], "distance": np.full((1, 7), 50)})
    first, *_, last = pieces(chunks, 3)
    assert first[0].tolist() == [[0, 1, 2]] and first[1].tolist() == [[1, 2, 3]] and first[3].tolist() == [[1, 2, 3]]
    assert last[2].tolist() == [[1, 1, 0]] and last[3][0, 0] == 50
    tokens, targets, weights, _ = (np.concatenate(p, axis=1) for p in zip(*pieces(TOKENS, 8), strict=True))
    np.testing.assert_array_equal(targets[:, :29], TOKENS[:, 1:])
    np.testing.assert_array_equal(tokens[:, :30], TOKENS)
    assert (weights[:, :29] == 1).all() and (weights[:, 29:] == 0).all()


def test_evaluate(lm, whole):
    bswa = [tiny(seed=s, fam_length=0) for s in (1, 2)]
    size = np.full(V, 2)
    report = keras_fam.evaluate(
        {"FAM": lm, "BSWA": bswa}, TOKENS, ablations=["zeroed"], boundaries=EDGES, bytes_per_token=size
    )
    assert json.loads(json.dumps(report)) == report
    assert list(report["systems"]) == ["FAM", "FAM, memory zeroed", "BSWA"]
    assert report["buckets"] == [[0, 5], [5, 12], [12, None]] and report["tokens"] == [12, 21, 54]
    table = report["systems"]["BSWA"]
    for name, row in table.items():
        np.testing.assert_allclose(np.mean(row["seeds"], axis=0), row["mean"])
        np.testing.assert_allclose(np.std(row["seeds"], axis=0, ddof=1), row["spread"]), name
    np.testing.assert_allclose(table["bits_per_byte"]["mean"], np.array(table["bits_per_token"]["mean"]) / 2)
    sums = expected_sums(whole).sum(0)
    np.testing.assert_allclose(report["systems"]["FAM"]["accuracy"]["mean"], sums[:, 4] / sums[:, 2])
    assert report["systems"]["FAM"]["accuracy"]["spread"] == [None] * 3
    lacking = report["missing"]
    assert {"FAM: memory frozen", "FAM: memory shuffled", "FAM: several seeds"} < set(lacking)
    assert any("stop-gradient" in m for m in lacking) and not any("BSWA" in m for m in lacking)


def test_exact_needs_every_token_right():
    one = np.zeros((2, 1, 5))
    one[:, 0] = [[2, 2, 2, 0.1, 2], [2, 1, 2, 0.1, 1]]
    table = keras_fam.evaluation.summary([one])
    assert table["exact"]["mean"] == [0.5] and table["accuracy"]["mean"] == [0.75]


def test_memory_statistics(lm):
    found = keras_fam.memory_statistics(lm, TOKENS, blocks_per_step=4)
    assert json.loads(json.dumps(found)) == found and found["block"] == list(range(1, 8))
    state, fams = lm.get_initial_state(3), []
    advance = compiled(lambda x, state: lm.advance(x, state, aligned=True), lambda: lm.variables)
    for first in range(0, 28, S):
        _, state = advance(TOKENS[:, first : first + S], state)
        fams.append([numpy(layer.fam).astype("float64") for layer in state.layers])
    fams = np.array(fams)  # [n, L, B, F, D]
    np.testing.assert_allclose(np.sqrt((fams**2).mean((-1, -2))).mean(-1).T, found["rms"], rtol=1e-4)
    cosine = (fams[1:] * fams[:-1]).sum(-1) / np.linalg.norm(fams[1:], axis=-1) / np.linalg.norm(fams[:-1], axis=-1)
    np.testing.assert_allclose(1 - cosine.mean((-1, -2)).T, np.array(found["drift"])[:, 1:].astype(float), atol=1e-4)
    assert [layer[0] for layer in found["drift"]] == [None]
    np.testing.assert_allclose(np.array(found["drift_from_first"])[:, 0], 0, atol=1e-6)
    assert 1 < np.min(found["effective_rank"]) <= np.max(found["effective_rank"]) <= 3


def test_effective_rank():
    row = np.ones((1, 4, 8))
    assert effective_rank(row) == pytest.approx(1.0)
    assert effective_rank(np.eye(4, 8)[None]) == pytest.approx(4.0)


def test_memory_monitor():
    lm = tiny(seed=7)
    quick_compile(lm, keras.optimizers.Adam(0.01))
    monitor = keras_fam.MemoryMonitor(TOKENS[:, :8])
    before = keras_fam.memory_statistics(lm, TOKENS[:, :8])
    tokens = TOKENS[:, :8]
    history = lm.fit(tokens, np.roll(tokens, -1, 1), epochs=2, verbose=0, callbacks=[monitor]).history
    assert [seen["step"] for seen in monitor.history] == [1, 2]
    after = keras_fam.memory_statistics(lm, TOKENS[:, :8])
    assert monitor.history[-1]["statistics"] == after != before
    assert history["memory_rms"][-1] == pytest.approx(np.mean([layer[-1] for layer in after["rms"]]))
    assert history["memory_rms"][0] != history["memory_rms"][1]
    with pytest.raises(ValueError, match="fam_length=0"):
        keras_fam.memory_statistics(tiny(fam_length=0), TOKENS)
    with pytest.raises(ValueError, match="once per block"):
        keras_fam.memory_statistics(lm, TOKENS[:, :3])


def test_layers_have_statistics():
    block = keras_fam.TransformerFAMBlock(2, 4, 8, block_size=2, memory_segments=0, fam_length=2)
    block.build((None, None, D))
    x = np.random.default_rng(0).normal(size=(2, 6, D)).astype("float32")
    assert np.shape(keras_fam.memory_statistics(block, ops.convert_to_tensor(x))["rms"]) == (1, 3)
