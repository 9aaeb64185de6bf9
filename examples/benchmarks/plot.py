"""Draws the results of `against_attention`, `peers` and `schedules` side by side.

    python -m examples.benchmarks.plot --full full.json --bswa bswa.json --peers peers.json --schedules schedules.json \
        --out speed.png
"""

import argparse
import json
from pathlib import Path


def bars(axis, names, groups, unit, log=False):
    """Horizontal bars: `groups` is `{label: [value or None per name]}`."""
    height = 0.8 / len(groups)
    for g, (label, values) in enumerate(groups.items()):
        for i, value in enumerate(values):
            if value is None:
                continue
            place = i + (g - (len(groups) - 1) / 2) * height
            axis.barh(place, value, height, color=f"C{g}", label=label if i == 0 else None)
            axis.text(value, place, f" {value:.2g}", va="center", fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(unit, fontsize=8)
    if log:
        axis.set_xscale("log")
    axis.margins(x=0.2)
    axis.legend(fontsize=7)


def draw_systems(axis, results):
    """Times of other systems over that of TransformerFAM."""
    names, groups = [], {"prefill": [], "train step": []}
    for result in results:
        settings = result["settings"]
        first, *others = settings["systems"]
        for backend in settings["backends"]:
            for other in others:
                names.append(f"{'full attention' if other == 'full' else other.upper()}\n{backend}")
                for kind, values in zip(("prefill", "train"), groups.values(), strict=True):
                    found = result[backend].get(kind, {})
                    values.append(found[other]["median"] / found[first]["median"] if other in found else None)
    bars(axis, names, groups, "time / time of TransformerFAM")
    axis.axvline(1, color="black", linewidth=0.5)
    axis.set_title("The same model with other attention", fontsize=9)


def draw_peers(axis, result):
    systems = result["systems"]
    groups = {kind: [s[f"{kind} ms per token"] for s in systems.values()] for kind in ("prefill", "decode")}
    bars(axis, list(systems), groups, "ms per token", log=True)
    axis.set_title(f"Other packages, {result['settings']['tokens']} tokens read", fontsize=9)


def draw_schedules(axis, result):
    times = result["time over that of a layer over all blocks"]
    bars(axis, list(times), {"prefill": list(times.values())}, "time / time of a layer over all blocks")
    axis.set_title("Order of layers and blocks (JAX)", fontsize=9)


def main(argv=None):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("full", "bswa", "peers", "schedules"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/speed.png"))
    args = parser.parse_args(argv)
    given = {n: json.loads(p.read_text()) for n, p in vars(args).items() if n != "out" and p is not None}
    panels = []
    if systems := [given[n] for n in ("bswa", "full") if n in given]:
        panels.append((draw_systems, systems))
    panels += [(draw, given[n]) for n, draw in (("peers", draw_peers), ("schedules", draw_schedules)) if n in given]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for axis, (draw, data) in zip(axes[0], panels, strict=True):
        draw(axis, data)
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
