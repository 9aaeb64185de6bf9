"""One step as a file: read in a process that has neither keras_fam nor Keras, token by token over block borders."""

import functools
import json
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import support
from keras import ops

import keras_fam
from keras_fam import baselines
from keras_fam.export.step import step_files, stream_step
from keras_fam.export.step.stream_step import export_step
from keras_fam.ops.scan import branch, compute_both_branches

BACKEND = keras.backend.backend()
FORMATS = [name for name, (_, backends) in stream_step.FORMATS.items() if BACKEND in backends]
V, ROWS, TOTAL, S = 31, 3, 13, support.SMALL["block_size"]
WRITES = {"onnx": ["onnxruntime", *{"jax": ["jax2onnx"], "torch": ["onnxscript"]}.get(BACKEND, [])]}
# 13 tokens, three block borders; steps of 1 and of S in an order in which those of S start anywhere.
STEPS = (1, 1, S, 1, S, 1, 1)

READER = """
import json, sys
import numpy as np

folder, kind, batches, steps, tokens = json.loads(sys.argv[1])
suffix = {"onnx": "onnx", "litert": "tflite", "torch": "pt2"}[kind]


def load(path):
    if kind == "onnx":
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options)
        names = [x.name for x in session.get_outputs()]
        return lambda **inputs: dict(zip(names, session.run(None, inputs)))
    if kind == "litert":
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError:
            import tensorflow as tf
            Interpreter = tf.lite.Interpreter
        return Interpreter(model_path=path).get_signature_runner("serving_default")
    import torch
    module = torch.export.load(path).module()

    def run(**inputs):
        with torch.no_grad():
            results = module(**{name: torch.tensor(x) for name, x in inputs.items()})
        return {name: x.numpy() for name, x in results.items()}

    return run


runs = {size: load(f"{folder}/step{size}.{suffix}") for size in set(steps)}
back = json.load(open(f"{folder}/step{steps[0]}.json"))["state"]
for rows in batches:
    state = {name: np.repeat(x, rows, axis=0) for name, x in np.load(f"{folder}/step{steps[0]}.state.npz").items()}
    given, first, found = np.array(tokens, "int32")[:rows], 0, []
    for size in steps:
        results = runs[size](token_ids=given[:, first : first + size], **state)
        state, first = {name: results[output] for output, name in back.items()}, first + size
        found.append(results["logits"])
    np.save(f"{folder}/logits{rows}.npy", np.concatenate(found, axis=1))
assert not {"keras", "keras_fam"} & set(sys.modules)
"""


# What layers of other families have, at once.
EXPERTS = {"feed_forward": keras_fam.MixtureOfExperts(4, 6), "softmax_sink": True, "rotary_dim": 2,
           "parallel_residual": True}  # fmt: skip
# Each system of the paper, and one with experts: its backbone and settings.
SYSTEMS = {
    "fam": (keras_fam.TransformerFAMBackbone, {"attention_sinks": 2}),
    "bswa": (keras_fam.TransformerFAMBackbone, {"fam_length": 0}),
    "rmt": (baselines.RMTBackbone, {"num_layers": 2}),  # the top layer feeds the bottom one
    "fm": (baselines.FeedbackMemoryBackbone, {"fam_length": 0}),
    "sum_fam": (baselines.SummaryFAMBackbone, {}),
    "experts": (keras_fam.TransformerFAMBackbone, EXPERTS),
}


def make_model(backbone=keras_fam.TransformerFAMBackbone, **settings):
    settings = {**support.SMALL, "num_layers": 1, "hidden_dim": support.HIDDEN_DIM, **settings}
    backbone = backbone(vocabulary_size=V, **settings)
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.build()
    rng = np.random.default_rng(0)
    for variable in lm.weights:
        variable.assign(rng.normal(size=variable.shape) * 0.5)
    return lm


@pytest.fixture(scope="module")
def lm():
    # Tracers of torch are slow: the layers of a model are alike there.
    return make_model(num_layers=1 if BACKEND == "torch" else 2)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, V, (ROWS, TOTAL)).astype("int32")


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """torch's tracer is slow: what it makes of one step is written in both formats."""
    programs, trace = {}, step_files._torch_program

    def traced(step):
        key = id(step.model), step.tokens, step.batch_size
        if key not in programs:
            programs[key] = step.model, trace(step)  # the model is kept, so that its id stays its own
        return programs[key][1]

    step_files._torch_program = traced
    yield
    step_files._torch_program = trace


def suffix(format):
    return stream_step.FORMATS[format][0]


