"""Converts random small models of every family of KerasHub and compares the logits: one table, in Markdown.

    KERAS_BACKEND=torch python -m examples.verification.hub_families --configurations 5 --out out/families.json

Per family, the largest absolute difference of the logits over the configurations, beside the size of the logits:
without memory up to one block (T = S, beyond the sliding windows), with `initial_fam="summary"`, and after the
conversion back to KerasHub. If every layer has a sliding window, four blocks are compared as well.
"""

import argparse
import contextlib
import json
import pathlib
from unittest import mock

import keras
import keras_hub
import numpy as np
from keras import ops

import keras_fam
import keras_fam.hub
from keras_fam.ops.backend import compiled

VOCABULARY, LENGTH = 31, 16


def sizes(rng, **more):
    heads = 4
    return {
        "vocabulary_size": VOCABULARY,
        "num_layers": 2,
        "num_query_heads": heads,
        "num_key_value_heads": int(rng.choice([1, 2, 4])),
        "hidden_dim": heads * int(rng.choice([4, 6])),
        "intermediate_dim": 24,
        **more,
    }


def rope(rng):
    return {"rope_max_wavelength": float(rng.choice([100.0, 10_000.0, 500_000.0]))}


def epsilon(rng):
    return {"layer_norm_epsilon": float(rng.choice([1e-6, 1e-3]))}


def llama(rng):
    return "Llama", sizes(rng, **rope(rng), **epsilon(rng), tie_word_embeddings=bool(rng.integers(2)))


def llama3(rng):
    bands = {
        "rope_frequency_adjustment_factor": float(rng.choice([2.0, 8.0])),
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_pretraining_sequence_length": int(rng.choice([16, 64])),
    }
    return "Llama3", sizes(rng, **rope(rng), **epsilon(rng), **bands)


def smollm(rng):
    return "Llama", sizes(rng, rope_max_wavelength=1e5, layer_norm_epsilon=1e-5, tie_word_embeddings=True)


def mistral(rng):
    more = {"sliding_window": int(rng.choice([3, 7])), "head_dim": int(rng.choice([4, 8]))}
    return "Mistral", sizes(rng, **rope(rng), **epsilon(rng), rope_scaling_factor=float(rng.choice([1, 4])), **more)


def qwen(rng):
    more = {"use_sliding_window_attention": bool(rng.integers(2)), "sliding_window_size": int(rng.choice([3, 7]))}
    more |= {"tie_word_embeddings": bool(rng.integers(2)), "rope_scaling_factor": float(rng.choice([1, 4]))}
    return "Qwen", sizes(rng, **rope(rng), **epsilon(rng), **more)


def qwen3(rng):
    more = {"sliding_window_size": [None, 3, 7][rng.integers(3)], "head_dim": int(rng.choice([4, 8]))}
    more |= {"tie_word_embeddings": bool(rng.integers(2)), "rope_scaling_factor": float(rng.choice([1, 4]))}
    return "Qwen3", sizes(rng, **rope(rng), **epsilon(rng), **more)


def gemma(rng):
    return "Gemma", sizes(rng, head_dim=int(rng.choice([4, 8])))


def gemma2(rng):
    name, fields = gemma(rng)
    caps = {"attention_logit_soft_cap": float(rng.choice([2, 50])), "final_logit_soft_cap": float(rng.choice([3, 30]))}
    window = {"use_sliding_window_attention": True, "sliding_window_size": int(rng.choice([3, 7]))}
    return name, {**fields, **caps, **window, "use_post_ffw_norm": True, "use_post_attention_norm": True}


def gemma3(rng):
    window = {"use_sliding_window_attention": bool(rng.integers(4)), "sliding_window_size": int(rng.choice([3, 7]))}
    factors = {"local_rope_scaling_factor": float(rng.choice([1, 2])), "global_rope_scaling_factor": 8.0}
    norms = {"use_query_key_norm": bool(rng.integers(4)), "use_post_ffw_norm": True, "use_post_attention_norm": True}
    more = {"image_size": None, "num_layers": 6, "head_dim": int(rng.choice([4, 8]))}
    return "Gemma3", {**sizes(rng), **more, **window, **factors, **norms}


