"""A laboratory for memories on pre-trained models that fits a few CPU cores.

    python -m examples.laboratory pretrain --minutes 60
    python -m examples.laboratory compare --memories layer_inputs anchored --seeds 0 1 2 --minutes 20
    python -m examples.laboratory attention --memories layer_inputs anchored

`pretrain` trains a small language model, with a byte-pair vocabulary of its own, on four novels, the King James Bible
and Python's documentation; a later call continues. With `--asked 1 --answer-weight 100 --context 64 --rows 48` such a
call teaches it to answer for what stands within the window, before it gets a memory. `compare` then trains each memory
into it, with all weights, and asks for needles in held-out novels; what is done is kept. `attention` shows which layers
read the memory. `--more` passes options on to `python -m examples.smollm2.memory train`, such as `--more=--rank=8` for
LoRA.
"""

import argparse
import pathlib


def parser():
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(dest="command", required=True)
    pretrain = commands.add_parser("pretrain", help="the small language model; resumes")
    pretrain.add_argument("--layers", type=int, default=4)
    pretrain.add_argument("--width", type=int, default=256, help="a multiple of 32, the width of a head")
    pretrain.add_argument("--vocabulary", type=int, default=4096)
    pretrain.add_argument("--context", type=int, default=128, help="tokens of a text")
    pretrain.add_argument("--rows", type=int, default=24, help="texts of a step")
    pretrain.add_argument("--asked", type=float, default=0.3, help="share of texts that ask for what they state")
    pretrain.add_argument("--answer-weight", type=float, default=3.0, help="of the loss on answers; 1 on other tokens")
    pretrain.add_argument("--mixture", choices=["needle", "standard"], default="needle", help="what they ask for")
    pretrain.add_argument("--rate", type=float, default=2e-3)
    compare = commands.add_parser("compare", help="memories, trained into it")
    attention = commands.add_parser("attention", help="how much of it trained memories get")
    for command in (compare, attention):
        command.add_argument("--memories", nargs="+", metavar="MEMORY", default=["layer_inputs", "anchored"])
        command.add_argument("--mixture", default="city", help="what is asked for, as in `memory train`")
        command.add_argument("--seeds", type=int, nargs="+", default=[0])
        command.add_argument("--more", action="append", default=[], metavar="OPTION", help="for each training")
    for command in (pretrain, compare):
        command.add_argument("--minutes", type=float, default=20.0, help="of training")
    for command in (pretrain, compare, attention):
        command.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/laboratory"))
    pretrain.add_argument("--steps", type=int, default=1_000_000, help="of this call at most")
    pretrain.add_argument("--seed", type=int, default=0)
    return main


def main(argv=None):
    args = parser().parse_args(argv)
    if args.command == "pretrain":
        from examples.laboratory.pretrain import pretrain as run
    elif args.command == "compare":
        from examples.laboratory.compare import compare as run
    else:
        from examples.laboratory.attention import attention as run
    return run(args)


if __name__ == "__main__":
    main()
