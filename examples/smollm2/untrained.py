"""What conversion alone does to SmolLM2 on a text without an end: perplexity by ten thousand tokens, for each choice.

    python -m examples.smollm2 untrained --tokens 100000
    python -m examples.smollm2 untrained --systems "FAM" "BSWA, 4 sinks" --tokens 0
    python -m examples.smollm2 untrained --systems cosines

The text is the six novels of Austen, "Northanger Abbey" first, and the King James Bible, as one stream (about two
million tokens, all of them with `--tokens 0`). Streams are saved every ten thousand tokens and continue from there.
"""

import importlib.util
import json
import time

import keras
import numpy as np
from keras import ops

import keras_fam
from examples.datasets.king_james import king_james
from examples.smollm2.books import book_ids
from examples.smollm2.model import load
from examples.smollm2.plot import plot_stream
from examples.smollm2.stream import FIRST, resident
from keras_fam.ops.backend import compiled
from keras_fam.streaming import session

FIRST_NOVEL, OTHER_NOVEL = "northanger abbey", "persuasion"
# Blocks over which the RMS of memories is averaged.
RANGES = {"10 to 110": (10, 110), "900 to 1,000": (900, 1000), "the last 100": (-100, None)}
# Options of `keras_fam.hub.convert`, with `--fam` rows of memory unless they say otherwise.
SYSTEMS = {
    "BSWA": {"fam_length": 0, "attention_sinks": 0},
    "BSWA, 1 sink": {"fam_length": 0, "attention_sinks": 1},
    "BSWA, 4 sinks": {"fam_length": 0},
    "FAM": {},
    "FAM, gate 0": {"fam_gate": 0.0},
    "FAM, every row rewritten": {"memory_update": "residual"},
    "FAM, average": {"memory_update": "average"},
    "FAM, the paper's form": {"fam_query": "feedback"},
    "FAM, the paper's form, gate -4": {"fam_query": "feedback", "fam_gate": -4.0},
    "window of 4,096, 4 sinks": {"fam_length": 0, "memory_segments": 31},
}


def text_ids(tokenizer, folder):
    """int32 `[tokens]`: the novels and the Bible, cached in `folder/long_text.npy`."""
    cache = folder / "long_text.npy"
    if not cache.exists():
        novels = book_ids(tokenizer, folder)
        books = [np.asarray(tokenizer(text + "\n")) for text in king_james(folder.parent / "king_james").values()]
        order = [FIRST_NOVEL, *(title for title in novels if title != FIRST_NOVEL)]
        np.save(cache, np.concatenate([*(novels[title] for title in order), *books]).astype("int32"))
    return np.load(cache)


def converted(source, args, system):
    settings = {"block_size": args.block, "memory_segments": args.segments, "fam_length": args.fam, "seed": args.seed}
    return keras_fam.hub.convert(source, weights="share", **{**settings, **SYSTEMS[system]})


def reader(lm):
    """A compiled step: −log p of the next tokens, the state, and the RMS of each layer's memory after the step."""

    def read(inputs, targets, state):
        hidden, state = lm.backbone.advance(inputs, state, aligned=True)
        losses = []
        for start in range(0, inputs.shape[1], lm.block_size):  # logits of a block at a time: they are large
            part = slice(start, start + lm.block_size)
            logits = ops.cast(lm.backbone.token_embedding(hidden[:, part], reverse=True), "float32")
            chosen = ops.take_along_axis(logits, ops.expand_dims(targets[:, part], -1), axis=-1)[..., 0]
            losses.append(ops.logsumexp(logits, axis=-1) - chosen)
        memories = [layer.fam for layer in state.layers] if lm.backbone.fam_length else []
        sizes = [ops.sqrt(ops.mean(ops.square(fam))) for fam in memories]
        return ops.concatenate(losses, axis=1), state, sizes

    return compiled(read, lambda: lm.variables)


def steps(ids, size):
    for start in range(0, len(ids) - 1, size):
        part = ids[None, start : start + size + 1]
        yield ops.convert_to_tensor(part[:, :-1]), ops.convert_to_tensor(part[:, 1:])


