"""ONNX from JAX, by jax2onnx, around three things that it cannot do.

- It patches `jax.numpy` while it traces and then rejects programs that JAX itself traces. So JAX traces the step
  (`make_jaxpr`), and jax2onnx is given the traced program.
- It has no remainders of tensors whose shape is symbolic, and positions in blocks need them. The traced program is
  evaluated equation by equation, with a division in place of each integer remainder. This is `jax.core.eval_jaxpr`
  with one case more; without it ONNX files from JAX would have a fixed batch.
- An output that is an input would be one value with two names, which ONNX forbids: it is copied by an `Identity` node.

What is written is run and compared with the model before it is kept (`stream_step.py`), so a change in jax2onnx or in
JAX' program representation is an error and never a wrong file.
"""

import numpy as np


def write_onnx(step, path):
    """Writes a `Step` to `path`."""
    import jax
    import jax2onnx
    import onnx

    rows = step.batch_size or jax.export.symbolic_shape("batch")[0]
    given = [jax.ShapeDtypeStruct((rows, *shape[1:]), dtype) for shape, dtype in step.inputs.values()]
    traced = jax.make_jaxpr(step)(*given)
    inputs, outputs = traced.jaxpr.invars, traced.jaxpr.outvars
    kept = [i for i, var in enumerate(outputs) if any(var is other for other in inputs)]
    changed = [name for i, name in enumerate(step.outputs) if i not in kept]
    run = without_remainders(traced.jaxpr, traced.consts)
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


def without_remainders(jaxpr, consts):
    """A function that computes a traced program, with integer remainders as `a − b·(a / b)`."""
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
                results = without_remainders(inner.jaxpr, inner.consts)(*given)
            elif kind == "cond" and len(params["branches"]) == 2:
                false, true = (without_remainders(inner.jaxpr, inner.consts) for inner in params["branches"])
                results = jax.lax.cond(given[0] > 0, true, false, *given[1:])
            else:
                bound = equation.primitive.get_bind_params(params)
                functions, bound = bound if isinstance(bound, tuple) else ((), bound)  # a pair in older versions
                results = equation.primitive.bind(*functions, *given, **bound)
                results = results if equation.primitive.multiple_results else [results]
            known |= dict(zip(equation.outvars, results, strict=True))
        return [read(var) for var in jaxpr.outvars]

    return run
