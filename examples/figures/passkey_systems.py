"""PassKey for every system of the paper on one axis (Fig. 3a, 7 and 9), small: TransformerBSWA with 0 to 4 segments,
stop-gradient segments, static summary tokens (SUM FAM), feedback memory segments (FM), RMT and TransformerFAM.

Each system is a set of settings of one code base, trained as `examples/passkey.py` trains (whose options hold here
too), and read at constant memory on held-out prose. Every system is a run of its own: weights and results are kept in
`--out`, and a later call adds to them and draws all that is there.

    python examples/figures/passkey_systems.py --backend jax --seed 0 --out out/passkey_systems
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import time

SYSTEMS = {
    "M0": ("BSWA M0", {"fam_length": 0, "memory_segments": 0}),
    "M1": ("BSWA M1", {"fam_length": 0, "memory_segments": 1}),
    "M2": ("BSWA M2", {"fam_length": 0, "memory_segments": 2}),
    "M4": ("BSWA M4", {"fam_length": 0, "memory_segments": 4}),
    "M1_SG": ("BSWA M1, stop gradient", {"fam_length": 0, "memory_segments": 1, "stop_memory_gradient": True}),
    "FM1": ("FM 1", {"fam_length": 0, "memory_segments": 1, "segment_source": "outputs"}),
    "FM2": ("FM 2", {"fam_length": 0, "memory_segments": 2, "segment_source": "outputs"}),
    "SUM": ("SUM FAM", {"fam_query": "static"}),
    "RMT": ("RMT", {"fam_recurrence": "stack"}),
    "FAM": ("FAM", {}),
    "FAM_N": ("FAM, normalized", {"fam_feedback": "normalized"}),
    "RMT_N": ("RMT, normalized", {"fam_recurrence": "stack", "fam_feedback": "normalized"}),
}
ROWS = 64
MACHINE = f"{platform.machine()}, {os.cpu_count()} cores"

parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("--systems", nargs="*", choices=list(SYSTEMS), default=list(SYSTEMS))
parser.add_argument(
    "--lengths",
    type=int,
    nargs="+",
    default=[3, 4, 5, 7, 9, 17, 33, 65, 129, 257, 529],
    help="blocks in the texts read",
)
OWN, rest = parser.parse_known_args()
COMMAND, BLOCKS = " ".join(["python examples/figures/passkey_systems.py", *sys.argv[1:]]), OWN.lengths
sys.argv = [sys.argv[0], *rest]
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import passkey  # noqa: E402  (it reads the options and chooses the backend)

ARGS = passkey.ARGS
if "--out" not in rest:
    ARGS.out = pathlib.Path("out/passkey_systems")

import keras  # noqa: E402

import keras_fam  # noqa: E402
from examples.datasets.python_docs import topics_text  # noqa: E402
from keras_fam.evaluation import ABLATIONS, StreamScorer, summary  # noqa: E402
from keras_fam.tasks import PassKey  # noqa: E402


def exact(model, task, blocks, how=None):
    """Share of keys that are right in every digit, for each length: one compiled program reads all lengths."""
    scorer = StreamScorer(model, how, boundaries=[0], seed=ARGS.seed)
    scores = []
    for count in blocks:
        texts = task.stream(ROWS, None, 256, total_tokens=count * ARGS.block_size, seed=ARGS.seed + 1, split="held_out")
        scores.append(summary([scorer.score(texts)])["exact"]["mean"][0])
    return scores


def run(name, task):
    """Trains and reads one system; what came out, as a dict."""
    title, settings = SYSTEMS[name]
    if "fam_feedback" in settings:  # with the recipe for length
        title, settings = f"{title}, noise {ARGS.fam_noise}", {**settings, "fam_noise": ARGS.fam_noise}
    passkey.MODELS[name] = (title, settings)
    started = time.perf_counter()
    model, seconds = passkey.train(name, task)
    model.save(ARGS.out / f"{name}.keras")
    attention = model.backbone.blocks[0].attention
    window = (attention.memory_segments + 1) * attention.block_size
    result = {"title": title, "settings": settings, "window": window, "exact": exact(model, task, BLOCKS)}
    if attention.fam_length:
        short = [count for count in BLOCKS if count in (8, 13, 17, 25, 33)]
        result["ablations"] = {how: exact(model, task, short, how) for how in ABLATIONS}
    return {**result, "command": COMMAND, "training_seconds": seconds, "seconds": time.perf_counter() - started}


def plot(found, path):
    """Draws the lengths at which training asks, too: whole chunks and a block with the question."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained", sharey=True)
    colors = {"M": "Blues", "F": "Oranges", "S": "Greys", "R": "Greens"}
    kinds = {kind: [n for n in found["systems"] if n[0] == kind] for kind in colors}
    for name, system in found["systems"].items():
        kind = kinds[name[0]]
        color = pyplot.get_cmap(colors[name[0]])(0.45 + 0.5 * (kind.index(name) + 1) / len(kind))
        style = {"marker": "o", "markersize": 3.5, "color": color, "label": system["title"]}
        style["linestyle"] = ":" if "_SG" in name else "--" if name.startswith("FM") else "-"
        reach = found["layers"] * system["window"]
        rows = zip(found["blocks"], found["filler_tokens"], system["exact"], strict=True)
        lengths, exact = zip(*((n, y) for blocks, n, y in rows if blocks % found["chunk_blocks"] == 1), strict=True)
        for axis, unit in zip(axes, (found["longest_trained"], reach), strict=True):
            axis.plot([n / unit for n in lengths], exact, **style)
    for axis, label in zip(axes, ("the longest filler trained on", "depth × window of each system"), strict=True):
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel=f"filler tokens / {label}", ylim=(-0.02, 1.02))
    axes[0].set_ylabel("exact keys")
    axes[1].legend(fontsize=8, loc="upper right")
    given = found["arguments"]
    title = f"PassKey, {given['filler']} filler, {given['digits']} digits, {ROWS} rows, {given['steps']} steps"
    figure.suptitle(f"{title}, seed {given['seed']}, {found['backend']}", fontsize=11)
    figure.savefig(path, dpi=100)


