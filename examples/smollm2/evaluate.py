"""Perplexity by position on held-out novels: plain windows, BSWA and FAM, before and after LoRA, memory ablated."""

import gc
import itertools
import json
import time

import keras
import numpy as np
from keras import ops

import keras_fam
from examples.smollm2.books import HELD_OUT, book_ids
from examples.smollm2.model import load, with_memory
from examples.smollm2.plot import plot
from keras_fam.ops.backend import compiled

ABLATIONS = ("zeroed", "shuffled")  # not "frozen": `initial_fam="summary"` has no fixed first memory


def held_out_rows(ids, rows, tokens):
    """`[rows, tokens + 1]` from the held-out books, equally many from each, evenly spaced."""
    found = []
    for title in HELD_OUT:
        each = rows // len(HELD_OUT)
        starts = np.linspace(0, len(ids[title]) - tokens - 1, each).astype(int)
        found += [ids[title][start : start + tokens + 1] for start in starts]
    return np.stack(found)


def log_losses(lm, rows, step, ablation=None, seed=0, watch=None):
    """−log p of tokens 1, 2, … given all before, `[B, T]`, streamed `step` tokens at a time.

    `watch(position, losses so far)` is called after every step; the memory is ablated before it if `ablation` is given.
    """

    def read(inputs, targets, state):
        logits, state = lm.advance(inputs, state, aligned=True)
        logits = ops.cast(logits, "float32")
        chosen = ops.take_along_axis(logits, ops.expand_dims(targets, -1), axis=-1)[..., 0]
        return ops.logsumexp(logits, axis=-1) - chosen, state

    run, rng = compiled(read, lambda: lm.variables), np.random.default_rng(seed)
    state, found = lm.get_initial_state(len(rows)), []
    for start in range(0, rows.shape[1] - 1, step):
        if ablation and start:
            state = keras_fam.ablate_memory(lm, state, ablation, rng)
        part = rows[:, start : start + step + 1]
        loss, state = run(ops.convert_to_tensor(part[:, :-1]), ops.convert_to_tensor(part[:, 1:]), state)
        found.append(ops.convert_to_numpy(loss))
        if watch is not None:
            watch(start + step, found)
    return np.concatenate(found, axis=1)


def summary(losses, window, edges=(0, 128, 256, 512, 1024, 2048, 4096, 8192)):
    """Perplexity of all tokens, beyond the window, and by range of positions."""
    edges = [e for e in edges if e < losses.shape[1]] + [losses.shape[1]]
    parts = {f"{a}-{b}": float(np.exp(losses[:, a:b].mean())) for a, b in itertools.pairwise(edges)}
    every, beyond = float(np.exp(losses.mean())), float(np.exp(losses[:, window:].mean()))
    return {"all": every, "beyond": beyond, "by position": parts}


def against(losses, others, window):
    """Mean difference of losses beyond the window, and its standard error over rows."""
    difference = (losses - others)[:, window:].mean(1)
    return {"nats": float(difference.mean()), "error": float(difference.std(ddof=1) / len(difference) ** 0.5)}


def evaluate(args):
    """Measures every system on the same rows; keeps what is already in the report."""
    report = args.out / "perplexity.json"
    record = json.loads(report.read_text()) if report.exists() else {}
    losses_file = args.out / "losses.npz"
    losses = dict(np.load(losses_file)) if losses_file.exists() else {}
    source = load()
    rows = held_out_rows(book_ids(source.preprocessor.tokenizer, args.out), args.rows, args.tokens)
    window = (args.segments + 1) * args.block

    def measure(name, lm, ablation=None, step=None):
        if name in losses and losses[name].shape == (args.rows, args.tokens) and not args.again:
            return
        began = time.time()
        losses[name] = log_losses(lm, rows, step or args.block, ablation, args.seed)
        found = summary(losses[name], window)
        record[name] = {**found, "seconds": round(time.time() - began, 1)}
        for other in ("BSWA", "BSWA + LoRA", "FAM + LoRA"):
            if other in losses and other != name:
                record[name][f"against {other}"] = against(losses[name], losses[other], window)
        parts = {where: round(value, 2) for where, value in found["by position"].items()}
        print(f"{name:<24} all {found['all']:.3f}  beyond {window}: {found['beyond']:.3f}  {parts}", flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        settings = {"rows": args.rows, "tokens": args.tokens, "block": args.block, "segments": args.segments,
                    "fam": args.fam, "memory_update": args.memory_update,
                    "held out": HELD_OUT, "keras": keras.__version__,
                    "backend": keras.backend.backend()}  # fmt: skip
        record["settings"] = settings
        report.write_text(json.dumps(record, indent=1) + "\n")
        np.savez(losses_file, **losses)

    def base(**changes):
        return with_memory(source, args, **{"fam": 0, **changes})

    if not args.trained_only:
        measure("full attention", base(block_size=args.tokens, memory_segments=0), step=args.tokens)
        measure(f"sliding window {window}", base(memory_segments=args.segments + 1, attention_window=window))
        measure("BSWA", base())
        measure("FAM", base(fam=args.fam))
    for name, folder, fam in (("BSWA + LoRA", args.bswa, 0), ("FAM + LoRA", args.trained, args.fam)):
        if folder is None or not (folder / "training.json").exists():
            continue
        lm = base(fam=fam)
        lm.load_lora_weights(folder / json.loads((folder / "training.json").read_text())["weights"])
        measure(name, lm)
        for ablation in ABLATIONS if fam else ():
            measure(f"{name}, {ablation}", lm, ablation)
        gc.collect()
    plot(args, losses, args.out / "perplexity.png")
    return record
