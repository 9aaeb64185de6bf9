"""One step of a stream as an ONNX, LiteRT or torch file: explicit state in, explicit state out.

State in variables is never written: such files load and run, but do not remember.
"""

import json
import pathlib

import keras
import numpy as np
from keras import ops

from keras_fam.export.saved_model.serving_functions import flat_name, leaf_names, pack_like
from keras_fam.export.step import step_files
from keras_fam.models.transformer_fam_backbone import TransformerFAMBackbone
from keras_fam.models.transformer_fam_causal_lm import TransformerFAMCausalLM
from keras_fam.ops.backend import compiled
from keras_fam.state import map_specs
from keras_fam.utils.atomic import add_files

# Format to suffix and the backends that write it.
FORMATS = {"onnx": (".onnx", ("jax", "torch")), "litert": (".tflite", ("tensorflow",)), "torch": (".pt2", ("torch",))}
# Largest relative difference between a written file and the model; rounding in another order of sums is far below.
TOLERANCE = 1e-4


def export_step(model, path, format: str, *, tokens: int = 1, batch_size: int | None = None, overwrite: bool = False):
    """Writes one step of a stream: from the next `tokens` tokens and a state to outputs and the next state.

    ```python
    keras_fam.export_step(lm, "lm.onnx", "onnx")  # writes lm.onnx, lm.state.npz, lm.json
    keras_fam.export_step(lm, "lm32.onnx", "onnx", tokens=32)  # 32 tokens at a time, with the same state
    ```

    The file runs where neither keras_fam nor Keras is installed:

    ```python
    session = onnxruntime.InferenceSession("lm.onnx")
    state = dict(numpy.load("lm.state.npz"))
    for token in prompt:
        logits, *after = session.run(None, {"token_ids": numpy.array([[token]], "int32"), **state})
        state = dict(zip(state, after))
    ```

    | format | suffix | backends | batch | requires |
    | --- | --- | --- | --- | --- |
    | `"onnx"` | `.onnx` | JAX, torch | any, or fixed | onnxruntime |
    | `"litert"` | `.tflite` | TensorFlow | fixed | ai-edge-litert, or TensorFlow |
    | `"torch"` | `.pt2` | torch | any, or fixed | torch |

    Every model here can be written, those of `keras_fam.baselines` included. Inputs are named: `token_ids` int32
    `[B, T]` and `state_…`; outputs are `logits` float32 `[B, T, V]` (of a backbone, `hidden` `[B, T, D]`) and
    `next_state_…`, in the order of the inputs. A torch file takes keywords and returns a dict:
    `torch.export.load(path).module()(token_ids=…, **state)`. The number of tokens T is fixed: write one file per T,
    usually for 1 and `block_size`; they share one state, and any order of calls reads the same stream. A row that
    starts a new text gets the initial state.

    Beside `path`, with the same name: `.state.npz`, the initial state of one row under the names of the inputs (repeat
    it for B rows); `.json`, names, shapes (null for any size) and dtypes of inputs and outputs, and under `"state"`
    the input that each output is passed back as.

    Before the files appear, the written step is loaded, run across two block boundaries and compared with the model,
    outputs and state. On torch both sides of a branch are traced, so every single token pays for a memory update.

    Args:
        model: a `TransformerFAMCausalLM` or `TransformerFAMBackbone` in float32.
        path: the file to write, with the suffix of its format.
        format: `"onnx"`, `"litert"` or `"torch"`.
        tokens: T, how many tokens a step reads.
        batch_size: B; None writes a file that takes any batch. LiteRT needs a number.
        overwrite: whether existing files are replaced.

    Returns:
        `pathlib.Path` of the file.

    Raises:
        ValueError: for an unsupported model or combination of format and backend, or an invalid argument.
        ImportError: if a package that writes or runs the format is missing.
        RuntimeError: if the written step does not compute what the model does; no file is left then.
    """
    path = pathlib.Path(path)
    _check(model, path, format, tokens, batch_size, overwrite)
    if not model.built:
        model.build()
    step_files.require(format)
    step = Step(model, tokens, batch_size)
    with add_files(
        path.parent, last=path.name
    ) as temporary:  # beside the step, there may be the weights of a large one
        new = temporary / path.name
        step_files.write(format, step, new)
        _compare(step, step_files.load(format, new))
        np.savez(new.with_suffix(".state.npz"), **step.numpy(model.get_initial_state(1)))
        new.with_suffix(".json").write_text(json.dumps(step.description(format), indent=1) + "\n")
    return path


