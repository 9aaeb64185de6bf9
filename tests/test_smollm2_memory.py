"""`python -m examples.smollm2.memory` at small size: its plan, its batches, and training from start to evaluation."""

import json

import keras
import numpy as np
import pytest

from examples.smollm2.books import HELD_OUT, TRAINING
from examples.smollm2.memory import batches, plan
from examples.smollm2.memory.command import main, parser
from examples.smollm2.memory.prepared import Prepared

jax_only = pytest.mark.skipif(keras.backend.backend() != "jax", reason="the training loop is JAX")
SMALL = ["--tiny", "--dtype", "float32", "--block", "64", "--fam", "4"]


def test_texts_grow_as_far_as_the_time_allows():
    levels = (4, 8, 16, 32, 64)
    assert plan.plan(200_000, 360, 65_536, levels, 128) == ([4, 8, 16, 32, 64], 65_536)
    fitting, size = plan.plan(20_000, 360, 65_536, levels, 128)
    assert fitting == [4, 8, 16, 32, 64] and size == 32_768, "four rows of the longest texts"
    fitting, size = plan.plan(2_000, 360, 65_536, levels, 128)
    assert fitting == [4, 8, 16, 32][: len(fitting)] and size >= plan.FEWEST_ROWS * fitting[-1] * 128
    assert plan.plan(1, 1, 1024, levels, 128)[0] == [4]
    config = {"hidden_dim": 576, "intermediate_dim": 1536, "num_query_heads": 9, "num_layers": 30}
    config |= {"memory_segments": 1, "block_size": 128, "fam_length": 16}
    assert 2**16 <= plan.largest_step(config, 80e9) <= 2**20 and plan.largest_step(config, 1e3) == 128


def test_batches_hold_the_positions_of_the_loss():
    args = parser().parse_args(["train", *SMALL])
    task = batches.make_task(Prepared(), args)
    batch = batches.draw(task, 12, 1200, [0, 1])
    again = batches.draw(task, 12, 1200, [0, 1])
    assert all(np.array_equal(a, b) for a, b in zip(batch, again, strict=True))
    learned = batch.weights > 0
    assert learned.any(1).all() and not batch.targets[~learned].any()
    following = np.take_along_axis(batch.token_ids, batch.positions + 1, axis=1)
    assert np.array_equal(following[learned], batch.targets[learned])
    for row, name in enumerate(batch.names):
        assert batch.answer[row].any() == bool(name) and learned[row][batch.answer[row]].all()
    few = batches.draw(task, 12, 1200, [0, 1], positions=3)
    assert few.weights.shape == (12, 3) and (few.weights > 0).all()


