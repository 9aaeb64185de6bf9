"""What a memory takes in and what it gives back, in a model that was trained on PassKey.

Takes a model of `examples.passkey.systems` (and trains it if it is not in `--out`), reads a held-out text block by
block, and draws for every layer which tokens each memory row attends to and which memory rows each token attends to;
the same as an animation over time; and the memory's size, drift and effective rank over a long text.

    KERAS_BACKEND=jax python -m examples.figures.attention_maps --seed 0 --out out/passkey_systems
"""

import json

import keras
import numpy as np

import keras_fam
from examples.passkey import systems
from examples.passkey.demo import make_task
from keras_fam.evaluation import visualize
from keras_fam.tasks.passkey import QUESTION

NAME, SHOWN_BLOCKS, LONG_BLOCKS = "FAM_N", 6, 528


def marked_text(task, blocks, args):
    """One held-out text: tokens `[1, T]`, their words, and the positions of the key, the question and the answer."""
    batch = task.batch(1, total_tokens=blocks * args.block_size, seed=args.seed + 5, split="held_out")
    tokens = batch["token_ids"]
    digits = np.flatnonzero(np.isin(tokens[0], task.tokenizer.digit_ids))
    words = [task.tokenizer.vocabulary[i] for i in tokens[0]]
    first = int(batch["answer_positions"][0, 0])
    question = np.arange(first - len(task.tokenizer.encode(QUESTION)) + 1, first + 1)
    return tokens, words, {"key": digits[: 2 * args.digits], "question": question, "answer": digits[2 * args.digits :]}


def main(argv=None):
    args = systems.parser(__doc__).parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    task = make_task(args)
    path = args.out / f"{NAME}.keras"
    if not path.exists():
        systems.run(NAME, task, args)
    model = keras.saving.load_model(path, compile=False)
    tokens, words, highlights = marked_text(task, SHOWN_BLOCKS, args)
    maps = visualize.attention_maps(model, tokens)
    visualize.plot_attention_maps(maps, highlights=highlights).savefig(args.out / "attention_maps.png", dpi=90)
    visualize.animate_attention(maps, args.out / "attention.gif", words, layer=0)
    long_text = task.batch(8, total_tokens=LONG_BLOCKS * args.block_size, seed=args.seed, split="held_out")["token_ids"]
    statistics = {}
    for name in (NAME, "FAM"):
        path = args.out / f"{name}.keras"
        if path.exists():
            model = keras.saving.load_model(path, compile=False)
            statistics[name] = keras_fam.memory_statistics(model, long_text)
            visualize.plot_memory_statistics(statistics[name]).savefig(args.out / f"memory_{name}.png", dpi=80)
    last = {name: {k: [layer[-1] for layer in s[k]] for k in list(s)[1:]} for name, s in statistics.items()}
    print(json.dumps(last, indent=1))


if __name__ == "__main__":
    main()
