"""How a weight of one model is laid out in the other."""

import dataclasses
from collections.abc import Callable

from keras import ops


@dataclasses.dataclass(frozen=True)
class Layout:
    """One weight there, one here.

    Args:
        read: `(value there, shape here) -> value here`.
        write: `(value here, value there before) -> value there`.
        difference: what differs, for error messages.
    """

    read: Callable
    write: Callable
    difference: str


SAME = Layout(lambda x, shape: x, lambda x, before: x, "nothing")
HEADS_FIRST = Layout(
    lambda x, shape: ops.transpose(x, (1, 0, 2)),
    lambda x, before: ops.transpose(x, (1, 0, 2)),
    "[heads, width, head] there, [width, heads, head] here",
)
FLAT_HEADS = Layout(
    ops.reshape, lambda x, before: ops.reshape(x, before.shape), "heads and their width are one axis there, two here"
)


def joined(index, count):
    """One weight of `count` that are joined there, one after the other along the last axis."""

    def write(x, before):
        parts = ops.split(before, count, axis=-1)
        return ops.concatenate([*parts[:index], ops.cast(x, before.dtype), *parts[index + 1 :]], axis=-1)

    return Layout(
        lambda x, shape: ops.split(x, count, axis=-1)[index], write, f"part {index + 1} of {count} of one weight there"
    )


def interleaved(index, count):
    """One weight of `count` that take turns there along the last axis."""

    def write(x, before):
        parts = [before[..., i::count] for i in range(count)]
        parts[index] = ops.cast(x, before.dtype)
        return ops.reshape(ops.stack(parts, axis=-1), before.shape)

    return Layout(lambda x, shape: x[..., index::count], write, f"every column {index} of {count} of one weight there")
