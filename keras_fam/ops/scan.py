"""One scan over blocks for the three backends: the only sequential part of the package."""

import contextlib
import threading

import keras
from keras import ops

from keras_fam.ops.backend import is_eager
from keras_fam.ops.torch_graph import assume_false, is_tracing

# On JAX, so few steps are written out where each reads so many bytes: XLA copies what goes into a loop, which made a
# train step's temporary memory 6 % larger (blocks of 1,024 tokens of width 512, 4 layers).
UNROLL_STEPS, LARGE_STEP = 4, 1 << 20
# Outside of `jit`, JAX would compile a loop again at every call: up to this length it is run step by step instead.
MAX_EAGER_STEPS = 64

_local = threading.local()


def scan(step, carry, xs, y_like, *, unroll=False):
    """Runs `carry, y = step(carry, x)` over the leading axis of `xs` and stacks the `y`.

    A compiled loop on JAX and TensorFlow, a Python loop on torch (as fast there as any, see the README).

    Args:
        step: function of `(carry, x)`; the carry may be nested and keeps its shapes and dtypes.
        carry: initial carry.
        xs: dict of tensors `[n, ...]`, n ≥ 1 (TensorFlow also takes an n that is only known at run time).
        y_like: tuple of tensors with the shapes and dtypes of one `y`; their values are not read.
        unroll: whether JAX may write few large steps out one after the other. Not if `step` is rematerialised: on a
            CPU, XLA merges what is to be computed again with what was, unless they are in different loops.

    Returns:
        `(carry, ys)` with `ys` stacked over a leading axis of length n.
    """
    backend = keras.backend.backend()
    length = next(iter(xs.values())).shape[0]
    static = isinstance(length, int)
    if backend == "jax" and not (
        static and length <= MAX_EAGER_STEPS and all(map(is_eager, keras.tree.flatten((carry, xs))))
    ):
        import jax

        sizes = [x.size * x.dtype.itemsize for x in keras.tree.flatten(xs)]
        few = unroll and static and length <= UNROLL_STEPS
        few = few and all(isinstance(size, int) for size in sizes) and sum(sizes) >= length * LARGE_STEP
        return jax.lax.scan(step, carry, xs, unroll=few)
    if backend == "tensorflow":
        return _scan_tensorflow(step, carry, xs, y_like)
    outputs = []
    for i in range(length):
        carry, y = step(carry, {name: x[i] for name, x in xs.items()})
        outputs.append(y)
    return carry, tuple(ops.stack(y, axis=0) for y in zip(*outputs, strict=True))


def branch(predicate, true, false):
    """`true()` if the bool scalar `predicate` holds, else `false()`; only one is computed.

    As `ops.cond`, but a predicate that can be read now is: JAX would compile both branches at every eager call.
    Inside `compute_both_branches` both are computed and one is selected.
    """
    if both_branches_are_computed():
        return keras.tree.map_structure(lambda a, b: ops.where(predicate, a, b), true(), false())
    if is_tracing():
        assume_false(predicate)
        return false()
    if is_eager(predicate):
        return true() if bool(predicate) else false()
    return ops.cond(predicate, true, false)


def both_branches_are_computed():
    """Whether this thread is inside of `compute_both_branches`."""
    return getattr(_local, "both_branches", False)


@contextlib.contextmanager
def keep_branches_small():
    """Inside, and in this thread alone, a model of layers branches within each of them, not around all.

    For programs that are written to files: there, two sides of a branch around all layers are the model twice.
    """
    before = getattr(_local, "small_branches", False)
    _local.small_branches = True
    try:
        yield
    finally:
        _local.small_branches = before


def branches_are_large():
    """Whether a branch may go around all layers: neither inside of `keep_branches_small` nor of both branches."""
    return not (getattr(_local, "small_branches", False) or both_branches_are_computed())


@contextlib.contextmanager
def compute_both_branches():
    """Inside, and in this thread alone, `branch` computes both sides and selects one.

    For tracers that cannot follow a branch on a value, such as `torch.export`. The sides of a branch have equal
    structures, shapes and dtypes.
    """
    before = getattr(_local, "both_branches", False)
    _local.both_branches = True
    try:
        yield
    finally:
        _local.both_branches = before


def _scan_tensorflow(step, carry, xs, y_like):
    """`tf.while_loop` over TensorArrays: unlike `ops.scan`, `y` is free to differ from the carry."""
    import tensorflow as tf

    flat_xs = keras.tree.flatten(xs)
    length = flat_xs[0].shape[0]
    size = tf.shape(flat_xs[0])[0] if length is None else length
    inputs = [tf.TensorArray(x.dtype, size, element_shape=x.shape[1:]).unstack(x) for x in flat_xs]
    # An empty stack has no shape where B is unknown too: then element 0 is `y_like`, and is cut off again.
    spare = 1 if length is None else 0
    outputs = [tf.TensorArray(y.dtype, size + spare, element_shape=y.shape) for y in keras.tree.flatten(y_like)]
    if spare:
        outputs = [array.write(0, y) for array, y in zip(outputs, keras.tree.flatten(y_like), strict=True)]
    flat_carry = keras.tree.flatten(carry)

    def body(i, state, stacks):
        x = keras.tree.pack_sequence_as(xs, [array.read(i) for array in inputs])
        new, y = step(keras.tree.pack_sequence_as(carry, state), x)
        new = [tf.ensure_shape(a, b.shape) for a, b in zip(keras.tree.flatten(new), flat_carry, strict=True)]
        stacks = [array.write(i + spare, part) for array, part in zip(stacks, keras.tree.flatten(y), strict=True)]
        return i + 1, new, stacks

    _, flat_carry, outputs = tf.while_loop(
        lambda i, *_: i < size, body, (0, flat_carry, outputs), maximum_iterations=size
    )
    ys = keras.tree.pack_sequence_as(y_like, [array.stack()[spare:] for array in outputs])
    return keras.tree.pack_sequence_as(carry, flat_carry), ys
