"""TransformerFAM written by hand in plain torch, eager, the peer of `examples.benchmarks.speed`.

The same configuration, parameter names and layouts as `handwritten_jax.py`: weights can be copied as NumPy arrays.

Axes: B rows, T tokens, S block, C blocks, m segments, F memory rows, N heads, H head width, D width, M inner width,
W = F + (m + 1)·S keys in a window.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import rms_norm as fused_rms_norm
from torch.nn.functional import scaled_dot_product_attention, silu

EPSILON = 1e-6
WAVELENGTH = 10_000.0


class Config(NamedTuple):
    """Sizes, as in `handwritten_jax.py`."""

    num_layers: int
    hidden_dim: int
    num_heads: int
    head_dim: int
    intermediate_dim: int
    block_size: int
    memory_segments: int
    fam_length: int


def init(generator, config):
    """Random parameters: `{"layers": [{name: tensor}, ...], "final_norm_scale": [D]}`."""
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

    def layer():
        weights = {
            name: torch.randn(shape, generator=generator) * fan_in**-0.5 for name, (shape, fan_in) in shapes.items()
        }
        return weights | {"attention_norm_scale": torch.ones(D), "feedforward_norm_scale": torch.ones(D)}

    layers = [layer() for _ in range(config.num_layers)]
    return require_grad({"layers": layers, "final_norm_scale": torch.ones(D)})


def from_numpy(params):
    """The same structure of NumPy arrays as trainable tensors."""
    layers = [{name: torch.tensor(w) for name, w in layer.items()} for layer in params["layers"]]
    return require_grad({"layers": layers, "final_norm_scale": torch.tensor(params["final_norm_scale"])})


def leaves(params):
    return [w for layer in params["layers"] for w in layer.values()] + [params["final_norm_scale"]]


def require_grad(params):
    for w in leaves(params):
        w.requires_grad_()
    return params


def rms_norm(x, scale):
    return fused_rms_norm(x, scale.shape, scale, EPSILON)


def rotation(positions, head_dim):
    """`(cos, sin)` of shape `positions.shape + [H/2]`; computed in float64, where positions are exact."""
    angles = positions[..., None] * WAVELENGTH ** (-np.arange(head_dim // 2) * 2.0 / head_dim)
    return torch.tensor(np.cos(angles), dtype=torch.float32), torch.tensor(np.sin(angles), dtype=torch.float32)


def rotate(x, table):
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def project(x, kernel, lead):
    """`[rows, D]` through `[D, N, H]` to `lead + [N, rows per lead, H]`."""
    D, N, H = kernel.shape
    return (x @ kernel.view(D, N * H)).view(*lead, -1, N, H).transpose(-2, -3)


def merge_heads(x, kernel, residual):
    """`[..., N, rows, H]` through `[N, H, D]` to `[all rows, D]`, plus the residual if there is one."""
    N, H, D = kernel.shape
    x, kernel = x.transpose(-2, -3).reshape(-1, N * H), kernel.view(N * H, D)
    return x @ kernel if residual is None else torch.addmm(residual, x, kernel)


def feed_forward(p, x):
    """`[rows, D]`, residual included."""
    h = rms_norm(x, p["feedforward_norm_scale"])
    return torch.addmm(x, silu(h @ p["gate_kernel"]) * (h @ p["up_kernel"]), p["down_kernel"])


def write_memories(p, key, value, config):
    """Keys and values of the memory that each block reads: the loop, F rows a step (Alg. 2).

    Args:
        key: `[B, C, N, S, H]`, rotated.
        value: `[B, C, N, S, H]`.

    Returns:
        `[B, C, N, F, H]` twice.
    """
    B, C, F, D = key.shape[0], key.shape[1], config.fam_length, config.hidden_dim
    starts = np.arange(C)[:, None] * config.block_size
    cos, sin = rotation(starts - F + np.arange(F), config.head_dim)  # [C, F, H/2]: the last F positions before a block
    block_keys, block_values = key.unbind(1), value.unbind(1)
    fam, residual = p["initial_fam"].expand(B, F, D).reshape(-1, D), None  # the first update has no residual
    fam_keys, fam_values = [], []
    for i in range(C):
        h = rms_norm(fam, p["attention_norm_scale"])
        query, fam_key, fam_value = (project(h, p[f"{name}_kernel"], (B,)) for name in ("query", "key", "value"))
        fam_key = rotate(fam_key, (cos[i], sin[i]))
        fam_keys.append(fam_key)
        fam_values.append(fam_value)
        if i == C - 1:
            break
        attended = scaled_dot_product_attention(
            rotate(query, (cos[i], sin[i])),
            torch.cat([fam_key, block_keys[i]], dim=-2),
            torch.cat([fam_value, block_values[i]], dim=-2),
        )
        fam = residual = feed_forward(p, merge_heads(attended, p["output_kernel"], residual))
    return torch.stack(fam_keys, dim=1), torch.stack(fam_values, dim=1)


def window(memory, blocks, segments):
    """`[memory; m previous blocks; own block]`: `[B, C, N, F, H]` and `[B, C, N, S, H]` to `[B, C, N, W, H]`."""
    count = blocks.shape[1]
    padded = torch.nn.functional.pad(blocks, (0, 0, 0, 0, 0, 0, segments, 0)) if segments else blocks
    return torch.cat([memory] + [padded[:, j : j + count] for j in range(segments + 1)], dim=-2)


def visibility(num_blocks, config):
    """Bool `[C, 1, S, W]`: memory and segments whole, own block causal, no segment before the first block."""
    S, m, F = config.block_size, config.memory_segments, config.fam_length
    own = torch.cat([torch.ones((S, F + m * S), dtype=torch.bool), torch.ones((S, S), dtype=torch.bool).tril()], dim=1)
    block = torch.cat([torch.zeros(F, dtype=torch.int64), torch.arange(-m, 1).repeat_interleave(S)])
    exists = torch.arange(num_blocks)[:, None] + block >= 0
    return own & exists[:, None, None, :]


def layer(p, x, config):
    """`[B, T, D]` to `[B, T, D]`."""
    B, T, D = x.shape
    S = config.block_size
    C = T // S
    x = x.reshape(B * T, D)
    h = rms_norm(x, p["attention_norm_scale"])
    query, key, value = (project(h, p[f"{name}_kernel"], (B, C)) for name in ("query", "key", "value"))
    table = rotation(np.arange(T).reshape(C, 1, S), config.head_dim)
    query, key = rotate(query, table), rotate(key, table)
    memory_key, memory_value = write_memories(p, key, value, config)
    keys = window(memory_key, key, config.memory_segments)
    values = window(memory_value, value, config.memory_segments)
    mask = visibility(C, config)
    attended = scaled_dot_product_attention(
        query.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), attn_mask=mask.repeat(B, 1, 1, 1)
    )
    return feed_forward(p, merge_heads(attended, p["output_kernel"], x)).view(B, T, D)


def forward(params, x, config):
    """`[B, T, D]` to `[B, T, D]`; T is a multiple of `block_size`."""
    for p in params["layers"]:
        x = layer(p, x, config)
    return rms_norm(x, params["final_norm_scale"])


def loss(params, x, config):
    return forward(params, x, config).square().mean()


def init_optimizer(params):
    return torch.optim.Adam(leaves(params), lr=1e-3, eps=1e-7, fused=True)


def train_step(params, optimizer, x, config):
    """One step of Adam, in place; returns the loss."""
    optimizer.zero_grad()
    value = loss(params, x, config)
    value.backward()
    optimizer.step()
    return value.detach()
