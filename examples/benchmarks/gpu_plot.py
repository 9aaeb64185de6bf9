"""Draws a file of `examples.benchmarks.gpu`: shares of the card in prefill, and milliseconds of a decoded token.

    python -m examples.benchmarks.gpu_plot gpu.json --out gpu.png

Results of several runs and backends may be in one file; what failed is left out.
"""

import argparse
import json
from pathlib import Path

NAMES = {"fam": "FAM", "inputs": "FAM (layer inputs)", "masked": "FAM, masks", "bswa": "BSWA", "full": "full attention"}
NAMES |= {"mistral": "Mistral (transformers)"}


def lines(results, task, value):
    """`{label: ([tokens], [value])}` of the results of a task that did not fail, by backend, system and rows."""
    found = {}
    for result in results:
        if result["task"] != task or "error" in result:
            continue
        rows = result.get("rows") or 1
        label = f"{NAMES[result['system']]}, {result['backend']}" + (f", {rows} rows" if rows > 1 else "")
        found.setdefault(label, []).append((result["length"], value(result, rows)))
    return {label: list(zip(*sorted(points), strict=True)) for label, points in sorted(found.items())}


def plot(record, path):
    """Draws the results of a record, a dict with `results`, to a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = record["results"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    panels = [
        (left, "prefill", lambda r, rows: 100 * r["share"], "prefill: % of the card's matrix products"),
        (right, "decode", lambda r, rows: 1000 * rows / r["tokens_per_second"], "decoding: ms a token of all rows"),
    ]
    for axes, task, value, title in panels:
        for label, points in lines(results, task, value).items():
            axes.plot(*points, marker="o", label=label)
        axes.set(xscale="log", xlabel="tokens a row")
        axes.set_title(title, fontsize="medium")
        if axes.lines:
            axes.legend(fontsize="x-small")
    left.set(ylim=(0, None))
    right.set(yscale="log")
    figure.suptitle(", ".join(sorted({r["device"] for r in results if "device" in r})))
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="a JSON file of `examples.benchmarks.gpu`")
    parser.add_argument("--out", type=Path, default=Path("out/gpu.png"))
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot(json.loads(args.record.read_text()), args.out)


if __name__ == "__main__":
    main()
