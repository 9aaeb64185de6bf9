"""`python -m examples.long_context` at small size: its texts, its systems, its table, and the package of RULER."""

import collections
import json

import keras
import numpy as np
import pytest
from keras import ops
from support import call, on_one_backend

import keras_fam
from examples.long_context import ruler, tasks
from examples.long_context.__main__ import main
from examples.long_context.models import Bytes
from examples.long_context.systems import DELAY, MEMORY_SYSTEMS, Systems, closed_gates, gates, memory_of

STORY = "It was late. Nobody came. The door was open, and the lamp was lit. She waited for an hour. Then she left. "


@pytest.fixture(scope="module")
def prose():
    return keras_fam.tasks.Prose.from_texts([STORY * 20], Bytes())


@on_one_backend
@pytest.mark.parametrize("name", tasks.TASKS)
def test_texts_hold_their_answers(name, prose):
    tokenizer = Bytes()
    for tokens in (1500, 4096) if name == "cwe" else (900, 2000):
        sample = tasks.make(name, tokens, (0, 1), prose, tokenizer)
        again = tasks.make(name, tokens, (0, 1), prose, tokenizer)
        text = tokenizer.detokenize(sample.ids.tolist())
        assert np.array_equal(sample.ids, again.ids) and sample.answers == again.answers
        assert all(answer in text for answer in sample.answers)
        if name in tasks.NEEDLES:
            _, values, asked, _, _ = tasks.NEEDLES[name]
            assert len(sample.ids) == tokens and len(sample.answers) == asked * values
            assert all(text.count(answer) == 1 for answer in sample.answers)
        elif name == "vt":
            assert len(sample.ids) == tokens and len(sample.answers) == 5
        elif name == "cwe":
            body = text.split("\n\n")[1].split()[1::2]
            counts = collections.Counter(body)
            assert {word for word, _ in counts.most_common(10)} == set(sample.answers)
            assert 0.7 * tokens < len(sample.ids) <= tokens
        elif name == "fwe":
            counts = collections.Counter(text.split("\n\n")[1].split())
            assert [word for word, _ in counts.most_common(4)] == ["...", *sample.answers]
            assert 0.7 * tokens < len(sample.ids) <= tokens
        else:
            assert tokens - 60 < len(sample.ids) < tokens and len(sample.answers) == 1
    assert tasks.score(f"so {sample.answers[0].upper()}.", sample.answers) == pytest.approx(1 / len(sample.answers))


def test_texts_that_are_too_short_are_refused(prose):
    for name in ("niah_multiquery", "cwe", "who_is_where_3"):
        with pytest.raises(ValueError, match="tokens"):
            tasks.make(name, 60, (0,), prose, Bytes())


@pytest.fixture(scope="module")
def lm():
    keras.utils.set_random_seed(0)
    settings = {"vocabulary_size": 258, "num_layers": 1, "hidden_dim": 8, "num_query_heads": 2, "intermediate_dim": 8}
    settings |= {"block_size": 4, "memory_segments": 0, "fam_length": 2, "fam_gate": 1.0}
    model = keras_fam.TransformerFAMCausalLM(keras_fam.TransformerFAMBackbone(**settings))
    model.build()
    model.backbone.token_embedding.embeddings.assign(np.random.default_rng(0).normal(size=(258, 8)))
    return model


def test_ablations_put_another_memory_in_place(lm):
    """What each ablation reads before the last tokens, against the same thing done by hand."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 256, size) for size in (58, 61)]
    systems, seen = Systems({"FAM": lm}, 2, tail=10, tokenizer=Bytes(), blocks_per_step=2), []
    systems._finish = lambda scorer, state, texts, new: seen.append(state) or ["", ""]
    assert systems.names == list(MEMORY_SYSTEMS)
    found = systems.complete(texts, 4)
    states = dict(zip(found, seen, strict=True))
    blocks = [(len(ids) - 1) // 4 for ids in texts]

    def memory(row, stop):
        _, state = call(lm.advance, texts[row][None, :stop], lm.get_initial_state(1))
        return ops.convert_to_numpy(memory_of(state)[0][0])[0]

    own = ops.convert_to_numpy(states["FAM"].layers[0].fam)
    for row in range(2):
        assert np.allclose(own[row], memory(row, 4 * blocks[row]), atol=1e-5)
        other = 1 - row
        held = {name: ops.convert_to_numpy(state.layers[0].fam)[row] for name, state in states.items()}
        assert not held["FAM, zeroed"].any()
        assert np.allclose(held["FAM, another text's"], own[other], atol=1e-6)
        assert np.allclose(held["FAM, 8 blocks ago"], memory(row, 4 * (blocks[row] - DELAY)), atol=1e-5)
        assert not np.allclose(held["FAM, 8 blocks ago"], own[row], atol=1e-3)
    for state in states.values():
        assert ops.convert_to_numpy(state.position.offset).tolist() == [len(ids) % 4 - 1 for ids in texts]


def test_closed_gates_open_again(lm):
    (gate,) = gates(lm)
    ids, before = np.arange(20)[None] % 250, ops.convert_to_numpy(gate.value)
    opened = ops.convert_to_numpy(call(lm, ids))
    with closed_gates(lm):
        closed = ops.convert_to_numpy(call(lm, ids))
    scorer = keras_fam.StreamScorer(lm, "closed", boundaries=[0])
    with closed_gates(lm):
        same = keras_fam.StreamScorer(lm, boundaries=[0]).score(ids)
    assert np.allclose(same, scorer.score(ids), rtol=1e-6) and not np.allclose(opened, closed, atol=1e-4)
    assert np.array_equal(before, ops.convert_to_numpy(gate.value))


def test_the_command_makes_a_table_and_resumes(tmp_path, capsys):
    command = ["--tiny", "--source", "own", "--tokens", "300", "--tasks", "niah_single_2"]
    command += ["--samples", "3", "--rows", "2", "--block", "64", "--fam", "2", "--tail", "2", "--new-tokens", "1"]
    command += ["--full", "300", "--blocks-per-step", "2", "--out", str(tmp_path)]
    cells = main(command)
    names = ["BSWA, sinks", "full attention", *MEMORY_SYSTEMS]
    assert [list(cell["scores"]) for cell in cells] == [names]
    assert all(len(found) == 3 for cell in cells for found in cell["scores"].values())
    path, printed = tmp_path / "cells" / "niah_single_2_300.json", capsys.readouterr().out
    assert printed.count("| niah_single_2 | 300 |") == 1 and (tmp_path / "table.md").exists()
    cell = json.loads(path.read_text())
    cell["scores"]["FAM"] = [1.0, 1.0, 1.0]
    path.write_text(json.dumps(cell))
    assert main(command)[0]["scores"]["FAM"] == [1.0, 1.0, 1.0], "what is done is kept"
    assert json.loads((tmp_path / "results.json").read_text())["cells"][0]["scores"]["FAM"] == [1.0, 1.0, 1.0]
    with pytest.raises(SystemExit, match="other settings"):
        main([*command, "--seed", "1"])


def test_the_package_of_ruler(tmp_path):
    if ruler.missing():
        with pytest.raises(RuntimeError, match="nvidia-long-context-eval"):
            ruler.generate("vt", 600, 1, 0, "tokenizer.json", tmp_path / "x.jsonl")
        return
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    lines = ruler.generate("niah_single_1", 600, 2, 0, tmp_path / "tokenizer.json", tmp_path / "x.jsonl")
    assert [len(line["outputs"]) for line in lines] == [1, 1] and all(line["length"] <= 600 for line in lines)
    assert all(line["outputs"][0] in line["input"] for line in lines)