def make_task():
    """The task that the options describe."""
    documents = topics_text() if ARGS.filler == "prose" else None
    return PassKey(documents, digits=ARGS.digits, vocabulary_size=ARGS.vocabulary, seed=ARGS.seed)


def main():
    ARGS.out.mkdir(parents=True, exist_ok=True)
    task = make_task()
    path = ARGS.out / "passkey_systems.json"
    found = json.loads(path.read_text()) if path.exists() else {"systems": {}}
    found |= {
        "arguments": {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in vars(ARGS).items()},
        "machine": MACHINE,
        "layers": ARGS.layers,
        "blocks": BLOCKS,
        "chunk_blocks": ARGS.chunk_blocks,
        "longest_trained": (ARGS.chunk_blocks * ARGS.longest + 1) * ARGS.block_size - task.template_tokens,
        "filler_tokens": [count * ARGS.block_size - task.template_tokens for count in BLOCKS],
        "chance": task.chance,
        "backend": keras.backend.backend(),
        "versions": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            "keras_fam": keras_fam.__version__,
        },
    }
    for name in OWN.systems:
        if name not in found["systems"]:
            result = run(name, task)
            if path.exists():  # another call may have added to it
                found["systems"] = json.loads(path.read_text())["systems"]
            found["systems"][name] = result
            found["systems"] = {n: found["systems"][n] for n in SYSTEMS if n in found["systems"]}
            path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'filler tokens':<26}" + "".join(f"{n:>7,}" for n in found["filler_tokens"]))
    for system in found["systems"].values():
        print(f"{system['title']:<26}" + "".join(f"{100 * v:>7.1f}" for v in system["exact"]))
    plot(found, ARGS.out / "passkey_systems.png")


if __name__ == "__main__":
    main()
