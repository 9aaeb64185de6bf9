"""`TextScorer` against logits of whole texts in NumPy, and lm-eval on it, where that is installed."""

import functools
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from support import close, numpy, tiny

import keras_fam
from keras_fam.evaluation import RaggedReader, TextScorer
from keras_fam.ops.backend import compiled

V = 11  # of the model: one letter each, with an end token that no text has
LETTERS = "abcdefgh .\n"


class Letters:
    """A tokenizer of letters, in which `ab` is one token: a boundary that texts can hide."""

    end_token_id, special_token_ids = 10, (10,)

    def __init__(self):
        self.pieces = ["ab", *"abcdefg ."]
        self.calls = []

    def __call__(self, text):
        self.calls.append(text)
        ids = []
        while text:
            piece = next(p for p in self.pieces if text.startswith(p))
            ids.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return ids

    def detokenize(self, ids):
        return "".join(self.pieces[i] for i in ids)


@pytest.fixture(scope="module", params=[3, 0], ids=["memory", "bswa"])
def lm(request):
    return tiny(2, fam_length=request.param, attention_sinks=2)


@pytest.fixture(scope="module")
def scorer(lm):
    return TextScorer(lm, 3, tokenizer=Letters(), blocks_per_step=2)


@functools.cache
def program(lm):
    return compiled(lambda ids: lm(ids), lambda: lm.variables)


def whole(lm, ids):
    """Logits of one call, padded to one length, which is one program; a causal model ignores the padding."""
    padded = np.array([ids + [0] * (64 - len(ids))], "int32")
    return numpy(program(lm)(padded))[0, : len(ids)]


def expected(lm, context, continuation):
    """Sum of log-probabilities, and whether all are the largest, from one call of the model on the whole."""
    ids = [*context, *continuation]
    logits = whole(lm, ids[:-1])[len(context) - 1 :].astype("float64")
    scores = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    scores = scores - logits.max(-1, keepdims=True)
    return scores[np.arange(len(continuation)), continuation].sum(), bool((logits.argmax(-1) == continuation).all())


def agree(found, wanted):
    close(np.array([total for total, _ in found]), np.array([total for total, _ in wanted]), 1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_pairs_are_scored_as_the_whole_text_is(lm, scorer):
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (5, 2), (23, 9), (3, 30), (8, 1), (9, 4), (40, 1), (2, 13)]
    pairs = [(rng.integers(0, 10, a).tolist(), rng.integers(0, 10, b).tolist()) for a, b in sizes]
    pairs += [(pairs[2][0], [1]), (pairs[2][0], [2, 3]), (pairs[2][0], [4])]  # one context, read once
    best = int(whole(lm, pairs[1][0])[-1].argmax())
    pairs.append((pairs[1][0], [best]))
    seen = {}
    found = scorer.score_tokens(pairs, seen.__setitem__)
    agree(found, [expected(lm, *pair) for pair in pairs])
    assert found[-1][1] and [seen[i] for i in range(len(pairs))] == found
    with pytest.raises(ValueError, match="at least one token"):
        scorer.score_tokens([([], [1])])
    with pytest.raises(ValueError, match=str(V - 1)):
        scorer.score_tokens([([1], [V])])


def test_rolling_texts_are_one_stream_each(lm, scorer):
    texts = ["abcab. dada", "g", "ab" * 30]
    wanted = [expected(lm, [10], scorer.encode(text))[0] for text in texts]
    close(np.array(scorer.loglikelihood_rolling(texts)), np.array(wanted), 1e-5)


def test_boundaries_are_those_of_the_whole_text(lm, scorer):
    tokenizer = scorer.tokenizer
    assert scorer.encode_pair("ca", "b.") == (tokenizer("ca"), tokenizer("cab.")[2:]), "`ab` hides the boundary"
    assert scorer.encode_pair("c  ", "d") == (tokenizer("c"), tokenizer("  d"))
    assert scorer.encode_pair("", "cd") == ([10], tokenizer("cd"))
    assert scorer.encode_pair(" ", "d") == ([10], tokenizer(" d"))
    with pytest.raises(ValueError, match="add a token"):
        scorer.encode_pair("ca", "b")
    agree(scorer.loglikelihood([("", "cd")]), [expected(lm, [10], tokenizer("cd"))])


def test_completions_end_at_strings_and_tokens(lm, scorer):
    contexts, new = ["abc dab", "", "fab. cab" * 3], 6
    wanted = []
    for context in contexts:
        ids = scorer.encode(context) or [10]
        rest = keras_fam.StreamingModel(lm, 1).generate([ids], max_new_tokens=new, stop_token_ids=[10])[0]
        wanted.append(scorer.tokenizer.detokenize([i for i in rest if i != 10]))
    assert scorer.generate_until(contexts, max_new_tokens=new) == wanted
    ends = [wanted[0][2:4] or "x", wanted[2][1:2] or "x"]
    cut = [min((text.split(end)[0] for end in ends), key=len) for text in wanted]
    assert scorer.generate_until(contexts, ends, max_new_tokens=new) == cut
    assert any(len(a) < len(b) for a, b in zip(cut, wanted, strict=True))


