"""Draws the plots of results again from their recorded numbers, without training.

    python -m examples.figures.redraw --out out/png

Plots of trained models' attention and of SmolLM2 by position need what is not recorded and are left out.
"""

import argparse
import json
import pathlib

from examples import books
from examples.benchmarks import gpu_plot
from examples.passkey import demo, results, sweeps, systems

RESULTS = pathlib.Path(__file__).parents[1] / "results"


def draw_demo(found, path):
    given = found["arguments"]
    title = f"PassKey in real prose, {found['backend']}, seed {given['seed']}"
    demo.plot(found["exact"], found["filler_tokens"], title, path)


def draw_length(found, path):
    results.plot(found, f"PassKey, key at a random position in {found['drawn'].rpartition(',')[0]}", path)


PLOTS = {
    "passkey": draw_demo,
    "passkey_length": draw_length,
    "passkey_systems": systems.plot,
    "sweeps": sweeps.plot,
    "gpu_h200": gpu_plot.plot,
    "books": lambda found, path: books.plot(found["report"], found["window_reaches_tokens"], path),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PLOTS), default=list(PLOTS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/png"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        found = json.loads((RESULTS / "json" / f"{name}.json").read_text())
        PLOTS[name](found, args.out / f"{name}.png")


if __name__ == "__main__":
    main()
