"""A mixture of experts as a plain NumPy loop over rows and experts, for the oracle; imports nothing of the package.

Axes: R rows, D model width, E experts, M expert width.
"""

import numpy as np

DEFAULTS = {"num_experts": None, "intermediate_dim": None, "top_k": 2, "normalize": True, "swiglu_limit": None,
            "use_bias": False, "shared_intermediate_dim": None}  # fmt: skip


def shapes(cfg, hidden_dim):
    """Names and shapes of the weights of one mixture of experts."""
    cfg = {**DEFAULTS, **cfg}
    d, e, m, shared = hidden_dim, cfg["num_experts"], cfg["intermediate_dim"], cfg["shared_intermediate_dim"]
    found = {"router_kernel": (d, e), "gate_kernel": (e, d, m), "up_kernel": (e, d, m), "down_kernel": (e, m, d)}
    if cfg["use_bias"]:
        found |= {"router_bias": (e,), "gate_bias": (e, m), "up_bias": (e, m), "down_bias": (e, d)}
    if shared:
        found |= {"shared_router_kernel": (d, 1), "shared_gate_kernel": (d, shared)}
        found |= {"shared_up_kernel": (d, shared), "shared_down_kernel": (shared, d)}
    return {f"experts_{name}": shape for name, shape in found.items()}


def mixture(x, weights, cfg):
    """x [R, D], already normalised -> [R, D]: every row through the experts of its own choice, one after the other."""
    cfg = {**DEFAULTS, **cfg}
    weights = {name.removeprefix("experts_"): value for name, value in weights.items()}
    outputs = []
    for row in x:
        logits = row @ weights["router_kernel"] + weights.get("router_bias", 0.0)
        chosen = np.argsort(-np.real(logits))[: cfg["top_k"]]
        among = logits[chosen] if cfg["normalize"] else logits
        total = np.exp(among - np.real(among).max()).sum()
        out = np.zeros_like(row)
        for expert in chosen:
            parts = [
                row @ weights[f"{name}_kernel"][expert] + (weights[f"{name}_bias"][expert] if cfg["use_bias"] else 0.0)
                for name in ("gate", "up")
            ]
            own = hidden(*parts, cfg["swiglu_limit"]) @ weights["down_kernel"][expert]
            own = own + (weights["down_bias"][expert] if cfg["use_bias"] else 0.0)
            out = out + own * np.exp(logits[expert] - np.real(among).max()) / total
        if cfg["shared_intermediate_dim"]:
            shared = hidden(row @ weights["shared_gate_kernel"], row @ weights["shared_up_kernel"], cfg["swiglu_limit"])
            out = out + shared @ weights["shared_down_kernel"] * sigmoid(row @ weights["shared_router_kernel"])
        outputs.append(out)
    return np.array(outputs)


def hidden(gate, up, limit):
    """What an expert's two products become: SwiGLU, or the clamped one of GPT-OSS."""
    if limit is None:
        return gate * sigmoid(gate) * up
    gate = np.where(np.real(gate) > limit, limit, gate)
    up = np.where(np.abs(np.real(up)) > limit, limit * np.sign(np.real(up)), up)
    return gate * sigmoid(1.702 * gate) * (up + 1.0)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))