def read_elsewhere(folder, format, batches, tokens):
    """Logits of the first rows of `tokens`, for each number of rows in `batches`."""
    given = json.dumps([str(folder), format, batches, STEPS, tokens.tolist()])
    done = subprocess.run([sys.executable, "-c", READER, given], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, f"{BACKEND}: {done.stderr[-3000:]}"
    return [np.load(folder / f"logits{rows}.npy") for rows in batches]


@pytest.mark.parametrize("format", FORMATS)
def test_a_process_without_keras_reads_the_stream(format, lm, tokens, tmp_path):
    for package in WRITES.get(format, []):
        pytest.importorskip(package)
    batch_size = ROWS if format == "litert" else None
    for size in set(STEPS):
        path = tmp_path / f"step{size}{suffix(format)}"
        assert export_step(lm, path, format, tokens=size, batch_size=batch_size) == path
    whole = lm.predict(tokens, verbose=0)
    for logits in read_elsewhere(tmp_path, format, [ROWS] if batch_size else [1, ROWS], tokens):
        support.close(logits, whole[: len(logits)], 1e-5)

    known = json.loads((tmp_path / "step1.json").read_text())
    assert known["inputs"]["token_ids"] == {"shape": [batch_size, 1], "dtype": "int32"}
    assert known["outputs"]["logits"] == {"shape": [batch_size, 1, V], "dtype": "float32"}
    assert known["state"]["next_state_layers_0_key"] == "state_layers_0_key"
    assert known["outputs"]["next_state_position_fresh"] == {"shape": [batch_size], "dtype": "bool"}
    first = np.load(tmp_path / "step1.state.npz")
    assert list(first) == list(known["inputs"])[1:] == list(known["state"].values())
    assert {x.shape[0] for x in first.values()} == {1}

    with pytest.raises(ValueError, match="exists already"):
        export_step(lm, tmp_path / f"step1{suffix(format)}", format, batch_size=batch_size)


@functools.cache
def system(name):
    """A model of a system, some tokens, and its logits of the whole sequence."""
    backbone, settings = SYSTEMS[name]
    model = make_model(backbone, **settings)
    token_ids = np.random.default_rng(2).integers(0, V, (2, 2 * S + 1)).astype("int32")
    return model, token_ids, model.predict(token_ids, verbose=0)


@pytest.mark.parametrize("format", stream_step.FORMATS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_in_every_format(name, format, tmp_path, monkeypatch):
    """Exact over two block boundaries, or refused with the remedy."""
    model, token_ids, whole = system(name)
    path = tmp_path / f"step{suffix(format)}"
    if format not in FORMATS:
        with pytest.raises(ValueError, match=r"model\.save\('model\.keras'\)` and export it .* KERAS_BACKEND="):
            export_step(model, path, format, batch_size=2)
        assert not list(tmp_path.iterdir())
        return
    for package in WRITES.get(format, []):
        pytest.importorskip(package)
    loaded, load = [], step_files.load
    monkeypatch.setattr(step_files, "load", lambda *args: loaded.append(load(*args)) or loaded[-1])
    export_step(model, path, format, batch_size=2)  # a fixed batch is traced fastest
    run = loaded[-1]  # what was compared with the model
    back = json.loads(path.with_suffix(".json").read_text())["state"]
    state = {key: np.repeat(x, 2, axis=0) for key, x in np.load(path.with_suffix(".state.npz")).items()}
    for i in range(token_ids.shape[1]):
        results = run({"token_ids": token_ids[:, i : i + 1], **state})
        state = {key: np.asarray(results[output]) for output, key in back.items()}
        support.close(np.asarray(results["logits"])[:, 0], whole[:, i], 1e-5)


def test_a_step_that_forgets_is_not_kept(lm, tmp_path, monkeypatch):
    format = FORMATS[-1]
    for package in WRITES.get(format, []):
        pytest.importorskip(package)
    written = stream_step.step_files.load

    def forgetful(format, path):
        run = written(format, path)
        return lambda inputs: {**run(inputs), "next_state_layers_0_fam": inputs["state_layers_0_fam"]}

    monkeypatch.setattr(stream_step.step_files, "load", forgetful)
    with pytest.raises(RuntimeError, match="next_state_layers_0_fam"):
        export_step(lm, tmp_path / f"step{suffix(format)}", format, batch_size=1)
    assert not list(tmp_path.iterdir())


def test_arguments(lm, tmp_path):
    format = FORMATS[0]
    path = tmp_path / f"step{suffix(format)}"
    for match, arguments in (
        ("must end in", (lm, tmp_path / "step.bin", format)),
        ("`format` must be one of", (lm, path, "openvino")),
        ("takes a TransformerFAMCausalLM", (keras.Sequential(), path, format)),
        ("writes float32 models", (make_model(dtype="bfloat16"), path, format)),
    ):
        with pytest.raises(ValueError, match=match):
            export_step(*arguments, batch_size=1)
    for settings in ({"tokens": 0}, {"tokens": True}, {"tokens": 1.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be a positive integer"):
            export_step(lm, path, format, **settings)
    if "litert" in FORMATS:
        with pytest.raises(ValueError, match="fixed batch"):
            export_step(lm, path, format)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_extra(lm, tmp_path, monkeypatch):
    if "onnx" not in FORMATS:
        pytest.skip("needs no other package on this backend")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for package in WRITES["onnx"][1:]:
        pytest.importorskip(package)
    with pytest.raises(ImportError, match=r'pip install "keras-fam\[formats\]"'):
        export_step(lm, tmp_path / "step.onnx", "onnx")


def test_both_branches_are_computed_inside_the_context_alone():
    called = []

    def side(name, value):
        def compute():
            called.append(name)
            return ops.full((2,), value), (ops.ones((1,), "int32"),)

        return compute

    def run(predicate):
        called.clear()
        first, (second,) = branch(ops.convert_to_tensor(predicate), side("true", 1.0), side("false", 2.0))
        assert keras.backend.standardize_dtype(second.dtype) == "int32"
        return float(first[0]), sorted(called)

    assert run(True) == (1.0, ["true"]) and run(False) == (2.0, ["false"])
    others = []
    with pytest.raises(RuntimeError, match="inside"), compute_both_branches():
        assert run(True) == (1.0, ["false", "true"]) and run(False) == (2.0, ["false", "true"])
        with compute_both_branches():
            pass
        assert run(True) == (1.0, ["false", "true"])
        thread = threading.Thread(target=lambda: others.append(run(True)))
        thread.start()
        thread.join()
        raise RuntimeError("inside")
    assert others == [(1.0, ["true"])] and run(True) == (1.0, ["true"])
