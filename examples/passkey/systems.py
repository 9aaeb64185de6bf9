"""PassKey for every system of the paper on one axis (Fig. 3a, 7 and 9), small: TransformerBSWA with 0 to 4 segments,
stop-gradient segments, static summary tokens (SUM FAM), feedback memory segments (FM), RMT and TransformerFAM, also
with this project's writes and updates of the memory.

Each system is trained as in `examples.passkey.demo` (whose options apply here), and reads held-out prose at constant
memory. Weights and results are kept in `--out`; a later call adds the systems that are missing, and draws all of them.

    KERAS_BACKEND=jax python -m examples.passkey.systems --seed 0 --out out/passkey_systems
"""

import argparse
import json
import pathlib
import time

import keras_fam
from examples.passkey.demo import make_task, options, train
from examples.record import run_record
from keras_fam import TransformerFAMBackbone
from keras_fam.baselines import FeedbackMemoryBackbone, RMTBackbone, SummaryFAMBackbone
from keras_fam.evaluation import ABLATIONS, StreamScorer, summary

FAM, FM, SUM, RMT = TransformerFAMBackbone, FeedbackMemoryBackbone, SummaryFAMBackbone, RMTBackbone
SYSTEMS = {  # title, class of the backbone, settings
    "M0": ("BSWA M0", FAM, {"fam_length": 0, "memory_segments": 0}),
    "M1": ("BSWA M1", FAM, {"fam_length": 0, "memory_segments": 1}),
    "M2": ("BSWA M2", FAM, {"fam_length": 0, "memory_segments": 2}),
    "M4": ("BSWA M4", FAM, {"fam_length": 0, "memory_segments": 4}),
    "M1_SG": ("BSWA M1, stop gradient", FAM, {"fam_length": 0, "memory_segments": 1, "stop_memory_gradient": True}),
    "FM1": ("FM 1", FM, {"fam_length": 0, "memory_segments": 1}),
    "FM2": ("FM 2", FM, {"fam_length": 0, "memory_segments": 2}),
    "SUM": ("SUM FAM", SUM, {}),
    "RMT": ("RMT", RMT, {}),
    "FAM": ("FAM", FAM, {}),
    "FAM_N": ("FAM, normalized", FAM, {"memory_update": "normalized"}),
    "HG": ("FAM, hard gate", FAM, {"memory_update": "hard_gate"}),
    "HG_A": ("FAM, anchored, hard gate", FAM, {"fam_query": "anchored", "memory_update": "hard_gate"}),
    "HG_L": ("FAM, layer inputs, hard gate", FAM, {"fam_query": "layer_inputs", "memory_update": "hard_gate"}),
    "RMT_N": ("RMT, normalized", RMT, {"memory_update": "normalized"}),
}
ROWS = 64
LENGTHS = [3, 4, 5, 7, 9, 17, 33, 65, 129, 257, 529]  # blocks in the texts that are read


def parser(description=__doc__):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, parents=[options()]
    )
    parser.add_argument("--systems", nargs="*", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="blocks in the texts that are read")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/passkey_systems"))
    return parser


def exact(model, task, blocks, args, ablation=None):
    """Share of keys that are right in every digit, for each length: one compiled program reads all lengths."""
    scorer = StreamScorer(model, ablation, boundaries=[0], seed=args.seed)
    scores = []
    for count in blocks:
        total = count * args.block_size
        texts = task.stream(ROWS, None, 256, total_tokens=total, seed=args.seed + 1, split="held_out")
        scores.append(summary([scorer.score(texts)])["exact"]["mean"][0])
    return scores


def run(name, task, args):
    """Trains a system, keeps its weights and reads the texts; the results as a dict."""
    title, backbone_class, settings = SYSTEMS[name]
    recorded = {"backbone": backbone_class.__name__, **settings}
    if settings.get("memory_update") == "normalized":  # the recipe for length: normalized, with noise in training
        title, settings = f"{title}, noise {args.noise}", {"memory_update": keras_fam.Normalized(noise=args.noise)}
        recorded["noise"] = args.noise
    started = time.perf_counter()
    model, seconds = train(title, settings, task, args, backbone_class)
    model.save(args.out / f"{name}.keras")
    attention = model.backbone.blocks[0].attention
    window = (attention.memory_segments + 1) * attention.block_size
    result = {"title": title, "settings": recorded, "window": window, "exact": exact(model, task, args.lengths, args)}
    if attention.fam_length:
        short = [count for count in args.lengths if count in (8, 13, 17, 25, 33)]
        result["ablations"] = {ablation: exact(model, task, short, args, ablation) for ablation in ABLATIONS}
    return {**result, "training_seconds": seconds, "seconds": time.perf_counter() - started}


def plot(found, path):
    """Draws the lengths at which training asks, too: whole chunks and a block with the question."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained", sharey=True)
    colors = {"M": "Blues", "F": "Oranges", "S": "Greys", "R": "Greens", "H": "Purples"}
    kinds = {kind: [n for n in found["systems"] if n[0] == kind] for kind in colors}
    for name, system in found["systems"].items():
        kind = kinds[name[0]]
        color = pyplot.get_cmap(colors[name[0]])(0.45 + 0.5 * (kind.index(name) + 1) / len(kind))
        style = {"marker": "o", "markersize": 3.5, "color": color, "label": system["title"]}
        style["linestyle"] = ":" if "_SG" in name else "--" if name.startswith("FM") else "-"
        reach = found["layers"] * system["window"]
        rows = zip(found["blocks"], found["filler_tokens"], system["exact"], strict=True)
        drawn = [(n, y) for blocks, n, y in rows if blocks % found["chunk_blocks"] == 1]
        for axis, unit in zip(axes, (found["longest_trained"], reach), strict=True):
            axis.plot([n / unit for n, _ in drawn], [y for _, y in drawn], **style)
    for axis, label in zip(axes, ("longest filler in training", "(layers × window of each system)"), strict=True):
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel=f"filler tokens / {label}", ylim=(-0.02, 1.02))
    axes[0].set_ylabel("exact keys")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    given = found["arguments"]
    title = f"PassKey, {given['filler']} filler, {given['digits']} digits, {ROWS} texts, {given['steps']} steps"
    figure.suptitle(f"{title}, seed {given['seed']}, {found['backend']}", fontsize=11)
    figure.savefig(path, dpi=100)


def main(argv=None):
    args = parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    task, record = make_task(args), run_record("examples.passkey.systems", args, argv)
    path = args.out / "passkey_systems.json"
    found = json.loads(path.read_text()) if path.exists() else {"systems": {}}
    found |= record | {
        "layers": args.layers,
        "blocks": args.lengths,
        "chunk_blocks": args.chunk_blocks,
        "longest_trained": (args.chunk_blocks * args.longest + 1) * args.block_size - task.template_tokens,
        "filler_tokens": [count * args.block_size - task.template_tokens for count in args.lengths],
        "chance": task.chance,
    }
    for name in args.systems:
        if name not in found["systems"]:
            result = {**run(name, task, args), "command": record["command"]}
            if path.exists():  # another call may have added to it
                found["systems"] = json.loads(path.read_text())["systems"]
            found["systems"][name] = result
            found["systems"] = {n: found["systems"][n] for n in SYSTEMS if n in found["systems"]}
            path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'filler tokens':<26}" + "".join(f"{n:>7,}" for n in found["filler_tokens"]))
    for system in found["systems"].values():
        print(f"{system['title']:<26}" + "".join(f"{100 * v:>7.1f}" for v in system["exact"]))
    plot(found, args.out / "passkey_systems.png")


if __name__ == "__main__":
    main()
