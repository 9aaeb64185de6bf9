"""Streams a whole novel through SmolLM2 with a memory: perplexity by position, and memory of the process."""

import json
import os
import pathlib
import time

import keras
import numpy as np

from examples.smollm2.books import book_ids
from examples.smollm2.evaluate import log_losses
from examples.smollm2.model import load, with_memory

PAGE = os.sysconf("SC_PAGE_SIZE")
FIRST = 10_000  # tokens after which resident memory should be constant


def resident():
    """Resident memory of this process in MB (Linux)."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


def summary(losses, memory, speed):
    """Results so far: perplexity of all and of every ten thousand tokens, resident memory and its growth."""
    losses = np.concatenate(losses, axis=1)[0]
    parts = np.split(losses, range(FIRST, len(losses), FIRST))
    early = [mb for position, mb in memory.items() if position <= FIRST] or [next(iter(memory.values()))]
    later = [mb for position, mb in memory.items() if position >= FIRST] or early
    return {
        "tokens": len(losses),
        "perplexity": float(np.exp(losses.mean())),
        "perplexity by ten thousand tokens": [round(float(np.exp(part.mean())), 3) for part in parts],
        "tokens per second": round(speed, 1),
        "resident MB": memory,
        "growth": max(later) / max(early) - 1,
        "spread": (max(later) - min(later)) / min(later),
    }


def settings(args):
    names = ("book", "window", "fam", "block", "segments", "memory_update", "initial", "sink", "seed")
    versions = {"backend": keras.backend.backend(), "keras": keras.__version__}
    return {**{name: getattr(args, name) for name in names}, "trained": args.trained is not None, **versions}


def stream(args):
    """Streams `args.book` from start to end; writes `stream_<name>.json`."""
    source = load()
    ids = book_ids(source.preprocessor.tokenizer, args.out)[args.book]
    step = 4 * args.block
    length = min(args.tokens or len(ids), len(ids)) - 1
    ids = ids[: length // step * step + 1]
    plain = {"fam": 0, "memory_segments": args.segments + 1, "attention_window": args.window}
    lm = with_memory(source, args, **(plain if args.window else {}))
    if args.trained is not None:
        lm.load_lora_weights(args.trained / json.loads((args.trained / "training.json").read_text())["weights"])
        lm.merge_lora()
    del source
    memory, began, total = {}, time.time(), len(ids) - 1
    system = "window" if args.window else "FAM" if args.fam else "BSWA"
    report = args.out / f"stream_{system}{'_lora' if args.trained else ''}.json"
    bar = keras.utils.Progbar(total, unit_name="token")

    def watch(position, losses):
        bar.update(position, [("MB", resident())])
        if position % (4 * step) and position != total:
            return
        memory[position] = round(resident(), 1)
        found = {**summary(losses, memory, position / (time.time() - began)), **settings(args), "of tokens": total}
        report.write_text(json.dumps(found, indent=1) + "\n")

    log_losses(lm, ids[None], step, watch=watch)
    found = json.loads(report.read_text())
    print(
        f"\n{args.book}: {total} tokens, perplexity {found['perplexity']:.2f}, {found['tokens per second']} tokens/s, "
        f"growth of resident memory after {FIRST} tokens: {found['growth']:+.2%} ({max(memory.values()):.0f} MB), "
        f"spread {found['spread']:.2%}"
    )
    return found
