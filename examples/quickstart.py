"""A first look, in less than a minute: two small language models learn to copy symbols over a gap, and stream texts.

A text states two symbols, and asks for them 29 tokens later, while attention reaches back 8 tokens at most. With a
feedback memory the model answers; without one, or with the memory ablated, it guesses. Then a stream reads texts in
pieces, answers from its memory, and reads on for 8,000 tokens with a state of constant size.

    KERAS_BACKEND=jax python -m examples.quickstart
"""

import argparse
import time

import keras
import numpy as np

import keras_fam
from keras_fam.data import TaskBatches
from keras_fam.tasks import Copy, accuracy

BLOCK, BLOCKS, ROWS = 8, 4, 64


def train(task, fam_length, epochs):
    """A language model with `fam_length` rows of memory, trained for `epochs` times 50 steps."""
    keras.utils.set_random_seed(0)
    backbone = keras_fam.TransformerFAMBackbone(
        vocabulary_size=task.vocabulary_size,
        num_layers=1,
        hidden_dim=32,
        num_query_heads=2,
        intermediate_dim=64,
        block_size=BLOCK,
        memory_segments=0,  # attention sees the block of a token, and the memory
        fam_length=fam_length,
        memory_update="normalized",
    )
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.compile(keras.optimizers.Adam(5e-3))
    batches = TaskBatches(task, ROWS, block_size=BLOCK, blocks=BLOCKS, steps_per_epoch=50)
    lm.fit(batches, epochs=epochs, verbose=0)
    return lm


def answers(logits, batch):
    """Share of rows with both symbols right."""
    picked = np.take_along_axis(logits, batch["answer_positions"][..., None], axis=1)
    return accuracy(picked, batch["answers"]).exact


def stream_answers(lm, batch, chunk=4, ablation=None):
    """The same for a text that a stream reads in chunks; the memory is ablated before each one if asked for."""
    stream, logits = keras_fam.StreamingModel(lm, ROWS), []
    for start in range(0, batch["token_ids"].shape[1], chunk):
        if ablation and start:
            stream.set_state(keras_fam.ablate_memory(lm, stream.state, ablation))
        logits.append(stream.predict(batch["token_ids"][:, start : start + chunk]))
    return answers(np.concatenate(logits, axis=1), batch)


def state_bytes(stream):
    """Size of what a stream keeps between calls."""
    return sum(keras.ops.convert_to_numpy(part).nbytes for part in keras.tree.flatten(stream.state))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, help="of 50 steps, for each model")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    task = Copy(length=2, symbols=8)
    test = task.batch(ROWS, total_tokens=BLOCKS * BLOCK, seed=1)
    print(f"{keras.backend.backend()}: {BLOCKS * BLOCK} tokens, a window of {BLOCK}; guessing: {task.chance:.1%}")
    for name, fam_length in (("without memory", 0), ("with 4 rows of memory", 4)):
        lm = train(task, fam_length, args.epochs)
        print(f"{name}: {answers(lm.predict(test['token_ids'], verbose=0), test):.1%} of answers right")
    print(f"as a stream, 4 tokens at a time: {stream_answers(lm, test):.1%}")
    print(f"the same, memory zeroed between chunks: {stream_answers(lm, test, ablation='zeroed'):.1%}")

    stream = keras_fam.StreamingModel(lm, batch_size=2)
    prompts, size = test["token_ids"][:2, :-2], state_bytes(stream)  # without the answers
    stream.predict(prompts)
    generated = stream.generate(max_new_tokens=2, sampler="greedy")
    for prompt, row in zip(prompts.tolist(), generated, strict=True):
        print(f"  {' '.join(map(str, prompt))} → {' '.join(map(str, row))}")
    for text in np.random.default_rng(0).integers(0, task.vocabulary_size, (10, 2, 800)):
        stream.predict(text)
    print(f"state: {size:,} bytes, and after {stream.position[0]:,} tokens {state_bytes(stream):,} bytes")
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
