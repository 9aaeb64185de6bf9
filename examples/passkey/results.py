"""The results of `examples.passkey.length`: all runs in a folder, and their figure."""

import json

import numpy as np


def found_results(folder, names):
    """Yields `(name, seed, results)` of all runs in a folder."""
    for name in names:
        for path in sorted(folder.glob(f"{name}_seed*.json")):
            yield name, path.stem.split("seed")[1], json.loads(path.read_text())


def gather(folder, titles):
    """All results in a folder: the share of exact answers by texts, line of the figure, factor and seed; and details.

    Args:
        folder: `pathlib.Path`.
        titles: dict from the name of each model to its label in the figure.
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
            for factor in sorted(lengths, key=int):
                got = lengths[factor]
                for how, right in got["right"].items():
                    line = f"{titles[name]}, memory {how}" if how else titles[name]
                    of_line = exact.setdefault(read, {}).setdefault(line, {}).setdefault(factor, {})
                    of_line[seed] = float(np.mean(right))
    return exact, details


def share(right):
    return {"exact": float(np.mean(right)), "rows": len(right)} if len(right) else None


def by_position(folder, name, read, longest):
    """Exact answers over all seeds, by the quarter of the text that contains the key, and by distance.

    Args:
        folder: `pathlib.Path`.
        name: str, name of a model.
        read: str, name of the texts that were read.
        longest: int, tokens of the longest text trained on.
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
    """Draws the lines of the texts named by `result["drawn"]` to a PNG file."""
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
    axes.set(xscale="log", ylim=(-0.02, 1.02), ylabel="exact keys (mean and range over seeds)")
    axes.set(xlabel=f"length of the text, times the longest in training ({longest:,} tokens)")
    above = axes.secondary_xaxis("top", functions=(lambda x: x * longest, lambda x: x / longest))
    above.set_xlabel("tokens")
    axes.set_title(title, fontsize="medium")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
