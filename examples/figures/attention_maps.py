"""Fig. 11 and Fig. 4: what a trained TransformerFAM looks at, over the blocks of a PassKey text.

Takes a model that `passkey_systems.py` trained (and trains it if it is not there), reads a held-out text block by block
and draws, layer by layer, what memory rows take from the text and what its tokens take from the memory; the same as an
animation over time; and the memory's size, drift and effective rank over a long text.

    python examples/figures/attention_maps.py --backend jax --seed 0 --out out/passkey_systems
"""

import json

import keras
import numpy as np
import passkey_systems as systems  # reads the options and chooses the backend

import keras_fam
from keras_fam.evaluation import visualize

ARGS, NAME, SHOWN_BLOCKS, LONG_BLOCKS = systems.ARGS, "FAM_N", 6, 528


def marked_text(task, blocks):
    """One held-out text: tokens `[1, T]`, their words, and where the key and the question stand."""
    batch = task.batch(1, total_tokens=blocks * ARGS.block_size, seed=ARGS.seed + 5, split="held_out")
    tokens = batch["token_ids"]
    digits = np.flatnonzero(np.isin(tokens[0], task.tokenizer.digit_ids))
    words = [task.tokenizer.vocabulary[i] for i in tokens[0]]
    first = int(batch["answer_positions"][0, 0])
    question = np.arange(first - len(task.tokenizer.encode(systems.passkey.QUESTION)) + 1, first + 1)
    return tokens, words, {"key": digits[: 2 * ARGS.digits], "question": question, "answer": digits[2 * ARGS.digits :]}


def main():
    ARGS.out.mkdir(parents=True, exist_ok=True)
    task = systems.make_task()
    path = ARGS.out / f"{NAME}.keras"
    if not path.exists():
        systems.run(NAME, task)
    model = keras.saving.load_model(path, compile=False)
    tokens, words, highlights = marked_text(task, SHOWN_BLOCKS)
    maps = visualize.attention_maps(model, tokens)
    visualize.plot_attention_maps(maps, highlights=highlights).savefig(ARGS.out / "attention_maps.png", dpi=90)
    visualize.animate_attention(maps, ARGS.out / "attention.gif", words, layer=0)
    long_text = task.batch(8, total_tokens=LONG_BLOCKS * ARGS.block_size, seed=ARGS.seed, split="held_out")["token_ids"]
    statistics = {}
    for name in (NAME, "FAM"):
        path = ARGS.out / f"{name}.keras"
        if path.exists():
            model = keras.saving.load_model(path, compile=False)
            statistics[name] = keras_fam.memory_statistics(model, long_text)
            visualize.plot_memory_statistics(statistics[name]).savefig(ARGS.out / f"memory_{name}.png", dpi=80)
    last = {name: {k: [layer[-1] for layer in s[k]] for k in list(s)[1:]} for name, s in statistics.items()}
    print(json.dumps(last, indent=1))


if __name__ == "__main__":
    main()
