"""Parts of a layer of the oracle, `reference.py`: norms, feed-forward part, rotation, projections, attention.

Written from the specification, as a plain NumPy loop in float64, and importing nothing of the package. Axes as there.
"""

import math

import numpy as np
import reference_experts


def rms_norm(x, scale, epsilon):
    """x [..., D] over its root mean square, times scale [D]."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def norm(x, weights, cfg, name):
    """The layer's norm called `name` ("attention_norm", ...) of x [R, D]; a layer norm is centred and has a bias."""
    if cfg["norm"] == "layer_norm":
        x = x - np.mean(x, axis=-1, keepdims=True)
        return rms_norm(x, weights[f"{name}_scale"], cfg["norm_epsilon"]) + weights[f"{name}_bias"]
    return rms_norm(x, weights[f"{name}_scale"], cfg["norm_epsilon"])


def erf(x):
    """The error function; to first order in an imaginary part, which is what `gradient` asks for."""
    real = np.vectorize(math.erf, otypes=[float])(np.real(x))
    if not np.iscomplexobj(x):
        return real
    return real + 1j * np.imag(x) * 2.0 / math.sqrt(math.pi) * np.exp(-(np.real(x) ** 2))


def wide(x):
    """x in float64; in complex128 if `gradient` is at work."""
    return np.asarray(x, dtype="complex128" if np.iscomplexobj(x) else "float64")


ACTIVATIONS = {
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1.0 + erf(x / math.sqrt(2.0))),
    "gelu_approximate": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0.0),
}


def feed_forward(x, weights, cfg):
    """FF of x [R, D], already normalised -> [R, D]: act(gate(x)) * up(x) -> down, or act(up(x)) -> down."""
    if cfg["feed_forward"] is not None:
        return reference_experts.mixture(x, weights, cfg["feed_forward"])
    act = ACTIVATIONS[cfg["activation"]]
    up = x @ weights["up_kernel"] + weights.get("up_bias", 0.0)
    hidden = act(x @ weights["gate_kernel"] + weights.get("gate_bias", 0.0)) * up if cfg["gated"] else act(up)
    return hidden @ weights["down_kernel"] + weights.get("down_bias", 0.0)


def frequencies(cfg):
    """The angle per position of each pair of rotated features, [rotary_dim / 2], after `rope_scaling`."""
    rotated, scaling = cfg["rotary_dim"] or cfg["head_dim"], cfg["rope_scaling"]
    i = np.arange(rotated // 2)
    frequency = cfg["rope_wavelength"] ** (-2.0 * i / rotated)
    if scaling is None:
        return frequency
    factor = scaling["factor"]
    if scaling["type"] == "linear":
        return frequency / factor
    if scaling["type"] == "yarn":
        turns = scaling["original_max_position_embeddings"] / (2.0 * math.pi)  # of the first pair
        ends = [rotated * math.log(turns / scaling[f"beta_{speed}"]) / (2.0 * math.log(cfg["rope_wavelength"]))
                for speed in ("fast", "slow")]  # fmt: skip
        if scaling["truncate"]:
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        ends = max(ends[0], 0.0), min(ends[1], rotated - 1.0)
        slow = np.clip((i - ends[0]) / max(ends[1] - ends[0], 0.001), 0.0, 1.0)
        return slow * frequency / factor + (1.0 - slow) * frequency
    assert scaling["type"] == "llama3", scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2.0 * math.pi)  # within the original context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0: slow, positions are interpolated; 1: fast, as it is
    return (1.0 - keep) * frequency / factor + keep * frequency


def rope(x, positions, cfg):
    """Rotate x [R, heads, H] by its absolute positions [R] (half-split: of the features that are rotated, the first
    half pairs with the second)."""
    if cfg["rope_wavelength"] is None:
        return x
    angle = np.asarray(positions, dtype="float64")[:, None, None] * frequencies(cfg)  # [R, 1, rotated / 2]
    half = angle.shape[-1]
    x1, x2, rest = np.split(x, [half, 2 * half], axis=-1)
    turned = [x1 * np.cos(angle) - x2 * np.sin(angle), x2 * np.cos(angle) + x1 * np.sin(angle), rest]
    return np.concatenate(turned, axis=-1)


def project_query(x, positions, weights, cfg):
    """Rotated queries [R, N, H] of rows x [R, D] at positions [R]; includes the norm before attention."""
    q = np.einsum("rd,dnh->rnh", norm(x, weights, cfg, "attention_norm"), weights["query_kernel"])
    q = q + weights.get("query_bias", 0.0)
    return rope(query_key_norm(q, weights, cfg, "query_norm_scale"), positions, cfg)


def project_key_value(x, positions, weights, cfg):
    """Rotated keys [R, K, H] and values [R, K, H] of rows x [R, D] at positions [R]."""
    x = norm(x, weights, cfg, "attention_norm")
    k = np.einsum("rd,dkh->rkh", x, weights["key_kernel"]) + weights.get("key_bias", 0.0)
    v = np.einsum("rd,dkh->rkh", x, weights["value_kernel"]) + weights.get("value_bias", 0.0)
    return rope(query_key_norm(k, weights, cfg, "key_norm_scale"), positions, cfg), v


def query_key_norm(x, weights, cfg, name):
    """RMS norm over H of queries or keys x [R, heads, H], where the settings ask for it; comes before RoPE."""
    if not cfg["query_key_norm"]:
        return x
    return rms_norm(x, weights[name], cfg["query_key_norm_epsilon"] or cfg["norm_epsilon"])


def attend(q, keys, values, cfg, gate=None, sink=None):
    """Every query q [R, N, H] attends to all of keys, values [J, K, H] -> [R, N, H]. What is hidden is not passed.

    gate: None, or a bias per query head [N], and how many keys it is for, the first ones. sink: None, or one more logit
    per query head [N], whose share of the probability goes to no value.
    """
    n = cfg["num_query_heads"]
    group = n // (cfg["num_key_value_heads"] or n)
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)  # head n reads n // G
    scale = cfg["head_dim"] ** -0.5 if cfg["attention_scale"] is None else cfg["attention_scale"]
    logits = np.einsum("rnh,jnh->nrj", q, keys) * scale
    if cfg["attention_softcap"] is not None:
        logits = cfg["attention_softcap"] * np.tanh(logits / cfg["attention_softcap"])
    if gate is not None:
        logits = logits + gate[0][:, None, None] * (np.arange(len(keys)) < gate[1])
    if sink is not None:
        column = np.broadcast_to(sink[:, None, None], (*logits.shape[:2], 1))
        logits = np.concatenate([logits, column], axis=-1)
    probabilities = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    probabilities = probabilities[..., : len(keys)]
    return np.einsum("nrj,jnh->rnh", probabilities, values)


def finish(mixed, residual, weights, cfg):
    """After attention (Alg. 2): A = output projection of mixed [R, N, H] + residual [R, D]; FF(norm(A)) + A.

    With a parallel residual, FF(norm(residual)) + A.
    """
    a = np.einsum("rnh,nhd->rd", mixed, weights["output_kernel"]) + weights.get("output_bias", 0.0)
    if cfg["use_post_norm"]:
        a = norm(a, weights, cfg, "post_attention_norm")
    a = a + residual
    given = residual if cfg["parallel_residual"] else a
    out = feed_forward(norm(given, weights, cfg, "feedforward_norm"), weights, cfg)
    if cfg["use_post_norm"]:
        out = norm(out, weights, cfg, "post_feedforward_norm")
    return out + a