def phi3(rng):
    return "Phi3", sizes(rng, **rope(rng), **epsilon(rng))


def mixtral(rng):
    more = {"sliding_window": int(rng.choice([3, 7])), "num_experts": 4, "top_k": int(rng.choice([1, 2]))}
    return "Mixtral", sizes(rng, **rope(rng), **epsilon(rng), **more)


def qwen_moe(rng):
    experts = {"moe_intermediate_dim": 12, "num_experts": 4, "top_k": int(rng.choice([1, 3]))}
    experts |= {"norm_top_k_prob": bool(rng.integers(2)), "shared_expert_intermediate_dim": 20}
    window = {"use_sliding_window_attention": bool(rng.integers(2)), "sliding_window_size": int(rng.choice([3, 7]))}
    experts |= {"tie_word_embeddings": bool(rng.integers(2)), "rope_scaling_factor": float(rng.choice([1, 4]))}
    return "QwenMoe", sizes(rng, **rope(rng), **epsilon(rng), **experts, **window)


def qwen3_moe(rng):
    experts = {"moe_intermediate_dim": 12, "num_experts": 4, "top_k": int(rng.choice([1, 3]))}
    experts |= {"norm_top_k_prob": bool(rng.integers(2)), "mlp_only_layers": [[], [0], [1]][rng.integers(3)]}
    more = {"sliding_window_size": [None, 3, 7][rng.integers(3)], "head_dim": int(rng.choice([4, 8]))}
    return "Qwen3Moe", sizes(rng, **rope(rng), **epsilon(rng), **experts, **more)


def gpt_neox(rng):
    fields = sizes(rng, layer_norm_epsilon=float(rng.choice([1e-5, 1e-3])))
    for name in ("num_query_heads", "num_key_value_heads"):
        fields.pop(name)
    fields |= {"num_heads": 2, "hidden_dim": 16}
    more = {"rotary_percentage": float(rng.choice([0.25, 0.5, 1.0]))}
    return "GPTNeoX", {**fields, **more, "rotary_max_wavelength": float(rng.choice([100.0, 10_000.0]))}


def gpt_oss(rng):
    experts = {"num_experts": 4, "top_k": int(rng.choice([2, 3])), "head_dim": int(rng.choice([4, 8]))}
    more = {"sliding_window": int(rng.choice([3, 7])), "rope_scaling_factor": float(rng.choice([1.0, 32.0]))}
    return "GptOss", sizes(rng, **rope(rng), **epsilon(rng), **experts, **more)


def smollm3(rng):
    fields = sizes(rng, **epsilon(rng))
    heads, layers = fields.pop("num_query_heads"), 3
    return "SmolLM3", {
        **fields,
        "num_layers": layers,
        "num_attention_heads": heads,
        "rope_theta": float(rng.choice([100.0, 10_000.0, 5_000_000.0])),
        "rope_layer_enabled_list": [bool(rng.integers(2)), True, False],
        "attention_bias": bool(rng.integers(2)),
        "mlp_bias": bool(rng.integers(2)),
        "attention_dropout": 0.0,
        "layer_types": ["full_attention"] * layers,
        "max_position_embeddings": 65_536,
        "partial_rotary_factor": 1.0,
    }


FAMILIES = {"Llama": llama, "Llama 3 (RoPE bands)": llama3, "SmolLM (tied)": smollm, "Mistral": mistral,
            "Qwen 2, 2.5": qwen, "Qwen 3": qwen3, "Gemma 1": gemma, "Gemma 2": gemma2, "Gemma 3 (text)": gemma3,
            "Phi 3": phi3, "SmolLM 3": smollm3, "GPT-NeoX": gpt_neox, "Mixtral": mixtral, "Qwen 1.5 MoE": qwen_moe,
            "Qwen 3 MoE": qwen3_moe, "GPT-OSS": gpt_oss}  # fmt: skip


@contextlib.contextmanager
def windows_kept():
    """KerasHub 0.32 ignores the sliding window of Qwen models with fused attention (JAX, torch): turns it off."""
    with contextlib.ExitStack() as stack:
        for name in ("qwen", "qwen3", "qwen_moe", "qwen3_moe"):
            target = f"keras_hub.src.models.{name}.{name}_attention.fused_attention_op_available"
            stack.enter_context(mock.patch(target, lambda: False))
        yield


