"""What Keras has no single call for. Backend branches live here, in `scan.py`, `processes.py` and attention modules,
and what is for torch alone in `torch_graph.py`, `torch_passes.py` and `torch_loop.py`; nowhere else."""

import contextlib
import threading

import keras
from keras import ops

from keras_fam.ops.torch_graph import WARMUP_CALLS, WARMUP_CALLS_LARGE, TracedFunction, is_tracing
from keras_fam.ops.torch_loop import TOKENS_PER_LAUNCH, TokenLoop, capture_cuda_graph, heads_first


def is_eager(x):
    """Whether the values of tensor `x` can be read now: it is neither symbolic nor being traced."""
    if isinstance(x, keras.KerasTensor):
        return False
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return not isinstance(x, jax.core.Tracer)
    if backend == "tensorflow":
        return hasattr(x, "numpy")
    return type(x).__name__ != "FakeTensor" and not is_tracing()


def indices(count):
    """int32 `[count]`: 0, 1, …; `count` may be a tensor (TensorFlow) or a symbol (exports from JAX)."""
    return ops.arange(0, count, dtype="int32")  # jax2onnx cannot read `arange` without a start


def runs_eagerly():
    """Whether programs run eagerly: a loop in one of them is no faster than a loop around it."""
    return keras.backend.backend() == "torch"


def wait_for(x):
    """A context in which assignments and draws of a compiled step wait for the tensors of the structure `x`.

    TensorFlow fetches the batch within the step, and at the end of the data still runs every operation that does not
    depend on the batch: a state or a counter would advance once too often. Pass what was computed from the batch.
    """
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.control_dependencies([part for part in keras.tree.flatten(x) if tf.is_tensor(part)])


def platform():
    """`"cpu"`, `"gpu"` or `"tpu"`: where programs run (one that is made for another machine is made as for this)."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.default_backend()
    if backend == "tensorflow":
        import tensorflow as tf

        kinds = {device.device_type.lower() for device in tf.config.list_logical_devices()}
        return next((kind for kind in ("tpu", "gpu") if kind in kinds), "cpu")
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def value_and_gradient(function, x):
    """`function(x)` and its gradient, for a float tensor `x` and a function with a scalar result."""
    backend = keras.backend.backend()
    x = ops.convert_to_tensor(x)
    if backend == "jax":
        import jax

        return jax.value_and_grad(function)(x)
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
        return value, tape.gradient(value, x, unconnected_gradients="zero")
    import torch

    x = x.detach().clone().requires_grad_(True)
    value = function(x)
    (gradient,) = torch.autograd.grad(value, [x])
    return value.detach(), gradient


class GivenSeed(keras.random.SeedGenerator):
    """Hands out one given seed, an integer tensor `[2]`: Keras' samplers take seeds from generators only."""

    def __init__(self, seed):  # the parent would create a variable
        self._initial_seed = 0
        dtype = "int64" if keras.backend.backend() == "torch" else "uint32"
        self._given = ops.cast(ops.abs(seed), dtype)

    def next(self, ordered=True):
        return self._given


def remat(function, variables):
    """`keras.remat` for a function that reads `variables`.

    TensorFlow loses the gradients of variables that a rematerialised function captures inside a loop: there, their
    values are handed in as arguments.
    """
    if keras.backend.backend() != "tensorflow":
        return keras.remat(function)
    import tensorflow as tf

    def floats(structure):
        return [x for x in keras.tree.flatten(structure) if x.dtype.is_floating]

    def with_values(*args):
        whole = []

        def compute(values, leaves):
            leaves = iter(leaves)
            given = keras.tree.map_structure(lambda x: next(leaves) if x.dtype.is_floating else x, args)
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return function(*given)

        @tf.custom_gradient
        def run(*tensors):
            whole[:] = [compute(tensors[: len(variables)], tensors[len(variables) :])]

            def gradient(*upstream):
                with tf.control_dependencies(upstream):  # not before they are needed
                    again = [tf.identity(x) for x in tensors]
                with tf.GradientTape() as tape:
                    tape.watch(again)
                    outputs = floats(compute(again[: len(variables)], again[len(variables) :]))
                return tape.gradient(outputs, again, output_gradients=upstream, unconnected_gradients="zero")

            return floats(whole[0]), gradient

        outputs = iter(run(*[v.value for v in variables], *floats(args)))
        return keras.tree.map_structure(lambda x: next(outputs) if x.dtype.is_floating else x, whole[0])

    return with_values


