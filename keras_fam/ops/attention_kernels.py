"""Kernels for tokens of whole blocks on a GPU, which are told what exists by a number and need no mask.

A block's queries see some keys all alike and those of their own block causally. With a mask, kernels read a number for
each pair of a query and a key; without one they skip what is not seen. Shapes: A blocks of all rows, Q queries, W keys,
N query heads, K key/value heads, H head width.
"""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np

from keras_fam.ops.backend import platform

LARGEST_WIDTH = 248  # of a head: kernels take 256, of which a bias on memory rows takes 8


class Kernel(NamedTuple):
    """A way of attending to whole blocks.

    Attributes:
        attend: function of `(query, key, value, exist)`: `[A, Q, N, H]`, scaled; `[A, W, K, H]`; `[A, W, K, H]`; None
            or int32 `[A]`, how many keys exist; to `[A, Q, N, H]`.
        own_block_first: whether the Q keys of the own block are the first and those that do not exist the last, instead
            of the own block last and the missing ones first.
    """

    attend: Callable
    own_block_first: bool


def block_kernel(dtype, width):
    """The `Kernel` for numbers of this dtype and heads of this width on this device, or None.

    `keras.config.disable_flash_attention()` switches it off.
    """
    backend = keras.backend.backend()
    short = keras.backend.standardize_dtype(dtype) in ("bfloat16", "float16")
    fits = short and width % 8 == 0 and width <= LARGEST_WIDTH
    if not fits or platform() != "gpu" or keras.config.is_flash_attention_enabled() is False:
        return None
    if backend == "torch" and _torch_has_flash_attention():
        return Kernel(attend_by_lengths, own_block_first=False)
    if backend == "jax" and _jax_has_cudnn(width):
        return Kernel(attend_by_counts, own_block_first=True)
    return None


def attend_by_lengths(query, key, value, exist):
    """FlashAttention of sequences of different lengths (torch). Its causal mask is aligned with the last key.

    Each block is a sequence. Where keys are missing, another one without queries stands before it and takes them.
    """
    blocks, queries, keys = *query.shape[:2], key.shape[1]
    if exist is None:
        return flash_attention(query, key, value, None, None, queries, keys)
    import torch

    start = torch.arange(blocks + 1, dtype=torch.int32, device=query.device)
    missing = torch.nn.functional.pad(keys - exist.to(torch.int32), (0, 1))
    ends = torch.stack([start * queries, start * queries], 1), torch.stack([start * keys, start * keys + missing], 1)
    packed = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
    out = flash_attention(*packed, *(x.reshape(-1)[:-1] for x in ends), queries, keys)
    return out.reshape(query.shape)


def flash_attention(query, key, value, query_ends, key_ends, most_queries, most_keys):
    """torch's FlashAttention, causal from the last key backwards: of `[A, Q, N, H]`, or of sequences in one axis whose
    ends, from 0 on, are int32 `[A + 1]`."""
    import torch

    query, key, value = (x.contiguous() for x in (query, key, value))
    ends = query_ends, key_ends, most_queries, most_keys
    return torch.ops.aten._flash_attention_forward(query, key, value, *ends, 0.0, True, False, scale=1.0)[0]


def attend_by_counts(query, key, value, exist, implementation="cudnn"):
    """cuDNN's attention (JAX), by the number of keys that exist; its mask, that of one block, stays in the cache."""
    import jax

    queries, keys = query.shape[1], key.shape[1]
    mask = np.concatenate([np.tri(queries, dtype=bool), np.ones((queries, keys - queries), bool)], axis=1)
    options = {"mask": mask[None, None], "scale": 1.0, "key_value_seq_lengths": exist}
    return jax.nn.dot_product_attention(query, key, value, **options, implementation=implementation)


@functools.cache  # asked by every layer at every call
def _torch_has_flash_attention():
    import torch

    built = torch.version.cuda is not None and torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability() >= (8, 0)


_refused = {}  # why JAX's kernel takes no heads of a width


def _jax_has_cudnn(width):
    """Whether JAX finds cuDNN's attention for heads of this width, and of those that a bias makes of them."""
    import jax

    if width not in _refused:
        x, count = (
            jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((1, 8, 1, width + 8), "bfloat16"), ((1,), "int32"))
        )
        try:
            jax.eval_shape(attend_by_counts, x, x, x, count)
            _refused[width] = None
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            _refused[width] = error
            warnings.warn(f"cuDNN's attention is not used for heads of width {width}: {error}", stacklevel=2)
    return _refused[width] is None
