"""Trains several memories into the pre-trained model, one after the other, and lays their figures side by side."""

import itertools
import json

import numpy as np

from examples.record import run_record
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
    """Runs what is missing of `args.memories` and `args.seeds`; prints and writes what all runs of the task found."""
    for name, seed in itertools.product(args.memories, args.seeds):
        folder = folder_of(args, name, seed)
        if not (folder / "evaluation.json").exists():
            print(f"--- {name}, seed {seed}", flush=True)
            options = [*MEMORIES[name], "--mixture", args.mixture, "--minutes", str(args.minutes)]
            options += ["--seed", str(seed), *args.more]
            memory(["train", "--data", str(args.out), "--out", str(folder), *SHARED, *options])
    pretrained = json.loads((args.out / "pretraining.json").read_text())
    found = run_record("examples.laboratory", args)
    found |= {"pre-training": {"steps": pretrained["steps"], "seconds": pretrained["seconds"]}}
    found["pre-training"]["measured"] = [line for line in pretrained["curve"][-1:]]
    found["runs"] = {f"{name}, seed {seed}": run_of(folder_of(args, name, seed)) for name, seed in all_runs(args)}
    (args.out / f"{args.mixture}.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, run in found["runs"].items():
        print(f"\n{name}: {run['steps']} steps, {run['minutes']} minutes, trained to {run['trained tokens']} tokens")
        for times, measured in run["needles"].items():
            for kind, means in measured["exact"].items():
                shown = "  ".join(f"{system} {100 * mean:.0f}" for system, mean in means.items())
                print(f"{times:>6} times, {measured['tokens']:>7,} tokens, {kind}, exact %: {shown}")
    return found


def folder_of(args, name, seed):
    return args.out / args.mixture / f"{name.replace(' ', '_').replace(',', '')}_{seed}"


def all_runs(args):
    """Name and seed of every run that has ended, of this call or an earlier one."""
    for name in MEMORIES:
        for folder in sorted(args.out.glob(f"{args.mixture}/*")):
            seed = folder.name.rpartition("_")[2]
            if folder == folder_of(args, name, seed) and (folder / "evaluation.json").exists():
                yield name, int(seed)


def run_of(folder):
    """What is recorded of a run: its size, and the mean of each measured quantity."""
    record, found = (json.loads((folder / f"{name}.json").read_text()) for name in ("record", "evaluation"))
    run = {"trained tokens": found["trained tokens"], "steps": record["steps"], "tokens": record["tokens"]}
    run |= {"minutes": round(record["seconds"] / 60, 1), "steps by blocks": record["steps by blocks"], "needles": {}}
    for times, measured in found["needles"].items():
        run["needles"][times] = {"tokens": measured["tokens"], "memory RMS": measured["memory RMS"], "exact": {}}
        for kind, systems in measured["exact"].items():
            means = {name: round(float(np.mean(hits)), 4) for name, hits in systems.items() if name != "distances"}
            run["needles"][times]["exact"][kind] = means
    return {**run, "text": found.get("text")}
