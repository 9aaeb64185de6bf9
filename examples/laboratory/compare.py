"""Trains several memories into the pre-trained model, one after the other, and lays their figures side by side."""

import json

import numpy as np

from examples.smollm2.memory.command import main as memory

# Options of `python -m examples.smollm2.memory train` beside those of all.
MEMORIES = {
    "layer_inputs": ["--fam-query", "layer_inputs"],
    "anchored": ["--fam-query", "anchored"],
    "layer_inputs, every row rewritten": ["--fam-query", "layer_inputs", "--memory-update", "residual"],
    "layer_inputs, average": ["--fam-query", "layer_inputs", "--memory-update", "average"],
    "anchored, average": ["--fam-query", "anchored", "--memory-update", "average"],
    "the paper's form": ["--fam-query", "feedback"],
    "the paper's form, normalized": ["--fam-query", "feedback", "--memory-update", "normalized"],
    "the paper's form, hard gate": ["--fam-query", "feedback", "--memory-update", "hard_gate"],
}
SHARED = ["--dtype", "float32", "--block", "32", "--fam", "8", "--sinks", "2", "--gate", "-1", "--rank", "0"]
SHARED += ["--levels", "4", "6", "8", "12", "16", "--step-tokens", "3072", "--rate", "1e-3", "--memory-rate", "1e-3"]
SHARED += ["--gate-rate", "1e-2", "--rows", "64", "--reserve", "360", "--factors", "4", "16", "64"]


def compare(args):
    """Runs what is missing of `args.memories` and `args.seeds`; prints and writes a table."""
    table = {}
    for name in args.memories:
        for seed in args.seeds:
            folder = args.out / args.mixture / f"{name.replace(' ', '_').replace(',', '')}_{seed}"
            done = folder / "evaluation.json"
            if not done.exists():
                print(f"--- {name}, seed {seed}", flush=True)
                options = [*MEMORIES[name], "--mixture", args.mixture, "--minutes", str(args.minutes)]
                options += ["--seed", str(seed), *args.more]
                memory(["train", "--data", str(args.out), "--out", str(folder), *SHARED, *options])
            found = json.loads(done.read_text())
            lines = {}
            for times, measured in found["needles"].items():
                for kind, systems in measured["exact"].items():
                    means = {
                        system: round(float(np.mean(v)), 3) for system, v in systems.items() if system != "distances"
                    }
                    lines.setdefault(kind, {})[times] = means
            table[f"{name}, seed {seed}"] = {"trained tokens": found["trained tokens"], **lines}
    (args.out / f"{args.mixture}.json").write_text(json.dumps(table, indent=1) + "\n")
    for name, found in table.items():
        for kind, by_times in found.items():
            if kind != "trained tokens":
                shown = "  ".join(f"{times}×: {100 * means['memory']:.0f} %" for times, means in by_times.items())
                print(f"{name}, trained to {found['trained tokens']} tokens, {kind}: {shown}")
    return table
