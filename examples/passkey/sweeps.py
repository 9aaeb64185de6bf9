"""Fig. 5 and 6, Tables 5 to 7, small: one setting of TransformerFAM at a time, on PassKey.

Each row is the system "FAM, normalized, noise" of `examples.passkey.systems` with one change: how many memory rows,
at which positions, how many memories are visible, what the first memory is. Training is shorter, so that settings
differ in how fast they learn the task; the mean over all lengths summarizes it.

    KERAS_BACKEND=jax python -m examples.passkey.sweeps --seed 0 --steps 800 --out out/sweeps
"""

import argparse
import json
import pathlib

import keras_fam
from examples.passkey.demo import make_task, options, train
from examples.passkey.systems import LENGTHS, exact
from examples.record import run_record

SWEEPS = {
    "baseline": [{}],
    "memory rows (Fig. 5)": [{"fam_length": n} for n in (2, 4, 16)],
    "position (Table 5)": [{"fam_position": "float"}, {"fam_query_position": "current"}],
    "visible memories (Table 6)": [{"num_visible_memories": n} for n in (2, 4)],
    "first memory (App. B.1)": [{"initial_fam": "summary"}, {"initial_fam": "prefix"}],
}


def parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, parents=[options()]
    )
    short = [count for count in LENGTHS if count <= 33]
    parser.add_argument("--lengths", type=int, nargs="+", default=short, help="blocks in the texts that are read")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/sweeps"))
    return parser


def plot(found, path):
    """One panel per sweep, each with the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = found["rows"]
    baseline = next(title for title, row in rows.items() if row["sweep"] == "baseline")
    names = [sweep for sweep in SWEEPS if sweep != "baseline"]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.6), layout="constrained", sharey=True)
    for axis, name in zip(axes, names, strict=True):
        axis.plot(found["filler_tokens"], rows[baseline]["exact"], marker="o", color="black", label="defaults")
        for title, row in rows.items():
            if row["sweep"] == name:
                axis.plot(found["filler_tokens"], row["exact"], marker="o", label=title)
        axis.set(title=name, xscale="log", ylim=(-0.03, 1.03), xlabel="filler tokens")
        axis.set_xticks(found["filler_tokens"], list(map(str, found["filler_tokens"])), rotation=60, fontsize="small")
        axis.minorticks_off()
        axis.legend(fontsize="x-small", loc="lower left")
    axes[0].set_ylabel("exact keys")
    figure.savefig(path, dpi=110)


def main(argv=None):
    args = parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    task, base = make_task(args), {"memory_update": keras_fam.Normalized(noise=args.noise)}
    path = args.out / "sweeps.json"
    found = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    found |= run_record("examples.passkey.sweeps", args, argv)
    found["filler_tokens"] = [count * args.block_size - task.template_tokens for count in args.lengths]
    for sweep, changes in SWEEPS.items():
        for change in changes:
            title = ", ".join(f"{k}={v}" for k, v in change.items()) or "fam_length=8, last, previous, 1, prompt"
            if title in found["rows"]:
                continue
            model, seconds = train(title, {**base, **change}, task, args)
            scores = exact(model, task, args.lengths, args)
            row = {"sweep": sweep, "exact": scores, "mean": sum(scores) / len(scores), "seconds": seconds}
            found["rows"][title] = row
            path.write_text(json.dumps(found, indent=1) + "\n")
    plot(found, args.out / "sweeps.png")
    for title, row in found["rows"].items():
        print(
            f"{row['sweep']:<28}{title:<42}{100 * row['mean']:>6.1f}   "
            + "".join(f"{100 * v:>7.1f}" for v in row["exact"])
        )


if __name__ == "__main__":
    main()
