"""TransformerFAM written by hand in plain JAX, the peer of `examples.benchmarks.speed`.

One configuration only: pre-norm, RMS norms, as many key/value heads as query heads, RoPE, gated SiLU feed-forward, a
first memory per layer, whole sequences from the initial state. Measured with JAX 0.10 on a CPU, for training: every
product with a weight is a plain matrix product of `[rows, inputs]`, because the gradient of a kernel contracted over
two axes (batch and tokens) is slow: feed-forward over `[B, T, D]` makes the whole step 1.4 times as long. Heads come
before tokens, and the softmax is divided after the product with the values: a few per cent each. Attention one block at
a time takes half as long as over all blocks, whose softmax weights do not fit the cache. There was no gain from joint
projections, unrolling or rematerializing the scan, several dots for a window instead of one, or weight gradients
outside the scan.

Axes: B rows, T tokens, S block, C blocks, m segments, F memory rows, N heads, H head width, D width, M inner width,
W = F + (m + 1)·S keys in a window.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

EPSILON = 1e-6
WAVELENGTH = 10_000.0
MASKED = -1e30
ADAM = {"lr": 1e-3, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7}


class Config(NamedTuple):
    """Sizes; hashable, so that a jitted function can take it as a static argument."""

    num_layers: int
    hidden_dim: int
    num_heads: int
    head_dim: int
    intermediate_dim: int
    block_size: int
    memory_segments: int
    fam_length: int


def init(key, config):
    """Random parameters: `{"layers": [{name: array}, ...], "final_norm_scale": [D]}`."""
    D, N, H, M = config.hidden_dim, config.num_heads, config.head_dim, config.intermediate_dim
    shapes = {
        "query_kernel": ((D, N, H), D),
        "key_kernel": ((D, N, H), D),
        "value_kernel": ((D, N, H), D),
        "output_kernel": ((N, H, D), N * H),
        "gate_kernel": ((D, M), D),
        "up_kernel": ((D, M), D),
        "down_kernel": ((M, D), M),
        "initial_fam": ((config.fam_length, D), 1),
    }

    def layer(key):
        keys = jax.random.split(key, len(shapes))
        weights = {
            name: jax.random.normal(k, shape) * fan_in**-0.5
            for k, (name, (shape, fan_in)) in zip(keys, shapes.items(), strict=True)
        }
        return weights | {"attention_norm_scale": jnp.ones(D), "feedforward_norm_scale": jnp.ones(D)}

    layers = [layer(k) for k in jax.random.split(key, config.num_layers)]
    return {"layers": layers, "final_norm_scale": jnp.ones(D)}


def rms_norm(x, scale):
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON) * scale


def rotation(positions, head_dim):
    """`(cos, sin)` of shape `positions.shape + [H/2]`; computed on the host in float64, where positions are exact."""
    angles = positions[..., None] * WAVELENGTH ** (-np.arange(head_dim // 2) * 2.0 / head_dim)
    return np.cos(angles).astype("float32"), np.sin(angles).astype("float32")


def rotate(x, table):
    cos, sin = table
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def project(x, kernel, lead):
    """`[rows, D]` through `[D, N, H]` to `lead + [N, rows per lead, H]`."""
    D, N, H = kernel.shape
    return (x @ kernel.reshape(D, N * H)).reshape(*lead, -1, N, H).swapaxes(-2, -3)


def merge_heads(x, kernel):
    """`[..., N, rows, H]` through `[N, H, D]` to `[all rows, D]`."""
    N, H, D = kernel.shape
    return x.swapaxes(-2, -3).reshape(-1, N * H) @ kernel.reshape(N * H, D)


def attend(query, key, value, mask=None):
    """`[..., Q, H]` over `[..., W, H]`; the mask is bool, broadcastable to `[..., Q, W]`."""
    logits = query @ key.swapaxes(-1, -2)
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED)
    weights = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    return (weights @ value) / jnp.sum(weights, axis=-1, keepdims=True)


# One block at a time, rematerialized in the backward pass: softmax weights stay in the cache.
attend_again = jax.checkpoint(attend)


def feed_forward(p, x):
    """`[rows, D]`, residual included."""
    h = rms_norm(x, p["feedforward_norm_scale"])
    return (jax.nn.silu(h @ p["gate_kernel"]) * (h @ p["up_kernel"])) @ p["down_kernel"] + x


def memory_projections(p, fam, table, scale):
    """Query, key and value `[B, N, F, H]` of memory rows `[B, F, D]`."""
    h = rms_norm(fam, p["attention_norm_scale"]).reshape(-1, fam.shape[-1])
    query, key, value = (project(h, p[f"{name}_kernel"], fam.shape[:1]) for name in ("query", "key", "value"))
    return rotate(query * scale, table), rotate(key, table), value


def write_memories(p, key, value, config):
    """Keys and values of the memory that each block reads: the scan, F rows a step (Alg. 2).

    Args:
        key: `[B, C, N, S, H]`, rotated.
        value: `[B, C, N, S, H]`.

    Returns:
        `[B, C, N, F, H]` twice.
    """
    B, C, F, scale = key.shape[0], key.shape[1], config.fam_length, config.head_dim**-0.5
    starts = np.arange(C)[:, None] * config.block_size
    cos, sin = rotation(starts - F + np.arange(F), config.head_dim)  # [C, F, H/2]: the last F positions before a block

    def step(memory, block):
        residual, query, fam_key, fam_value = memory
        block_key, block_value, *table = block
        keys = jnp.concatenate([fam_key, block_key], axis=-2)
        values = jnp.concatenate([fam_value, block_value], axis=-2)
        attended = merge_heads(attend(query, keys, values), p["output_kernel"])
        fam = feed_forward(p, attended + residual.reshape(attended.shape)).reshape(residual.shape)
        query, fam_key, fam_value = memory_projections(p, fam, table, scale)
        return (fam, query, fam_key, fam_value), (fam_key, fam_value)

    fam = jnp.broadcast_to(p["initial_fam"], (B, F, config.hidden_dim))
    first = memory_projections(p, fam, (cos[0], sin[0]), scale)
    blocks = (key[:, :-1].swapaxes(0, 1), value[:, :-1].swapaxes(0, 1), cos[1:], sin[1:])
    # The carried residual starts at zero: the first update has none.
    _, written = lax.scan(step, (jnp.zeros_like(fam), *first), blocks)
    return (jnp.concatenate([a[:, None], b.swapaxes(0, 1)], axis=1) for a, b in zip(first[1:], written, strict=True))


def window(memory, blocks, segments):
    """`[memory; m previous blocks; own block]`: `[B, C, N, F, H]` and `[B, C, N, S, H]` to `[B, C, N, W, H]`."""
    count = blocks.shape[1]
    padded = jnp.pad(blocks, ((0, 0), (segments, 0), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([memory] + [padded[:, j : j + count] for j in range(segments + 1)], axis=-2)


def visibility(num_blocks, config):
    """Bool `[C, 1, S, W]`: memory and segments whole, own block causal, no segment before the first block."""
    S, m, F = config.block_size, config.memory_segments, config.fam_length
    own = np.concatenate([np.ones((S, F + m * S), bool), np.tril(np.ones((S, S), bool))], axis=1)
    block = np.concatenate([np.zeros(F, int), np.repeat(np.arange(-m, 1), S)])  # relative to the own block
    exists = np.arange(num_blocks)[:, None] + block >= 0
    return jnp.logical_and(own, exists[:, None, None, :])


def layer(p, x, config):
    """`[B, T, D]` to `[B, T, D]`."""
    B, T, D = x.shape
    S = config.block_size
    C = T // S
    x = x.reshape(B * T, D)
    h = rms_norm(x, p["attention_norm_scale"])
    query, key, value = (project(h, p[f"{name}_kernel"], (B, C)) for name in ("query", "key", "value"))
    table = rotation(np.arange(T).reshape(C, 1, S), config.head_dim)
    query, key = rotate(query * config.head_dim**-0.5, table), rotate(key, table)
    memory_key, memory_value = write_memories(p, key, value, config)
    keys = window(memory_key, key, config.memory_segments)
    values = window(memory_value, value, config.memory_segments)
    blocks = (part.swapaxes(0, 1) for part in (query, keys, values))
    attended = lax.map(lambda block: attend_again(*block), (*blocks, visibility(C, config))).swapaxes(0, 1)
    return feed_forward(p, merge_heads(attended, p["output_kernel"]) + x).reshape(B, T, D)


def forward(params, x, config):
    """`[B, T, D]` to `[B, T, D]`; T is a multiple of `block_size`."""
    for p in params["layers"]:
        x = layer(p, x, config)
    return rms_norm(x, params["final_norm_scale"])


def loss(params, x, config):
    return jnp.mean(jnp.square(forward(params, x, config)))


def init_optimizer(params):
    """`(step, first moments, second moments)` of Adam."""
    zeros = partial(jax.tree.map, jnp.zeros_like)
    return jnp.zeros((), jnp.int32), zeros(params), zeros(params)


def train_step(params, opt_state, x, config):
    """One step of Adam. Jit it with `static_argnums=3` and `donate_argnums=(0, 1)`."""
    value, grads = jax.value_and_grad(loss)(params, x, config)
    step, first, second = opt_state
    step = step + 1
    b1, b2 = ADAM["beta_1"], ADAM["beta_2"]
    first = jax.tree.map(lambda a, g: b1 * a + (1 - b1) * g, first, grads)
    second = jax.tree.map(lambda a, g: b2 * a + (1 - b2) * g * g, second, grads)
    rate = ADAM["lr"] * jnp.sqrt(1 - b2**step) / (1 - b1**step)
    params = jax.tree.map(lambda p, a, b: p - rate * a / (jnp.sqrt(b) + ADAM["epsilon"]), params, first, second)
    return params, (step, first, second), value