def _check(model, path, format, tokens, batch_size, overwrite):
    if not isinstance(model, TransformerFAMCausalLM | TransformerFAMBackbone):
        raise ValueError(
            "`export_step` takes a TransformerFAMCausalLM or a TransformerFAMBackbone; received "
            f"{type(model).__name__}. Export other Keras models with `model.export(path)`."
        )
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {sorted(FORMATS)}; received {format!r}.")
    for name, value in (("tokens", tokens), ("batch_size", batch_size)):
        if value is None and name == "batch_size":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer; received {value!r}.")
    suffix, backends = FORMATS[format]
    backend = keras.backend.backend()
    if backend not in backends:
        raise ValueError(
            f'`format="{format}"` is written from {" or ".join(backends)}; the backend is {backend}. Save the model '
            f"with `model.save('model.keras')` and export it in a process with KERAS_BACKEND={backends[0]}."
        )
    if path.suffix != suffix:
        raise ValueError(f"The file of `format=\"{format}\"` must end in '{suffix}'; received '{path}'.")
    if format == "litert" and batch_size is None:
        raise ValueError("A LiteRT file has a fixed batch; received `batch_size=None`. Pass a number, usually 1.")
    dtypes = {model.compute_dtype, *(spec.dtype for spec in _flat_specs(model) if "float" in spec.dtype)}
    if dtypes != {"float32"}:
        raise ValueError(
            f"`export_step` writes float32 models; received one of {sorted(dtypes)}. Build or load the model "
            'with `dtype="float32"`.'
        )
    taken = [file for file in (path, path.with_suffix(".state.npz"), path.with_suffix(".json")) if file.exists()]
    if taken and not overwrite:
        raise ValueError(f"'{taken[0]}' exists already. Choose another name, or pass `overwrite=True`.")


def _flat_specs(model):
    found = []
    map_specs(found.append, model.state_spec(None))
    return found


class Step:
    """A model's step with flat, named tensors.

    Attributes:
        inputs: names to `(shape, dtype)`, in order; the batch is None where any fits.
        outputs: names, in order.
    """

    def __init__(self, model, tokens, batch_size):
        self.model, self.tokens, self.batch_size = model, tokens, batch_size
        self.spec = model.state_spec(None)
        self.names = [flat_name(name) for name in leaf_names(self.spec)]
        self.inputs = {"token_ids": ((batch_size, tokens), "int32")}
        for name, spec in zip(self.names, _flat_specs(model), strict=True):
            self.inputs[name] = ((batch_size, *spec.shape[1:]), spec.dtype)
        self.output = "logits" if isinstance(model, TransformerFAMCausalLM) else "hidden"
        self.outputs = [self.output, *("next_" + name for name in self.names)]

    def __call__(self, token_ids, *leaves):
        outputs, state = self.model.advance(token_ids, pack_like(self.spec, leaves))
        return (outputs, *keras.tree.flatten(state))

    def named(self, **inputs):
        return dict(zip(self.outputs, self(*(inputs[name] for name in self.inputs)), strict=True))

    def numpy(self, state):
        """A `StreamState` as NumPy arrays under the names of the inputs."""
        leaves = map(ops.convert_to_numpy, keras.tree.flatten(state))
        return {name: np.asarray(leaf) for name, leaf in zip(self.names, leaves, strict=True)}

    def example(self, rows):
        """Inputs of `rows` rows, by name."""
        state = keras.tree.flatten(self.model.get_initial_state(rows))
        token_ids = ops.zeros((rows, self.tokens), "int32")
        return dict(zip(self.inputs, (token_ids, *state), strict=True))

    def description(self, format):
        outputs = {self.output: [self.batch_size, self.tokens, self.model.output_width]}
        outputs |= {"next_" + name: list(self.inputs[name][0]) for name in self.names}
        return {
            "format": format,
            "tokens": self.tokens,
            "batch_size": self.batch_size,
            "inputs": {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in self.inputs.items()},
            "outputs": {
                name: {"shape": shape, "dtype": self.inputs.get(name[len("next_") :], (None, "float32"))[1]}
                for name, shape in outputs.items()
            },
            "state": {"next_" + name: name for name in self.names},
        }


def _compare(step, run):
    """RuntimeError unless the written step computes what the model does: from the start and over block boundaries."""
    model, rows = step.model, step.batch_size or 3
    size = getattr(model, "backbone", model).block_size
    advance = compiled(model.advance, lambda: model.variables)
    draw = np.random.default_rng(0)

    def tokens(count):
        return draw.integers(0, getattr(model, "backbone", model).vocabulary_size, (rows, count)).astype("int32")

    state = model.get_initial_state(rows)
    for before in (0, size - 1, size):
        if before:
            _, state = advance(ops.convert_to_tensor(tokens(before)), state)
        expected, found = state, step.numpy(state)
        for _ in range(2):
            token_ids = tokens(step.tokens)
            outputs, expected = advance(ops.convert_to_tensor(token_ids), expected)
            wanted = [ops.convert_to_numpy(outputs), *step.numpy(expected).values()]
            results = run({"token_ids": token_ids, **found})
            if step.batch_size is None:  # one row alone gives what it gives among others
                one = run({"token_ids": token_ids[:1], **{name: x[:1] for name, x in found.items()}})
                _agree(step, [x[:1] for x in wanted], one)
            _agree(step, wanted, results)
            found = {name: np.asarray(results["next_" + name]) for name in step.names}


def _agree(step, wanted, results):
    for name, expected in zip(step.outputs, wanted, strict=True):
        actual = np.asarray(results[name])
        error = np.inf
        if actual.shape == expected.shape:
            error = np.abs(np.subtract(actual, expected, dtype="float64")).max(initial=0.0)
        if not error <= TOLERANCE * max(1.0, np.abs(expected.astype("float64")).max(initial=0.0)):
            raise RuntimeError(
                f"The written step does not compute what the model does: `{name}` differs by {error:.1e}. No file "
                "was left. Try another format, or another version of the package that writes this one."
            )
