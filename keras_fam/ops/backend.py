"""What Keras has no single call for. Backend branches live here, in `scan.py` and in `attention.py`; nowhere else."""

import keras
from keras import ops


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
    return type(x).__name__ != "FakeTensor"


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


def compiled(function, variables):
    """A compiled form of a function of tensors that reads `variables` and is not differentiated.

    Compiled once per combination of input shapes (JAX, TensorFlow); on torch it runs eagerly without autograd.

    Args:
        function: function of structures of tensors, with a structure of tensors as result.
        variables: function without arguments that lists the `keras.Variable`s it reads.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def pure(values, *args):
            with keras.StatelessScope(state_mapping=list(zip(variables(), values, strict=True))):
                return function(*args)

        program = jax.jit(pure)
        return lambda *args: program([v.value for v in variables()], *args)
    if backend == "tensorflow":
        import tensorflow as tf

        programs = {}

        def run(*args):  # LoRA and quantization replace variables, which a traced program would not see
            key = tuple(map(id, variables()))
            if key not in programs:
                programs.clear()
                programs[key] = tf.function(function, autograph=False, reduce_retracing=False)
            return programs[key](*args)

        return run
    import torch

    return torch.no_grad()(function)
