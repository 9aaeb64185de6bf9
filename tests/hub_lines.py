"""Prints how exactly converted models of Qwen 3 and Gemma 3 read on, and may record it:

    KERAS_BACKEND=torch python tests/hub_lines.py --out examples/results/json/hub_lines_torch.json

Random small configurations, each converted five times: block-wise windows without sinks, with one and with four, the
memory that `convert` makes, and the paper's write. The largest absolute differences of logits, beside their size: from
the NumPy loop over five blocks, between chunks and the whole, and, where tokens of block 1 read no memory, from
KerasHub in that block.
"""

import argparse
import pathlib
import sys

import keras
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import reference
import support

import keras_fam
from examples.verification import hub_families
from keras_fam.layers import memory_update as memory_updates

LINES = {
    "BSWA": {"fam_length": 0, "attention_sinks": 0},
    "BSWA, 1 sink": {"fam_length": 0, "attention_sinks": 1},
    "BSWA, 4 sinks": {"fam_length": 0},
    "FAM, as `convert` makes it": {"fam_length": 3},
    "FAM, the paper's write": {"fam_length": 3, "fam_query": "feedback"},
}
FAMILIES = ("Qwen 3", "Gemma 3 (text)")
BLOCK, LENGTH, CHUNKS = 8, 40, (5, 1, 10, 24)
ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_approximate"}


def oracle_settings(block):
    """The oracle's settings of one of our blocks."""
    found = {}
    for name in set(reference.DEFAULTS) - {"memory_update", "activation", "norm", "query_key_norm"}:
        found[name] = getattr(block if hasattr(block, name) else block.attention, name)
    found["memory_update"] = memory_updates.serialize(block.attention.memory_update)
    found["activation"] = ACTIVATIONS[block.activation.__name__]
    found["query_key_norm"] = block.attention.query_key_norm and "rms_norm"
    return reference.settings(**found)


def oracle_logits(lm, token_ids):
    """What the NumPy loop makes of the weights of a language model."""
    backbone = lm.backbone
    one = 1.0 if backbone.blocks[0].norm == "offset_rms_norm" else 0.0  # Gemma's norms multiply by 1 + scale

    def weights(layer):
        found = {name: support.numpy(v).astype("float64") for name, v in support.variables_by_name(layer).items()}
        return {name: value + one if name.endswith("norm_scale") else value for name, value in found.items()}

    table = support.numpy(backbone.token_embedding.embeddings).astype("float64")
    head = table.T if backbone.tie_weights else support.numpy(backbone.token_embedding.reverse_embeddings)
    scale = backbone.embedding_scale or 1.0
    given = {"embedding": table * scale, "head_kernel": head, "layers": [weights(block) for block in backbone.blocks]}
    given["final_norm_scale"] = support.numpy(backbone.final_norm.scale).astype("float64") + one
    if backbone.memory_prompt is not None:
        given["prompt"] = support.numpy(backbone.memory_prompt).astype("float64")
    logits = reference.model(token_ids, given, [oracle_settings(block) for block in backbone.blocks])[0]
    cap = backbone.logit_softcap
    return logits if cap is None else cap * np.tanh(logits / cap)


def measure(family, seed, line):
    """The differences of one line in one random configuration, and the size of the logits."""
    there, _ = hub_families.source(family, seed)
    lm = keras_fam.hub.convert(there, block_size=BLOCK, memory_segments=1, seed=seed, **LINES[line])
    token_ids = hub_families.tokens(LENGTH)
    whole = hub_families.logits(lm, token_ids)
    stream = keras_fam.StreamingModel(lm, batch_size=len(token_ids))
    parts = np.split(token_ids, np.cumsum(CHUNKS)[:-1], axis=1)
    chunks = np.concatenate([np.asarray(stream.predict(part)) for part in parts], axis=1)
    found = {"logits": float(np.abs(whole).max()), "chunks": hub_families.difference(chunks, whole)}
    found["oracle"] = hub_families.difference(whole, oracle_logits(lm, token_ids))
    if lm.backbone.initial_fam == "summary" or not lm.backbone.fam_length:
        theirs = hub_families.logits(there, token_ids[:, :BLOCK])
        found["block 1"] = hub_families.difference(whole[:, :BLOCK], theirs)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=int, default=3, help="random configurations of each family")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file")
    args = parser.parse_args()
    backend, results = keras.backend.backend(), {}
    columns = ("logits", "oracle", "chunks", "block 1")
    print(f"| {backend} | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|")
    for family in FAMILIES:
        for line in LINES:
            all_found = [measure(family, seed, line) for seed in range(args.configurations)]
            results[f"{family}: {line}"] = all_found
            largest = [max((found[c] for found in all_found if c in found), default=None) for c in columns]
            cells = ["" if value is None else f"{value:.1e}" for value in largest]
            print(f"| {family}: {line} | " + " | ".join(cells) + " |", flush=True)
    if args.out:
        record = {
            "command": f"KERAS_BACKEND={backend} python tests/hub_lines.py --configurations {args.configurations}",
            "backend": backend,
            "keras": keras.__version__,
            "keras_hub": hub_families.keras_hub.__version__,
            "differences": results,
        }
        args.out.write_text(hub_families.as_json(record, "differences"))


if __name__ == "__main__":
    main()
