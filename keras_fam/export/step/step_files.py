"""Writing and running the files of one step: ONNX, LiteRT and torch, each by its own packages."""

import importlib
import inspect
import tempfile

import keras
import numpy as np
from keras import ops

from keras_fam.ops.scan import compute_both_branches

# Writing ------------------------------------------------------------------------------------------------------------


def _onnx_from_jax(step, path):
    import jax
    import jax2onnx
    import onnx

    rows = step.batch_size or jax.export.symbolic_shape("batch")[0]
    given = [jax.ShapeDtypeStruct((rows, *shape[1:]), dtype) for shape, dtype in step.inputs.values()]
    traced = jax.make_jaxpr(step)(*given)
    inputs, outputs = traced.jaxpr.invars, traced.jaxpr.outvars
    # A leaf that no step changes would be one value with two names: it is copied by a node of its own.
    kept = [i for i, var in enumerate(outputs) if any(var is other for other in inputs)]
    changed = [name for i, name in enumerate(step.outputs) if i not in kept]
    run = _without_remainders(traced.jaxpr, traced.consts)
    model = jax2onnx.to_onnx(
        lambda *args: tuple(y for i, y in enumerate(run(*args)) if i not in kept),
        inputs=given,
        model_name="step",
        opset=21,
        input_names=list(step.inputs),
        output_names=changed,
    )
    graph = model.graph
    infos = {info.name: info for info in graph.output}
    for i in kept:
        name = step.outputs[i]
        source = list(step.inputs)[next(j for j, var in enumerate(inputs) if var is outputs[i])]
        graph.node.append(onnx.helper.make_node("Identity", [source], [name]))
        infos[name] = onnx.ValueInfoProto()
        infos[name].CopyFrom(next(info for info in graph.input if info.name == source))
        infos[name].name = name
    del graph.output[:]
    graph.output.extend(infos[name] for name in step.outputs)
    onnx.save_model(model, path)


def _without_remainders(jaxpr, consts):
    """A function that computes a traced program, its remainders of whole numbers by division.

    jax2onnx cannot write remainders of tensors whose shape is symbolic.
    """
    import jax

    def run(*args):
        known = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))

        def read(var):
            return var.val if hasattr(var, "val") else known[var]

        for equation in jaxpr.eqns:
            given, kind, params = [read(var) for var in equation.invars], equation.primitive.name, equation.params
            if kind == "rem" and np.issubdtype(equation.outvars[0].aval.dtype, np.integer):
                results = [given[0] - given[1] * jax.lax.div(*given)]
            elif kind in ("jit", "pjit"):
                inner = params["jaxpr"]
                results = _without_remainders(inner.jaxpr, inner.consts)(*given)
            elif kind == "cond" and len(params["branches"]) == 2:
                false, true = (_without_remainders(inner.jaxpr, inner.consts) for inner in params["branches"])
                results = jax.lax.cond(given[0] > 0, true, false, *given[1:])
            else:
                bound = equation.primitive.get_bind_params(params)
                functions, bound = bound if isinstance(bound, tuple) else ((), bound)  # a pair in older versions
                results = equation.primitive.bind(*functions, *given, **bound)
                results = results if equation.primitive.multiple_results else [results]
            known |= dict(zip(equation.outvars, results, strict=True))
        return [read(var) for var in jaxpr.outvars]

    return run


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
        forward.__signature__ = inspect.Signature([self, *parameters])  # names that the file is called with
        del parameters, self

    example = {name: x.contiguous() for name, x in step.example(step.batch_size or 3).items()}
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
    # `squeeze` of an axis that is longer than 1 changes nothing on torch, and fails in ONNX.
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
    ("onnx", "jax"): _onnx_from_jax,
    ("onnx", "torch"): _onnx_from_torch,
    ("litert", "tensorflow"): _litert_from_tensorflow,
    ("torch", "torch"): _pt2_from_torch,
}
_NEEDED = {
    ("onnx", "jax"): ("jax2onnx", "onnx", "onnxruntime"),
    ("onnx", "torch"): ("onnx", "onnxscript", "onnxruntime"),
    ("litert", "tensorflow"): (),  # its interpreter comes with TensorFlow until it is taken out
    ("torch", "torch"): (),
}


def require(format):
    """Raises ImportError if a package that writes or runs a format on this backend is missing."""
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
    """Writes a `Step` as one file (and what the format keeps beside it)."""
    _WRITERS[format, keras.backend.backend()](step, path)


def load(format, path):
    """A written step as a function of NumPy arrays by name, with a dict of them as result."""
    return _RUNNERS[format](path)
