"""Fig. 5 and 6, Tables 5 to 7, small: one setting of TransformerFAM at a time, on PassKey.

Each row is the model of `passkey_systems.py` called "FAM, normalized, noise" with one change: how many memory rows,
where they stand, how many memories are visible, what the first memory is. Trained for fewer steps, so that settings
differ in how fast they learn the task; the mean over lengths of up to 33 blocks is one number for that.

    python examples/figures/sweeps.py --backend jax --seed 0 --steps 800 --out out/sweeps
"""

import json
import sys

import passkey_systems as systems  # reads the options and chooses the backend

ARGS = systems.ARGS
BASE = {"fam_feedback": "normalized", "fam_noise": ARGS.fam_noise}
SWEEPS = {
    "baseline": [{}],
    "memory rows (Fig. 5)": [{"fam_length": n} for n in (2, 4, 16)],
    "position (Table 5)": [{"fam_position": "float"}, {"fam_position": "zero"}, {"fam_query_position": "current"}],
    "visible memories (Table 6)": [{"num_visible_memories": n} for n in (2, 4)],
    "first memory (App. B.1)": [{"initial_fam": "summary"}, {"initial_fam": "prefix"}],
}


def plot(found, path):
    """One panel a sweep, the baseline in each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = found["rows"]
    baseline = next(title for title, row in rows.items() if row["sweep"] == "baseline")
    names = [sweep for sweep in SWEEPS if sweep != "baseline"]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.6), layout="constrained", sharey=True)
    for axis, name in zip(axes, names, strict=True):
        axis.plot(
            found["filler_tokens"], rows[baseline]["exact"], marker="o", color="black", label=f"{baseline} (base)"
        )
        for title, row in rows.items():
            if row["sweep"] == name:
                axis.plot(found["filler_tokens"], row["exact"], marker="o", label=title)
        axis.set(title=name, xscale="log", ylim=(-0.03, 1.03), xlabel="filler tokens")
        axis.set_xticks(found["filler_tokens"], list(map(str, found["filler_tokens"])), rotation=60, fontsize="small")
        axis.minorticks_off()
        axis.legend(fontsize="x-small", loc="lower left")
    axes[0].set_ylabel("exact keys")
    figure.savefig(path, dpi=110)


def main():
    ARGS.out.mkdir(parents=True, exist_ok=True)
    task = systems.make_task()
    path = ARGS.out / "sweeps.json"
    found = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    blocks = [count for count in systems.BLOCKS if count <= 33]
    found |= {
        "command": "python " + " ".join(sys.argv),
        "arguments": {k: str(v) for k, v in vars(ARGS).items()},
        "machine": systems.MACHINE,
        "filler_tokens": [count * ARGS.block_size - task.template_tokens for count in blocks],
    }
    for sweep, changes in SWEEPS.items():
        for change in changes:
            title = ", ".join(f"{k}={v}" for k, v in change.items()) or "fam_length=8, last, previous, 1, prompt"
            if title in found["rows"]:
                continue
            systems.passkey.MODELS["row"] = (title, {**BASE, **change})
            model, seconds = systems.passkey.train("row", task)
            exact = systems.exact(model, task, blocks)
            found["rows"][title] = {"sweep": sweep, "exact": exact, "mean": sum(exact) / len(exact), "seconds": seconds}
            path.write_text(json.dumps(found, indent=1) + "\n")
    plot(found, ARGS.out / "sweeps.png")
    for title, row in found["rows"].items():
        print(
            f"{row['sweep']:<28}{title:<42}{100 * row['mean']:>6.1f}   "
            + "".join(f"{100 * v:>7.1f}" for v in row["exact"])
        )


if __name__ == "__main__":
    main()
