"""How much attention tokens give to the memory, layer by layer: where an answer is given, and in plain text."""

import json

import numpy as np

from examples.laboratory.compare import MEMORIES, SHARED, folder_of
from examples.record import run_record
from examples.smollm2.memory import batches
from examples.smollm2.memory.command import parser
from examples.smollm2.memory.prepared import Prepared, build, read_config
from keras_fam.evaluation.visualize import attention_maps

ROWS, BLOCKS = 16, 16


def attention(args):
    """Prints and writes, for each memory and seed, the mean share of attention that memory rows get in each layer."""
    found = {}
    for name in args.memories:
        for seed in args.seeds:
            found[f"{name}, seed {seed}"] = shares(*trained_model(args, name, seed))
    for name, layers in found.items():
        print(f"\n{name}: attention to the memory in %, by layer")
        for place, values in layers.items():
            print(f"{place:<20}" + "".join(f"{100 * value:8.2f}" for value in values))
    record = run_record("examples.laboratory", args) | {"rows": ROWS, "blocks": BLOCKS, "shares": found}
    (args.out / f"{args.mixture}_attention.json").write_text(json.dumps(record, indent=1) + "\n")
    return found


def trained_model(args, name, seed):
    """The language model of a run, and a task whose texts it was trained on."""
    options = ["--data", str(args.out), "--mixture", args.mixture, "--seed", str(seed)]
    command = parser().parse_args(["train", *options, *SHARED, *MEMORIES[name], *args.more])
    prepared = Prepared(args.out)
    lm = build(prepared, read_config(prepared, command), dtype=command.dtype, seed=seed)
    with np.load(folder_of(args, name, seed) / "values.npz") as values:
        for number, variable in enumerate(lm.trainable_variables):
            variable.assign(values[f"value_{number}"])
    return lm, batches.make_task(prepared, command, again=0.0)


def shares(lm, task):
    """Mean shares by layer: of tokens that are followed by a token of the answer, and of all others behind block 2."""
    tokens, rng = BLOCKS * lm.block_size, np.random.default_rng(0)
    texts = [task.text(tokens, seed=rng, split="held_out") for _ in range(ROWS)]
    answering = np.zeros((ROWS, tokens), bool)
    for row, text in enumerate(texts):
        answering[row, text.answers[-1].start - 1 : text.answers[-1].stop - 1] = True
    maps = attention_maps(lm, np.stack([text.token_ids for text in texts]))
    found = {"at the answer": [], "elsewhere": []}
    for layer in maps:
        given = layer["tokens"][..., : lm.fam_length].sum(-1).mean(-1)  # [n, B, S], over heads
        given = given.transpose(1, 0, 2).reshape(ROWS, tokens)
        plain = ~answering
        plain[:, : 2 * lm.block_size] = False
        found["at the answer"].append(float(given[answering].mean()))
        found["elsewhere"].append(float(given[plain].mean()))
    return found
