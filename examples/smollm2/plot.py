"""A figure of training and evaluation: loss by step, perplexity by position."""

import itertools
import json

import numpy as np

SYSTEMS = ("full attention", "sliding window", "BSWA", "BSWA + LoRA", "FAM + LoRA")
POINTS = 12


def plot(args, losses, path):
    """Draws the losses `[B, T]` of every system to `path`; returns False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: it needs matplotlib")
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, folder in (("BSWA", args.bswa), ("FAM", args.trained)):
        if (folder / "training.json").exists():
            log = json.loads((folder / "training.json").read_text())["log"]
            left.plot([entry["step"] for entry in log], [entry["loss"] for entry in log], label=name)
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    left.legend()
    for name, found in losses.items():
        if "," in name or not name.startswith(SYSTEMS):
            continue
        edges = np.unique(np.geomspace(32, found.shape[1], POINTS).astype(int))
        parts = [found[:, a:b].mean() for a, b in itertools.pairwise(edges)]
        right.plot(np.sqrt(edges[:-1] * edges[1:]), np.exp(parts), marker="o", markersize=3, label=name)
    right.axvline((args.segments + 1) * args.block, color="grey", linestyle=":")
    right.set(xlabel="position", ylabel="perplexity, held-out novels", xscale="log", yscale="log")
    right.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return True