def measure(lm, ids, path, settings):
    """Reads `ids`, from where the files beside `path` left off; writes and returns the report."""
    report, kept = path.with_suffix(".json"), path.with_suffix(".safetensors")
    found = {**settings, "tokens": 0, "perplexity by ten thousand tokens": [], "RMS by step": [], "seconds": 0.0}
    state, losses = lm.get_initial_state(1), []
    if report.exists() and kept.exists():
        found = json.loads(report.read_text())
        state, extras = session.load(kept, lm)
        losses = [extras["losses"]]
    run, began, seconds = reader(lm), time.time(), found["seconds"]
    sizes, read = found["RMS by step"], found["tokens"]
    for inputs, targets in steps(ids[read:], settings["step"]):
        loss, state, rms = run(inputs, targets, state)
        losses.append(ops.convert_to_numpy(loss)[0])
        sizes.append([round(float(x), 4) for x in rms])
        read += len(losses[-1])
        if sum(map(len, losses)) >= FIRST:
            joined = np.concatenate(losses)
            losses = [joined[FIRST:]]
            perplexity = round(float(np.exp(joined[:FIRST].mean())), 3)
            found["perplexity by ten thousand tokens"].append(perplexity)
            found |= {"tokens": read, "seconds": round(seconds + time.time() - began, 1), "MB": round(resident())}
            report.write_text(json.dumps(found) + "\n")
            session.save(kept, lm, state, {"losses": losses[0]})
            speed = read / found["seconds"]
            print(f"{path.name}: {read} tokens, perplexity {perplexity}, {speed:.0f} tokens/s", flush=True)
    return found


def cosines(source, args, blocks=32):
    """Per layer, the cosine of the memories of two novels after `blocks` blocks."""
    novels, memories = book_ids(source.preprocessor.tokenizer, args.out), []
    lm = converted(source, args, "FAM")
    run = reader(lm)
    for title in (FIRST_NOVEL, OTHER_NOVEL):
        state = lm.get_initial_state(1)
        for inputs, targets in steps(novels[title][: blocks * args.block + 1], args.step):
            _, state, _ = run(inputs, targets, state)
        memories.append([ops.convert_to_numpy(layer.fam).ravel() for layer in state.layers])
    pairs = zip(*memories, strict=True)
    return [round(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), 4) for a, b in pairs]


def summarize(folder):
    """Writes what all runs in `folder` have found to `summary.json`, and prints ratios of perplexities and of RMS."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if "system" in record:
            sizes = np.array(record.pop("RMS by step"))
            blocks = record["step"] // record["block"]  # in a step
            read = len(sizes) * blocks
            for name, (first, last) in RANGES.items():
                first, last = (read + first, read) if first < 0 else (first, last)
                if sizes.size and read >= last:
                    means = sizes[-(-first // blocks) : last // blocks].mean(0)
                    record[f"RMS by layer, blocks {name}"] = [round(float(x), 3) for x in means]
            found[record["system"]] = record
        elif "cosines" in record:
            found["cosines"] = record
    (folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    if {"FAM", "BSWA, 4 sinks"} <= set(found) and importlib.util.find_spec("matplotlib"):
        plot_stream(found, folder / "perplexity.png")
    of = "perplexity by ten thousand tokens"
    for system, other in (("BSWA, 4 sinks", "BSWA"), ("FAM", "BSWA, 4 sinks")):
        if system in found and other in found:
            ratios = [a / b for a, b in zip(found[system][of], found[other][of], strict=False)]
            print(f"{system} over {other}: {min(ratios):.4f} to {max(ratios):.4f} times the perplexity")
    early, *later = (found.get("FAM", {}).get(f"RMS by layer, blocks {x}") for x in RANGES)
    for name, means in zip([*RANGES][1:], later, strict=True):
        if early and means:
            ratios = np.divide(means, early)
            print(f"RMS of the memory, blocks {name} over 10 to 110: {ratios.min():.3f} to {ratios.max():.3f} times")


def untrained(args):
    """Measures every system of `args.systems`, one after the other."""
    source = load(dtype=args.dtype)
    folder = args.out / "untrained"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"block": args.block, "segments": args.segments, "fam": args.fam, "seed": args.seed}
    settings |= {"step": args.step, "dtype": args.dtype, "backend": keras.backend.backend(), "keras": keras.__version__}
    for system in args.systems:
        if system == "cosines":
            found = cosines(source, args)
            (folder / "cosines.json").write_text(json.dumps({**settings, "blocks": 32, "cosines": found}) + "\n")
            below = sum(cosine < 0.95 for cosine in found)
            print(f"cosine of the memories of two novels: below 0.95 in {below} of {len(found)} layers; {found}")
            continue
        ids = text_ids(source.preprocessor.tokenizer, args.out)
        wanted = -(-args.tokens // args.step) * args.step or len(ids)
        ids = ids[: min(wanted, (len(ids) - 1) // args.step * args.step) + 1]
        name = system.lower().replace("'", "").replace(",", "").replace(" ", "_")
        measure(converted(source, args, system), ids, folder / name, {"system": system, **settings})
    summarize(folder)
