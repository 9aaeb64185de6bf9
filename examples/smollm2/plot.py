"""Figures: loss by step and perplexity by position; perplexity along a text without an end."""

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


def plot_stream(found, path, systems=("BSWA, 4 sinks", "FAM")):
    """Draws perplexities by ten thousand tokens of two systems, and the second over the first, to `path`.

    Args:
        found: dict of reports of `examples.smollm2.untrained` by system.
        path: of the image.
        systems: names of the two.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [np.asarray(found[name]["perplexity by ten thousand tokens"]) for name in systems]
    count = min(map(len, lines))
    tokens = 10_000 * (np.arange(count) + 0.5)
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, layout="constrained")
    for name, line, style in zip(systems, lines, ("-", "--"), strict=True):
        above.plot(tokens, line[:count], style, label=name)
    above.set(ylabel="perplexity", ylim=(0, None))
    above.legend()
    below.plot(tokens, lines[1][:count] / lines[0][:count], color="black", linewidth=1)
    below.axhline(1.01, color="grey", linestyle=":")
    below.set(xlabel="tokens read", ylabel=f"{systems[1]} over {systems[0]}", ylim=(0.985, 1.015))
    figure.savefig(path, dpi=100)
