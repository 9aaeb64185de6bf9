"""Sizes by name: the paper's (Table 3) and small ones that train on a laptop."""

import math

import keras

from keras_fam.layers import feed_forward as feed_forwards
from keras_fam.layers import memory_update as memory_updates
from keras_fam.layers.mixture_of_experts import MixtureOfExperts

_PAPER = {
    "vocabulary_size": 256_000,
    "block_size": 1024,
    "memory_segments": 3,
    "fam_length": 64,
    "initial_fam": "prompt",
    "random_state_passing": 0.8,
}
_SMALL = {"block_size": 64, "memory_segments": 1, "fam_length": 8, "initial_fam": "prompt"}

MODEL_CONFIGS = {
    # Table 3. The feed-forward multiplier counts one plain (ungated) hidden layer.
    "paper_1b": {
        **_PAPER, "num_layers": 18, "hidden_dim": 1536, "num_query_heads": 12, "intermediate_dim": 8 * 1536,
        "gated": False, "activation": "gelu",
    },
    "paper_8b": {
        **_PAPER, "num_layers": 32, "hidden_dim": 4096, "num_query_heads": 32, "intermediate_dim": 4 * 4096,
        "gated": False, "activation": "gelu",
    },
    "paper_24b": {
        **_PAPER, "num_layers": 56, "hidden_dim": 4096, "num_query_heads": 32, "num_key_value_heads": 1,
        "intermediate_dim": 8 * 4096, "gated": False, "activation": "gelu",
    },
    # Sizes for a laptop; give `vocabulary_size`.
    "tiny": {**_SMALL, "num_layers": 2, "hidden_dim": 64, "num_query_heads": 4, "intermediate_dim": 128},
    "small": {**_SMALL, "num_layers": 4, "hidden_dim": 256, "num_query_heads": 4, "intermediate_dim": 704},
    "base": {
        **_SMALL, "num_layers": 8, "hidden_dim": 512, "num_query_heads": 8, "intermediate_dim": 1408,
        "block_size": 256, "fam_length": 32,
    },
}  # fmt: skip


def model_config(name: str, **changes) -> dict:
    """Settings of a `TransformerFAMBackbone`: `TransformerFAMBackbone(**model_config("small", vocabulary_size=5000))`.

    Args:
        name: `"paper_1b"`, `"paper_8b"`, `"paper_24b"` (Table 3), `"tiny"`, `"small"` or `"base"`.
        **changes: settings to add or replace.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in MODEL_CONFIGS:
        raise ValueError(f"`name` must be one of {', '.join(MODEL_CONFIGS)}; received {name!r}.")
    return {**MODEL_CONFIGS[name], **changes}


def weight_shapes(settings: dict) -> dict:
    """Names and shapes of all trainable weights of a backbone, without creating it.

    Args:
        settings: keywords of `TransformerFAMBackbone`, for example from `model_config`. Sizes, heads, gating, biases,
            norms, `feed_forward` and memory are read.

    Returns:
        A dict from weight name to shape.
    """
    D, N = settings["hidden_dim"], settings["num_query_heads"]
    K = settings.get("num_key_value_heads") or N
    H = settings.get("head_dim") or D // N
    M, F = settings["intermediate_dim"], settings.get("fam_length", 64)
    centred = settings.get("norm") == "layer_norm"

    def norm(name):
        return {f"{name}/scale": (D,)} | ({f"{name}/bias": (D,)} if centred else {})

    def dense(name, kernel, bias_shape, bias):
        return {f"{name}/kernel": kernel} | ({f"{name}/bias": bias_shape} if settings.get(bias) else {})

    block = norm("attention_norm") | norm("feedforward_norm")
    block |= dense("attention/query", (D, N, H), (N, H), "use_attention_bias")
    for name in ("key", "value"):
        block |= dense(f"attention/{name}", (D, K, H), (K, H), "use_attention_bias")
    block |= dense("attention/output", (N, H, D), (D,), "use_output_bias")
    if settings.get("query_key_norm"):
        block |= {"attention/query_norm/scale": (H,), "attention/key_norm/scale": (H,)}
    if settings.get("use_post_norm"):
        block |= norm("post_attention_norm") | norm("post_feedforward_norm")
    if settings.get("feed_forward") is not None:
        block |= _feed_forward_shapes(settings["feed_forward"], D)
    else:
        for name in ("gate", "up") if settings.get("gated", True) else ("up",):
            block |= dense(name, (D, M), (M,), "use_feedforward_bias")
        block |= dense("down", (M, D), (D,), "use_feedforward_bias")
    if settings.get("softmax_sink"):
        block["attention/softmax_sink"] = (N,)
    if F:
        update = memory_updates.get(settings.get("memory_update", "residual"))
        update.build((None, F, D))
        block |= {f"attention/memory_update/{v.name}": tuple(v.shape) for v in update.trainable_weights}
        if settings.get("fam_gate") not in (None, float("-inf")):
            block["attention/fam_gate"] = (N,)
    if F and settings.get("initial_fam") == "prefix":
        block["attention/initial_fam"] = (F, D)
    shapes = {"token_embedding/embeddings": (settings["vocabulary_size"], D)}
    for i in range(settings["num_layers"]):
        shapes |= {f"block_{i}/{name}": shape for name, shape in block.items()}
    shapes |= norm("final_norm")
    if F and settings.get("initial_fam", "prompt") != "prefix":
        shapes["memory_prompt"] = (F, D)
    if not settings.get("tie_weights", True):
        shapes["token_embedding/reverse_embeddings"] = (D, settings["vocabulary_size"])
    return shapes


def _feed_forward_shapes(feed_forward, hidden_dim):
    """Shapes of the weights of a layer in the place of the feed-forward part. One that this package does not know is
    built for it."""
    policy = keras.config.dtype_policy()
    layer = feed_forwards.get(feed_forwards.serialize(feed_forward, policy), policy)
    if isinstance(layer, MixtureOfExperts):
        return {f"feed_forward/{name}": shape for name, shape in layer.weight_shapes(hidden_dim).items()}
    feed_forwards.build(layer, hidden_dim)
    return {f"feed_forward/{v.path.partition('/')[2]}": tuple(v.shape) for v in layer.trainable_weights}


def count_weights(settings: dict) -> int:
    """The number of trainable parameters of a backbone with these settings, without creating it."""
    return sum(math.prod(shape) for shape in weight_shapes(settings).values())
