"""Writing and running the files of one step: ONNX, LiteRT and torch, each with its own packages."""

import importlib
import inspect
import tempfile

import keras
from keras import ops

from keras_fam.export.step import onnx_from_jax
from keras_fam.ops.scan import compute_both_branches, keep_branches_small

# Writing ------------------------------------------------------------------------------------------------------------


def _torch_program(step):
    import torch

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = step.model

        def forward(self, **inputs):
            return step.named(**inputs)

        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in step.inputs]
        self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        forward.__signature__ = inspect.Signature([self, *parameters])  # keywords of the exported program
        del parameters, self

    # Inputs of their own: torch would trace two inputs that share a tensor as one.
    example = {name: x.clone().contiguous() for name, x in step.example(step.batch_size or 3).items()}
    shapes = None
    if step.batch_size is None:
        shapes = {name: {0: torch.export.Dim.AUTO} for name in example}
    with torch.no_grad(), compute_both_branches():
        return torch.export.export(Module(), (), example, dynamic_shapes=shapes)


def _pt2_from_torch(step, path):
    import torch

    torch.export.save(_torch_program(step), path)


def _onnx_from_torch(step, path):
    import torch

    program = _torch_program(step)
    # `squeeze` of an axis longer than 1 does nothing in torch, and is an error in ONNX.
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.squeeze.dim:
            source = node.args[0]
            if source.meta["val"].ndim == node.meta["val"].ndim:
                node.replace_all_uses_with(source)
                program.graph.erase_node(node)
    program.graph_module.recompile()
    names = {"input_names": list(step.inputs), "output_names": step.outputs}
    torch.onnx.export(program, dynamo=True, verbose=False, **names).save(path)


def _litert_from_tensorflow(step, path):
    import tensorflow as tf

    specs = {name: tf.TensorSpec(shape, dtype, name=name) for name, (shape, dtype) in step.inputs.items()}
    function = tf.function(step.named, autograph=False).get_concrete_function(**specs)
    module = tf.Module()
    module.weights = [variable.value for variable in step.model.variables]
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures={"serving_default": function})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["serving_default"])
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        path.write_bytes(converter.convert())


_WRITERS = {
    ("onnx", "jax"): onnx_from_jax.write_onnx,
    ("onnx", "torch"): _onnx_from_torch,
    ("litert", "tensorflow"): _litert_from_tensorflow,
    ("torch", "torch"): _pt2_from_torch,
}
_NEEDED = {
    ("onnx", "jax"): ("jax2onnx", "onnx", "onnxruntime"),
    ("onnx", "torch"): ("onnx", "onnxscript", "onnxruntime"),
    ("litert", "tensorflow"): (),  # TensorFlow still ships the interpreter
    ("torch", "torch"): (),
}


def require(format):
    """ImportError if a package that writes or runs a format on this backend is missing."""
    for package in _NEEDED[format, keras.backend.backend()]:
        _require(package, format)


def _require(package, format):
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f'`format="{format}"` needs {package} on this backend: pip install "keras-fam[formats]".'
        ) from error


# Running ------------------------------------------------------------------------------------------------------------


def _run_onnx(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))


def _run_torch(path):
    import torch

    module = torch.export.load(path).module()

    def run(inputs):
        with torch.no_grad():
            results = module(**{name: ops.convert_to_tensor(x) for name, x in inputs.items()})
        return {name: ops.convert_to_numpy(x) for name, x in results.items()}

    return run


def _run_litert(path):
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        import tensorflow as tf

        Interpreter = tf.lite.Interpreter
    run = Interpreter(model_content=path.read_bytes()).get_signature_runner("serving_default")
    return lambda inputs: run(**inputs)


_RUNNERS = {"onnx": _run_onnx, "torch": _run_torch, "litert": _run_litert}


def write(format, step, path):
    """Writes a `Step` as one file (and the files that a format puts beside it)."""
    with keep_branches_small():
        _WRITERS[format, keras.backend.backend()](step, path)


def load(format, path):
    """A written step as a function from NumPy arrays, by name, to a dict of NumPy arrays."""
    return _RUNNERS[format](path)
