"""`model.export` of Keras for the layers and models here, wherever Keras exports a plain attention layer."""

import keras
import numpy as np
import pytest
import support

import keras_fam
from keras_fam import baselines

BACKEND = keras.backend.backend()
V, D, T = 31, support.HIDDEN_DIM, 10
# Format, packages that it needs here, and whether batch and time may be left open.
FORMATS = {
    "tensorflow": {"tf_saved_model": ([], True, True), "litert": ([], False, False)},
    "jax": {"tf_saved_model": (["tensorflow"], True, True), "onnx": (["jax2onnx", "onnxruntime"], True, False)},
    "torch": {"torch": ([], False, False), "onnx": (["onnxscript", "onnxruntime"], False, False)},
}[BACKEND]
SUFFIXES = {"tf_saved_model": "", "litert": ".tflite", "onnx": ".onnx", "torch": ".pt2"}
SYSTEMS = {
    "window": (keras_fam.TransformerFAMBackbone, {"memory_segments": 2, "attention_window": 5}),
    "summary": (
        keras_fam.TransformerFAMBackbone,
        {"initial_fam": "summary", "num_visible_memories": 2, "attention_sinks": 2},
    ),
    "scan_layers": (
        keras_fam.TransformerFAMBackbone,
        {"scan_layers": True, "num_layers": 2, "fam_query": "anchored", "memory_update": "hard_gate", "fam_gate": 0.0},
    ),
    "steps": (keras_fam.TransformerFAMBackbone, {"blocks_per_step": 1}),
    "rmt": (baselines.RMTBackbone, {}),
    "fm": (baselines.FeedbackMemoryBackbone, {"fam_length": 0}),
    "sum_fam": (baselines.SummaryFAMBackbone, {}),
    "experts": (
        keras_fam.TransformerFAMBackbone,
        {
            "feed_forward": keras_fam.MixtureOfExperts(4, 6),
            "softmax_sink": True,
            "rotary_dim": 2,
            "parallel_residual": True,
        },
    ),
}


def language_model(name=None):
    backbone, settings = SYSTEMS.get(name, (keras_fam.TransformerFAMBackbone, {}))
    settings = {**support.SMALL, "num_layers": 1, "hidden_dim": D, **settings}
    lm = keras_fam.TransformerFAMCausalLM(backbone(vocabulary_size=V, **settings))
    lm.build()
    return lm


def randomize(model):
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if keras.backend.is_float_dtype(variable.dtype):
            variable.assign(rng.normal(size=variable.shape) * 0.5)
    return model


def inputs(kind, rows, length):
    rng = np.random.default_rng(rows + length)
    if kind == "language model":
        return rng.integers(0, V, (rows, length)).astype("int32")
    return rng.normal(size=(rows, length, D)).astype("float32")


@pytest.fixture(scope="module", params=["FeedbackAttention", "TransformerFAMBlock", "language model"])
def functional(request):
    """A functional model around each, as a user has it."""
    settings = {k: v for k, v in support.SMALL.items() if k != "intermediate_dim"}
    if request.param == "language model":
        x = keras.Input((None,), dtype="int32", name="x")
        layer = language_model()
    else:
        x = keras.Input((None, D), name="x")
        settings = settings if request.param == "FeedbackAttention" else support.SMALL
        layer = getattr(keras_fam, request.param)(**settings)
    return request.param, randomize(keras.Model(x, layer(x)))


def load(format, path):
    """A written file as a function of one NumPy array."""
    if format == "tf_saved_model":
        import tensorflow as tf

        loaded = tf.saved_model.load(path)
        return lambda x: loaded.serve(x).numpy()
    if format == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options)
        name = session.get_inputs()[0].name
        return lambda x: session.run(None, {name: x})[0]
    if format == "torch":
        import torch

        module = torch.export.load(path).module()
        return lambda x: module(torch.tensor(x)).detach().numpy()
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        import tensorflow as tf

        Interpreter = tf.lite.Interpreter
    interpreter = Interpreter(model_path=path)

    def run(x):
        index = interpreter.get_input_details()[0]["index"]
        interpreter.resize_tensor_input(index, x.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(index, x)
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    return run


@pytest.mark.parametrize("format", FORMATS)
def test_keras_export(format, functional, tmp_path):
    kind, model = functional
    packages, any_batch, any_time = FORMATS[format]
    for package in packages:
        pytest.importorskip(package)
    path = str(tmp_path / f"model{SUFFIXES[format]}")
    shape = (None if any_batch else 3, None if any_time else T, *model.inputs[0].shape[2:])
    signature = [keras.InputSpec(shape=shape, dtype=model.inputs[0].dtype, name="x")]
    model.export(path, format=format, input_signature=signature, verbose=False)
    run = load(format, path)
    shapes = [(3, T)] + [(2, T)] * any_batch + [(2, 3)] * any_time  # 3 tokens complete no block
    for rows, length in shapes:
        x = inputs(kind, rows, length)
        support.close(run(x), model.predict(x, verbose=0), 1e-5)


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.skipif(BACKEND == "torch", reason="Keras' exports from torch have fixed shapes")
def test_systems_with_unknown_batch_and_time(name):
    """What SavedModels are made of: a program in which neither B nor T is a number."""
    model = randomize(language_model(name))
    if BACKEND == "jax":
        import jax

        rows, length = jax.export.symbolic_shape("rows, length")
        spec = jax.ShapeDtypeStruct((rows, length), "int32")
        run = jax.export.export(jax.jit(lambda x: model(x, training=False)))(spec).call
    else:
        import tensorflow as tf

        spec = tf.TensorSpec((None, None), "int32")
        run = tf.function(lambda x: model(x, training=False), autograph=False).get_concrete_function(spec)
    for rows, length in ((3, T), (2, 3)):
        x = keras.ops.convert_to_tensor(inputs("language model", rows, length))
        support.close(run(x), support.call(model, x), 1e-5)