def test_the_arguments_are_checked(lm):
    with pytest.raises(ValueError, match="tokenizer"):
        TextScorer(lm)
    with pytest.raises(ValueError, match="prefix_token_id"):
        TextScorer(lm, tokenizer=lambda text: [1])
    with pytest.raises(ValueError, match="start token"):
        TextScorer(lm, tokenizer=Letters(), add_start_token=True)
    with pytest.raises(ValueError, match="batch_size"):
        TextScorer(lm, 0, tokenizer=Letters())
    with pytest.raises(ValueError, match="decode"):
        TextScorer(lm, tokenizer=lambda text: [1], prefix_token_id=0).generate_until(["a"], max_new_tokens=2)
    with pytest.raises(ValueError, match="blocks_per_step"):
        RaggedReader(lm, 0)
    reader = RaggedReader(lm)
    with pytest.raises(ValueError, match="target"):
        reader.score([[1, 2]], [[1]], lm.get_initial_state(1))


def test_memory_does_not_grow_with_the_text(lm):
    """What is handed to the compiled programs has one of a few shapes, however long the text is."""
    reader, shapes = RaggedReader(lm, blocks_per_step=2), set()
    advance = type(lm.backbone).advance
    state, program_of = lm.get_initial_state(2), reader._program

    def noted(kind, aligned, function):
        program = program_of(kind, aligned, function)

        def run(*args):
            shapes.add((kind, *(tuple(x.shape) for x in args[:-1])))
            return program(*args)

        return run

    reader._program = noted
    for size in (37, 90):
        rows = [np.arange(size) % V, np.arange(size // 2) % V]
        state = reader.read(rows, state)
        _, _, state = reader.score(rows, rows, state)
    assert advance is type(lm.backbone).advance and len(shapes) <= 14
    assert max(shape[-1][0] if len(shape) < 3 else shape[1][1] for shape in shapes) == 8


@pytest.fixture
def harness():
    return pytest.importorskip("lm_eval")


TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
{rest}
metadata:
  version: 1
"""


def test_the_harness_scores_tasks(harness, lm, tmp_path):
    """A task of each kind of request, from local files; results against the model's logits in NumPy."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from keras_fam.evaluation.lm_eval import KerasFAM

    rng = np.random.default_rng(1)
    documents = []
    for _ in range(5):
        text = "".join(rng.choice(list("abcdefg .")) for _ in range(rng.integers(3, 40)))
        documents.append({"text": "c" + text + "d", "choices": ["ab.", " b", "cg"], "label": int(rng.integers(3))})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    choice = 'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\ntarget_delimiter: ""'
    rolling = 'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n  - metric: bits_per_byte'
    until = 'doc_to_text: "{{text}}"\ndoc_to_target: "{{text}}"\ngeneration_kwargs:\n  until: ["b"]\n  max_gen_toks: 5'
    kinds = {"multiple_choice": choice, "loglikelihood_rolling": rolling, "generate_until": until}
    for kind, rest in kinds.items():
        text = TASK.format(name=f"own_{kind}", data=tmp_path / "data.jsonl", kind=kind, rest=rest)
        (tmp_path / f"{kind}.yaml").write_text(text)
    model = KerasFAM(model=lm, batch_size="2", tokenizer=Letters())
    assert model._encode_pair("ca", "b.") == model.scorer.encode_pair("ca", "b.")
    found = simple_evaluate(
        model,
        tasks=[f"own_{kind}" for kind in kinds],
        task_manager=TaskManager(include_path=str(tmp_path)),
        log_samples=True,
        bootstrap_iters=0,
    )
    scorer, right, nats, size = model.scorer, [], 0.0, 0
    for document in documents:
        pairs = [scorer.encode_pair(document["text"], choice) for choice in document["choices"]]
        right.append(np.argmax([expected(lm, *pair)[0] for pair in pairs]) == document["label"])
        nats += expected(lm, [10], scorer.encode(document["text"]))[0]
        size += len(document["text"])
    results = found["results"]
    assert results["own_multiple_choice"]["acc,none"] == pytest.approx(np.mean(right))
    bits = results["own_loglikelihood_rolling"]["bits_per_byte,none"]
    assert bits == pytest.approx(-nats / size / np.log(2), rel=1e-5)
    for sample in found["samples"]["own_generate_until"]:
        text = sample["doc"]["text"]
        assert sample["resps"][0][0] == scorer.generate_until([text], ["b"], max_new_tokens=5)[0]


def test_the_harness_runs_from_the_command_line(harness, tmp_path):
    """`--model keras_fam --model_args preset=...`: a model from a folder, a tokenizer from a file."""
    tokenizers = pytest.importorskip("tokenizers")
    tiny().save_to_preset(tmp_path / "preset")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate("abcdefghij")}, "a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "abcdefghij"}) + "\n")
    rest = 'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n  - metric: word_perplexity'
    text = TASK.format(name="own_text", data=tmp_path / "data.jsonl", kind="loglikelihood_rolling", rest=rest)
    (tmp_path / "task.yaml").write_text(text)
    options = f"preset={tmp_path / 'preset'},tokenizer={tmp_path / 'tokenizer.json'},prefix_token_id=10"
    command = [sys.executable, "-m", "keras_fam.evaluation.lm_eval", "--model", "keras_fam", "--model_args", options]
    command += ["--tasks", "own_text", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "word_perplexity" in done.stdout, done.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval must be missing")
def test_a_missing_harness_names_the_extra():
    with pytest.raises(ImportError, match=r"keras-fam\[lm-eval\]"):
        importlib.import_module("keras_fam.evaluation.lm_eval")