def test_a_thread_draws_ahead_and_passes_its_errors_on():
    ahead = batches.Ahead(lambda number: 10 // (13 - number), first=11)
    assert [ahead.get(), ahead.get()] == [5, 10]
    with pytest.raises(ZeroDivisionError):
        ahead.get()
    ahead.stop()


def test_the_command_needs_its_files(tmp_path):
    with pytest.raises(SystemExit):
        main(["train"])
    with pytest.raises(FileNotFoundError, match="prepare"):
        main(["train", "--data", str(tmp_path), "--out", str(tmp_path)])


@jax_only
def test_it_trains_saves_resumes_and_evaluates(tmp_path):
    command = ["train", *SMALL, "--minutes", "5", "--reserve", "0", "--levels", "12", "--step-tokens", "1600"]
    command += ["--rows", "5", "--factors", "2", "--tail", "2", "--rank", "2", "--line-every", "1"]
    command += ["--out", str(tmp_path)]
    main([*command, "--steps", "2", "--no-evaluate"])
    with np.load(tmp_path / "values.npz") as file:
        before = {key: file[key] for key in file.files}
    record = main([*command, "--steps", "3"])
    assert [line["step"] for line in record["curve"]] == [1, 2, 3] and record["steps by blocks"] == {"12": 3}
    assert all(np.isfinite(line["loss"]) for line in record["curve"])
    with np.load(tmp_path / "values.npz") as file:
        assert int(file["steps"]) == 3
        changed = [key for key in before if not np.array_equal(before[key], file[key])]
        assert len(changed) > 0.9 * len(before), "everything learns"
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(found["needles"]) == {"1", "2"} and found["trained tokens"] == 768
    for measured in found["needles"].values():
        for systems in measured["exact"].values():
            assert {len(values) for values in systems.values()} == {1}
    assert found["text"]["nats"]["memory"]["over memory"] == 0
    with pytest.raises(ValueError, match="block"):
        main([*command, "--block", "32"])


@jax_only
def test_the_untrained_model_reads(tmp_path):
    found = main(["read", *SMALL, "--tokens", "700", "--chunk", "2", "--out", str(tmp_path)])
    fam, bswa = found["FAM"], found["BSWA, 4 sinks"]
    assert fam["tokens"] == bswa["tokens"] == 640 and len(fam["memory RMS at the end"]) == 2
    assert fam["perplexity"] == pytest.approx(bswa["perplexity"], rel=0.05)
    assert fam["over BSWA, 4 sinks"]["most"] == pytest.approx(fam["perplexity"] / bswa["perplexity"])


@jax_only
def test_the_laboratory_pre_trains_what_the_memory_is_trained_into(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    from examples.laboratory import pretrain
    from examples.laboratory.__main__ import main as laboratory
    from examples.laboratory.compare import MEMORIES, SHARED
    from examples.smollm2.memory.prepared import build, read_config

    story = "Mr. Hill came home late. Nobody was there! He lit a candle, and read for an hour. "
    novel = ["CHAPTER 1", "", *[story] * 9, "", "CHAPTER 2", "", *[story] * 9]
    monkeypatch.setattr(pretrain, "austen", lambda folder: dict.fromkeys((*TRAINING, *HELD_OUT), novel))
    monkeypatch.setattr(pretrain, "king_james", lambda folder: {"Ge": story})
    monkeypatch.setattr(pretrain, "topics_text", lambda: [story])
    size = ["--layers", "2", "--width", "32", "--vocabulary", "300", "--context", "256", "--rows", "2"]
    command = ["pretrain", *size, "--steps", "2", "--out", str(tmp_path)]
    first = laboratory(command)
    again = laboratory(command)
    assert (first["steps"], again["steps"]) == (2, 4) and np.isfinite(again["curve"][-1]["nats"])
    prepared = Prepared(tmp_path)
    assert prepared.tokenizer.decode(prepared.held_out.token_ids[:60].tolist()).startswith("CHAPTER 1\n\nMr. Hill")
    args = parser().parse_args(["train", "--data", str(tmp_path), "--block", "8", "--fam", "0", "--random"])
    lm = build(prepared, read_config(prepared, args), dtype="float32")
    assert lm.count_params() == sum(array.size for array in prepared.arrays().values())
    for name, array in prepared.arrays().items():
        assert np.isfinite(array).all(), name
    assert np.abs(prepared.arrays()["1/query"]).std() > 0
    from examples.laboratory import attention

    command = parser().parse_args(["train", "--data", str(tmp_path), *SHARED, *MEMORIES["anchored"]])
    lm = build(prepared, read_config(prepared, command), dtype="float32", seed=5)
    (tmp_path / "city" / "anchored_3").mkdir(parents=True)
    values = {f"value_{i}": np.asarray(v.value) for i, v in enumerate(lm.trainable_variables)}
    np.savez(tmp_path / "city" / "anchored_3" / "values.npz", **values)
    monkeypatch.setattr(attention, "ROWS", 2)
    found = laboratory(["attention", "--memories", "anchored", "--seeds", "3", "--out", str(tmp_path)])
    shares = np.array(list(found["anchored, seed 3"].values()))
    assert shares.shape == (2, 2) and (shares > 0).all() and (shares < 0.5).all()


def test_the_command_offers_every_mixture():
    from examples.smollm2.memory.batches import ASKED, MIXTURES

    for name in MIXTURES:
        assert parser().parse_args(["train", "--mixture", name]).mixture == name
    assert set(ASKED) == set(MIXTURES) - {"standard"}
    with pytest.raises(SystemExit):
        parser().parse_args(["train", "--mixture", "cities"])


def test_a_comparison_names_options_of_the_command():
    from examples.laboratory.compare import MEMORIES, SHARED

    for options in MEMORIES.values():
        assert parser().parse_args(["train", "--data", "folder", *SHARED, *options]).fam == 8


def test_a_comparison_lists_all_runs_that_have_ended(tmp_path):
    from examples.laboratory.__main__ import main as laboratory

    def write(name, content):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))

    write("pretraining.json", {"steps": 4, "seconds": 2.0, "curve": [{"step": 2}, {"step": 4, "nats": 3.0}]})
    for name in ("anchored_0", "layer_inputs_average_12", "unknown_0"):
        write(f"city/{name}/record.json", {"steps": 7, "tokens": 70, "seconds": 90.0, "steps by blocks": {"4": 7}})
        exact = {"Needle": {"memory": [1, 0, 1, 1], "other": [0, 0, 0, 1], "distances": [9, 8, 7, 6]}}
        needles = {"1": {"tokens": 128, "memory RMS": [1.0], "exact": exact}}
        write(f"city/{name}/evaluation.json", {"trained tokens": 128, "needles": needles})
    write("city/anchored_1/record.json", {})  # not at its end
    found = laboratory(["compare", "--memories", "anchored", "--out", str(tmp_path)])
    assert set(found["runs"]) == {"anchored, seed 0", "layer_inputs, average, seed 12"}
    run = found["runs"]["anchored, seed 0"]
    assert (run["steps"], run["minutes"], run["trained tokens"]) == (7, 1.5, 128)
    assert run["needles"]["1"]["exact"] == {"Needle": {"memory": 0.75, "other": 0.25}}
    assert found["pre-training"]["measured"] == [{"step": 4, "nats": 3.0}]
    assert json.loads((tmp_path / "city.json").read_text())["runs"] == found["runs"]


