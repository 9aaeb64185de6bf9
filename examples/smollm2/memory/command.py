"""SmolLM2-135M learns to remember: prepared here, trained and evaluated there, on one accelerator, in minutes.

    python -m examples.smollm2.memory prepare                            # weights, texts, tokenizer, Python packages
    python -m examples.smollm2.memory read --data out/memory             # the untrained model over two million tokens
    python -m examples.smollm2.memory weigh --data out/memory            # optional: for `train --weigh-books`
    python -m examples.smollm2.memory train --data out/memory --minutes 10
    python -m examples.smollm2.memory train --tiny --minutes 1           # everything at small size, on a CPU

`prepare` needs what `make smollm2` installs, and a network. Its folders below `out/memory` are copied to the machine
with the accelerator, which needs JAX, h5py and tokenizers; the rest lies in `part1/wheels`:

    pip install --no-index --no-deps out/memory/part1/wheels/*.whl

`train` converts SmolLM2 as `keras_fam.hub.convert` does, trains LoRA, the first memory and its gates on a mixture of
texts in which facts are to be remembered (`keras_fam.tasks.ProseTask`), and saves everything every minute: a later call
with the same `--out` continues. Texts grow when their needles are found. It ends with needles at 1, 10 and 100 times
the trained length in held-out novels, beside ablations of the memory and SmolLM2 with a window and attention sinks.
"""

import argparse
import pathlib


def parser():
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(dest="command", required=True)
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--block", type=int, default=128, help="S, tokens in a block")
    model.add_argument("--segments", type=int, default=1, help="m, past blocks that are visible")
    model.add_argument("--fam", type=int, default=16, help="F, rows of memory")
    model.add_argument("--sinks", type=int, default=4, help="attention sinks")
    model.add_argument("--fam-query", choices=["layer_inputs", "anchored", "feedback"], default="layer_inputs")
    model.add_argument("--memory-update", help="hard_gate, residual, normalized or average; by default as `convert`")
    model.add_argument("--gate", type=float, help="where the bias on reading starts; by default as `convert`, -4")
    model.add_argument("--seed", type=int, default=0)
    model.add_argument("--random", action="store_true", help="random weights: only to compile and to measure")
    model.add_argument("--tiny", action="store_true", help="a small model with random weights")
    model.add_argument(
        "--data", type=pathlib.Path, help="folder of `prepare`; with --tiny: none, Python's documentation"
    )

    prepare = commands.add_parser("prepare", help="writes what the other machine needs", parents=[model])
    prepare.add_argument("--parts", type=int, default=2, help="folders, each for one transfer")
    prepare.add_argument("--limit", type=float, default=64.0, help="MiB of a transfer")
    prepare.add_argument("--python", default="3.12", help="version of Python on the other machine")
    prepare.add_argument("--wheels", nargs="*", default=["gguf", "keras", "namex", "optree"], help="packages it lacks")
    prepare.add_argument(
        "--cache", type=pathlib.Path, default=pathlib.Path("out"), help="where texts are downloaded to"
    )
    prepare.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/smollm2"), help="where ids are kept")

    read = commands.add_parser("read", help="the untrained model over one long text", parents=[model])
    read.add_argument("--systems", nargs="+", default=["FAM", "BSWA, 4 sinks"], metavar="SYSTEM")
    read.add_argument("--tokens", type=int, default=0, help="0: the whole text")
    read.add_argument("--chunk", type=int, default=64, help="blocks read at a time")
    read.add_argument("--dtype", default="float32")
    read.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/memory_run"))

    weigh = commands.add_parser("weigh", help="what long context is worth to each token of the books", parents=[model])
    weigh.add_argument("--long", type=int, default=4096, help="tokens of the long window")
    weigh.add_argument("--tokens", type=int, default=0, help="0: all; the others get weight 1")
    weigh.add_argument("--chunk", type=int, default=8, help="blocks read at a time")
    weigh.add_argument("--dtype", default="float32")
    weigh.add_argument("--out", type=pathlib.Path, help="where they are written; by default --data")

    train = commands.add_parser("train", help="trains and evaluates within so many minutes", parents=[model])
    train.add_argument("--minutes", type=float, default=10.0, help="of the whole command, once it has started")
    train.add_argument("--reserve", type=float, default=150.0, help="seconds of them for the evaluation")
    train.add_argument("--steps", type=int, default=1_000_000, help="training steps at most; 0: evaluate only")
    train.add_argument("--levels", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="blocks in a text, growing")
    train.add_argument("--grow-at", type=float, default=0.9, help="share of needles found at which texts grow")
    train.add_argument("--level-steps", type=int, default=30, help="steps at a level at least")
    train.add_argument("--step-tokens", type=int, default=0, help="tokens of a step at most; 0: by the device's memory")
    mixtures = ["standard", "needle", "city", "city_and_books"]
    train.add_argument("--mixture", choices=mixtures, default="standard", help="what texts ask for")
    train.add_argument("--lora-rows", choices=["all", "memory"], default="all", help="which rows LoRA acts on")
    train.add_argument("--weigh-books", action="store_true", help="book tokens by what long context is worth (`weigh`)")
    train.add_argument("--distill", type=float, default=0.0, help="weight of the forward KL to its own full attention")
    train.add_argument("--distill-tokens", type=int, default=8192, help="texts up to so many tokens are distilled")
    train.add_argument("--rank", type=int, default=8, help="of LoRA; 0: all weights are trained, at the rate of LoRA")
    train.add_argument("--targets", nargs="+", default=["attention", "feed_forward"], help="what LoRA updates")
    train.add_argument("--rate", type=float, default=5e-4, help="learning rate of LoRA")
    train.add_argument("--memory-rate", type=float, default=2e-3, help="of the first memory and the memory update")
    train.add_argument("--gate-rate", type=float, default=1e-2, help="of the bias on reading")
    train.add_argument("--dtype", default="bfloat16", help="of the computation; trained values are float32")
    train.add_argument("--evaluate", action=argparse.BooleanOptionalAction, default=True, help="at the end")
    train.add_argument("--rows", type=int, default=80, help="texts of the evaluation")
    train.add_argument("--factors", type=int, nargs="*", default=[10, 100], help="multiples of the trained length")
    train.add_argument("--tail", type=int, default=32, help="blocks at the end in which the memory is ablated")
    train.add_argument("--save-every", type=float, default=60.0, help="seconds")
    train.add_argument("--line-every", type=int, default=10, help="steps between lines of the curve")
    train.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/memory_run"))
    return main


def main(argv=None):
    commands = parser()
    args = commands.parse_args(argv)
    args.random = args.random or args.tiny
    if args.command == "prepare":
        args.data = args.data or pathlib.Path("out/memory")
    elif args.data is None and not args.tiny:
        commands.error("--data must name the folder that `prepare` wrote, or pass --tiny.")
    if args.command == "prepare":
        from examples.smollm2.memory.prepare import prepare as run
    elif args.command == "read":
        from examples.smollm2.memory.read import read as run
    elif args.command == "weigh":
        from examples.smollm2.memory.weigh import weigh as run
    else:
        from examples.smollm2.memory.train import train as run
    return run(args)