def compiled(function, variables, *, record=None, warmup_calls=None):
    """A compiled form of a function of tensors that reads `variables` and is not differentiated.

    Compiled once per combination of input shapes (JAX, TensorFlow); on torch it runs eagerly without autograd.

    Args:
        function: function of structures of tensors, with a structure of tensors as result.
        variables: function without arguments that lists the `keras.Variable`s it reads.
        record: where torch runs it from a traced graph (`TracedFunction`): None is nowhere; `"anywhere"`, after some
            calls, since calling its operations takes longer than computing them; `"gpu"`, on a GPU alone, where that
            also holds for many blocks, and after more calls. A traced function has no effects, draws no random numbers
            and does not loop over values.
        warmup_calls: None, or how many calls that is.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def make():
            def pure(values, *args):
                with keras.StatelessScope(state_mapping=list(zip(variables(), values, strict=True))):
                    return function(*args)

            program = jax.jit(pure)
            return lambda *args: program([v.value for v in variables()], *args)

        return _remade(make, variables)
    if backend == "tensorflow":
        import tensorflow as tf

        return _remade(lambda: tf.function(function, autograph=False, reduce_retracing=False), variables)
    import torch

    if record == "anywhere" or (record == "gpu" and platform() == "gpu"):
        calls = warmup_calls or (WARMUP_CALLS if record == "anywhere" else WARMUP_CALLS_LARGE)
        return torch.no_grad()(_remade(lambda: TracedFunction(function, variables(), calls), variables))
    return torch.no_grad()(function)


def token_loop(step_of, variables):
    """torch: a function that returns the `TokenLoop` of recorded steps, made again when variables were replaced.

    Args:
        step_of: function of a kind that returns a step, see `TokenLoop`.
        variables: see `compiled`.
    """

    def make():
        now = variables()
        steps = {"step_of": lambda kind: TracedFunction(step_of(kind), now, in_place=True)}
        if platform() == "gpu":
            steps |= {"capture": capture_cuda_graph, "tokens_per_launch": TOKENS_PER_LAUNCH}
        else:
            steps["copy"] = heads_first
        loop = TokenLoop(**steps)
        return lambda: loop

    return _remade(make, variables)


def in_order(structure):
    """torch: the same tensors, contiguous; a program is recorded for one layout, and a `TokenLoop` leaves another."""
    return keras.tree.map_structure(lambda x: x.contiguous(), structure) if runs_eagerly() else structure


def categorical(logits, seed):
    """A random column of every row, int32 `[B]`, each as likely as softmax(logits) says.

    On torch, Keras' sampler reads the seed on the host, which no graph can hold. So torch draws one number per row by
    hashing the seed, and takes the column in which it falls.

    Args:
        logits: float `[B, V]`.
        seed: int32 `[2]`.
    """
    if keras.backend.backend() != "torch":
        return keras.random.categorical(logits, 1, dtype="int32", seed=GivenSeed(seed))[:, 0]
    import torch

    logits = ops.convert_to_tensor(logits)
    seed = ops.convert_to_tensor(seed).to(logits.device, torch.int64)
    row = torch.arange(logits.shape[0], device=logits.device)
    drawn = _hash(seed[0] ^ _hash((seed[1] + 0x9E3779B9 * (row + 1)) & 0xFFFFFFFF))
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    below = torch.cumsum(torch.softmax(logits.to(wide), dim=-1), dim=-1)
    drawn = (drawn.to(wide) + 0.5) / 2**32 * below[:, -1]
    return (below <= drawn[:, None]).sum(dim=-1).to(torch.int32)


def _hash(x):
    """torch: 32 well-mixed bits of the low 32 bits of int64 numbers."""
    x = x & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = x ^ (x >> shift)
        x = (x * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _remade(make, variables):
    """The program that `make()` returns, made again when variables were replaced (LoRA, quantization)."""
    cached, lock = ((), None), threading.Lock()

    def run(*args):
        nonlocal cached
        now = list(variables())
        known, program = cached  # one name: another thread replaces both at once
        if program is None or len(known) != len(now) or any(a is not b for a, b in zip(known, now, strict=True)):
            with lock:
                program = make()
                cached = now, program
        return program(*args)

    return run


def tf_dataset(generator, signature, number=None):
    """`tf.data.Dataset.from_generator` over NumPy batches, under any backend.

    Args:
        generator: function without arguments that returns an iterator.
        signature: structure of `(dtype, shape)` pairs, shapes with None where they are open.
        number: None, or how many batches there are.
    """
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError("A tf.data.Dataset needs TensorFlow: pip install 'keras-fam[tensorflow]'.") from error

    def spec(part):
        if isinstance(part, dict):
            return {name: spec(value) for name, value in part.items()}
        if isinstance(part[0], str):
            return tf.TensorSpec(part[1], part[0])
        return tuple(map(spec, part))

    dataset = tf.data.Dataset.from_generator(generator, output_signature=spec(signature))
    if number is not None:
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(number))
    return dataset.prefetch(2)


def refresh_torch_parameters(model):
    """Lists a model's variables as torch parameters again, after variables were added, removed or replaced."""
    for layer in model._flatten_layers():
        if hasattr(layer, "_torch_params"):
            layer._track_variables()