def test_book_tokens_are_weighed_by_what_long_context_is_worth(tmp_path):
    options = ["--tiny", "--fam", "0", "--block", "16", "--long", "64", "--chunk", "2", "--tokens", "200"]
    if keras.backend.backend() != "jax":
        pytest.skip("book tokens are weighed by a program of JAX alone, as the training loop is")
    weights = main(["weigh", *options, "--out", str(tmp_path)])
    prepared = Prepared()
    assert len(weights) == len(prepared.train) and weights[1:193].mean() == pytest.approx(1, rel=1e-5)
    assert not np.array_equal(weights[1:193], np.ones(192)) and (weights[193:] == 1).all()
    prose = prepared.weighted(tmp_path / "worth.npz")
    assert np.allclose(prose.weights, weights, rtol=1e-3) and np.array_equal(prose.token_ids, prepared.train.token_ids)


@jax_only
@pytest.mark.parametrize("rank", [0, 2])
def test_a_model_that_equals_its_teacher_is_not_drawn_to_it(rank):
    """Within one block, where the window is the whole text; with longer texts the distance grows, and is learned."""
    import jax

    import keras_fam
    from examples.smollm2.memory.learner import Learner
    from examples.smollm2.memory.prepared import build, read_config

    args = parser().parse_args(["train", *SMALL[:3], "--block", "16", "--segments", "0", "--fam", "4"])
    args.tiny = args.random = True
    lm = build(Prepared(), read_config(Prepared(), args), dtype="float32", random=True)
    if rank:
        lm.enable_lora(rank)
    rates = dict.fromkeys(("weights", "lora", "memory", "gate"), 1e-3)
    teacher = keras_fam.training.full_attention(lm, 64)
    learner = Learner(lm, rates, teacher=teacher, distill=2.0, longest=64)
    plain = Learner(lm, rates)
    ids = np.random.default_rng(0).integers(0, 256, (2, 64))
    for tokens, close in ((16, True), (64, False)):
        text, at = ids[:, :tokens], np.full((2, 3), tokens - 2)
        batch = (text, at, text[:, -1:].repeat(3, 1), np.ones((2, 3), "float32"))
        with_teacher, without = (float(one.evaluate(*batch)[0]) for one in (learner, plain))
        assert (abs(with_teacher - without) < 1e-5) == close and with_teacher >= without - 1e-5
    gradient = jax.jit(jax.grad(lambda values: learner.loss(values, learner.fixed, *batch)[0]))(learner.values)
    assert all(np.isfinite(g).all() for g in gradient)
