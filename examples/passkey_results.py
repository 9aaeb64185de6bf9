"""What `passkey_length.py` found: trainings in a folder put together, and their figure."""

import json

import numpy as np


def found_results(folder, names):
    """`(name, seed, what was kept of it)` of all trainings in a folder."""
    for name in names:
        for path in sorted(folder.glob(f"{name}_seed*.json")):
            yield name, path.stem.split("seed")[1], json.loads(path.read_text())


def gather(folder, titles):
    """All results in a folder: by texts, line of the figure, factor and seed the share of exact answers; and more.

    Args:
        folder: `pathlib.Path`.
        titles: what the figure calls each model, by name.
    """
    exact, details = {}, {}
    for name, seed, found in found_results(folder, titles):
        details[f"{name}_seed{seed}"] = {
            **{k: found.get(k) for k in ("steps", "write_attempts", "training_seconds", "steps_at_which_levels_began")},
            "measuring_seconds": {
                read: {f: got["seconds"] for f, got in lengths.items()} for read, lengths in found["lengths"].items()
            },
        }
        for read, lengths in found["lengths"].items():
            for factor, got in lengths.items():
                for how, right in got["right"].items():
                    line = f"{titles[name]}, memory {how}" if how else titles[name]
                    of_line = exact.setdefault(read, {}).setdefault(line, {}).setdefault(factor, {})
                    of_line[seed] = float(np.mean(right))
    return exact, details


def share(right):
    return {"exact": float(np.mean(right)), "rows": len(right)} if len(right) else None


def by_place(folder, name, read, longest):
    """Over all seeds: exact answers by the quarter of the text in which the key stands, and by distance.

    Args:
        folder: `pathlib.Path`.
        name: of a model.
        read: which texts were read.
        longest: tokens of the longest text trained on.
    """
    quarters, distances = {}, {}
    for _, _, found in found_results(folder, [name]):
        for factor, got in found["lengths"].get(read, {}).items():
            tokens = int(factor) * longest
            for away, right in zip(got["tokens_since_key"], got["right"][""], strict=True):
                quarter = min(int(4 * (1 - away / tokens)), 3)
                quarters.setdefault(factor, [[], [], [], []])[quarter].append(right)
                distances.setdefault(len(str(max(away, 1))), []).append(right)
    return {
        "by_quarter_of_the_text": {factor: list(map(share, parts)) for factor, parts in quarters.items()},
        "by_tokens_since_key": {f"below {10**power:,}": share(distances[power]) for power in sorted(distances)},
    }


def first_below(by_factor, least=0.95):
    """The first factor at which the mean over seeds falls below `least`, or None."""
    return next((int(f) for f in sorted(by_factor, key=int) if np.mean(list(by_factor[f].values())) < least), None)


def plot(result, title, path):
    """The lines of the texts that `result["drawn"]` names, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    longest = result["longest_text_trained"]
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, by_factor in result["exact"][result["drawn"]].items():
        factors = sorted(map(int, by_factor))
        values = [list(by_factor[str(factor)].values()) for factor in factors]
        style = {"linestyle": ":", "marker": "x"} if "memory" in name else {"linestyle": "-", "marker": "o"}
        (line,) = axes.plot(factors, [np.mean(v) for v in values], label=name, **style)
        axes.fill_between(factors, list(map(min, values)), list(map(max, values)), color=line.get_color(), alpha=0.15)
    axes.set(xscale="log", ylim=(-0.02, 1.02), ylabel="exact keys (mean and span of seeds)")
    axes.set(xlabel=f"length of the text, times the longest trained on ({longest:,} tokens)")
    above = axes.secondary_xaxis("top", functions=(lambda x: x * longest, lambda x: x / longest))
    above.set_xlabel("tokens")
    axes.set_title(title, fontsize="medium")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
