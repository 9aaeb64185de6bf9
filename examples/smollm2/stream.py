"""Streams a whole novel through SmolLM2 with a memory: perplexity by position, and memory of the process."""

import json
import os
import pathlib
import time

import keras
import numpy as np
from books import book_ids
from evaluate import log_losses
from model import load, with_memory

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident():
    """Memory of this process in MB (Linux)."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


def stream(args):
    """Reads `args.book` from its first token to its last; writes `stream_<name>.json`."""
    source = load()
    ids = book_ids(source.preprocessor.tokenizer, args.out)[args.book]
    step = 4 * args.block
    length = min(args.tokens or len(ids), len(ids)) - 1
    ids = ids[: length // step * step + 1]
    lm = with_memory(source, args)
    if args.trained is not None:
        lm.load_lora_weights(args.trained / json.loads((args.trained / "training.json").read_text())["weights"])
        lm.merge_lora()
    del source
    memory, began, total = {}, time.time(), len(ids) - 1
    bar = keras.utils.Progbar(total, unit_name="step")

    def watch(position):
        if position % (4 * step) == 0 or position == total:
            memory[position] = round(resident(), 1)
        bar.update(position, [("MB", resident())])

    losses = log_losses(lm, ids[None], step, watch=watch)[0]
    seconds = time.time() - began
    later = [mb for position, mb in memory.items() if position >= 10_000]
    parts = np.array_split(losses, max(1, round(len(losses) / 10_000)))
    found = {
        "book": args.book, "tokens": total, "perplexity": float(np.exp(losses.mean())),
        "perplexity by tenth thousand": [round(float(np.exp(part.mean())), 3) for part in parts],
        "tokens per second": round(total / seconds, 1), "resident MB": memory,
        "spread after 10,000 tokens": (max(later) - min(later)) / min(later) if later else None,
        "fam": args.fam, "block": args.block, "segments": args.segments, "feedback": args.feedback,
        "trained": args.trained is not None, "backend": keras.backend.backend(), "keras": keras.__version__,
    }  # fmt: skip
    name = f"{'FAM' if args.fam else 'BSWA'}{'_lora' if args.trained else ''}"
    (args.out / f"stream_{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    spread = f"{found['spread after 10,000 tokens']:.2%}" if later else "not measured"
    print(
        f"\n{args.book}: {total} tokens, perplexity {found['perplexity']:.2f}, {found['tokens per second']} tokens/s, "
        f"memory after 10,000 tokens flat to {spread} (of {max(memory.values()):.0f} MB)"
    )
    return found