def source(family, seed=0, **fields):
    """A random CausalLM of KerasHub: `(CausalLM, its fields)`."""
    rng = np.random.default_rng(seed)
    name, found = FAMILIES[family](rng)
    found = {**found, **fields}
    backbone = getattr(keras_hub.models, f"{name}Backbone")(**found)
    for v in backbone.trainable_weights:
        around_one = v.name in ("scale", "gamma") and not name.startswith("Gemma")
        v.assign(rng.normal(float(around_one), 0.3, v.shape).astype("float32"))
    return getattr(keras_hub.models, f"{name}CausalLM")(backbone=backbone, preprocessor=None), found


def tokens(length=LENGTH, rows=2):
    return np.random.default_rng(1).integers(0, VOCABULARY, (rows, length)).astype("int32")


def logits(model, token_ids):
    """Logits of a model of either package, as a NumPy array."""
    theirs = isinstance(model, keras_hub.models.CausalLM)

    def call(token_ids):
        return model({"token_ids": token_ids, "padding_mask": ops.ones_like(token_ids)} if theirs else token_ids)

    if keras.backend.backend() == "jax":  # otherwise every operation is compiled on its own
        call = compiled(call, lambda: model.variables)
    with windows_kept():
        return ops.convert_to_numpy(call(ops.convert_to_tensor(token_ids)))


def difference(first, second):
    return float(np.abs(np.asarray(first, "float64") - np.asarray(second, "float64")).max())


def measure(family, seed):
    """The largest differences of one random configuration."""
    there, fields = source(family, seed)
    expected = logits(there, tokens())
    found = {"logits": float(np.abs(expected).max())}
    here = keras_fam.hub.convert(there, block_size=LENGTH, memory_segments=1, fam_length=0)
    found["one block"] = difference(logits(here, tokens()), expected)
    summary = keras_fam.hub.convert(there, block_size=LENGTH, memory_segments=1, fam_length=3, initial_fam="summary")
    found["summary"] = difference(logits(summary, tokens()), expected)
    back = keras_fam.hub.to_keras_hub(here, type(there))
    found["back"] = difference(logits(back, tokens()), expected)
    if all(block.attention.attention_window for block in here.backbone.blocks):
        streamed = keras_fam.hub.convert(
            there, block_size=LENGTH // 4, memory_segments=2, fam_length=0, attention_sinks=0
        )
        found["four blocks"] = difference(logits(streamed, tokens()), expected)
    return {"fields": fields, "differences": found}


def as_json(record, last):
    """JSON with one configuration a line: `record[last]` is a dict from a name to a list of them."""
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in record.items() if name != last]
    found = [
        f"  {json.dumps(name)}: [\n   " + ",\n   ".join(map(json.dumps, each)) + "\n  ]"
        for name, each in record[last].items()
    ]
    return "{\n" + ",\n".join([*lines, f" {json.dumps(last)}: " + "{\n" + ",\n".join(found) + "\n }"]) + "\n}\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=int, default=5, help="random configurations of each family")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for all fields and differences")
    args = parser.parse_args(argv)
    columns = ["logits", "one block", "summary", "back", "four blocks"]
    results = {}
    print(f"| {keras.backend.backend()} | " + " | ".join(columns) + " |")
    print("| --- " * (len(columns) + 1) + "|")
    for family in args.families:
        results[family] = [measure(family, seed) for seed in range(args.configurations)]
        cells = []
        for column in columns:
            values = [r["differences"][column] for r in results[family] if column in r["differences"]]
            cells.append(f"{max(values):.1e}" if values else "")
        print(f"| {family} | " + " | ".join(cells) + " |", flush=True)
    if args.out:
        backend = keras.backend.backend()
        command = f"KERAS_BACKEND={backend} python -m examples.verification.hub_families"
        record = {
            "command": f"{command} --configurations {args.configurations}",
            "backend": backend,
            "keras": keras.__version__,
            "keras_hub": keras_hub.__version__,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(as_json({**record, "families": results}, "families"))


if __name__ == "__main__":
    main()
