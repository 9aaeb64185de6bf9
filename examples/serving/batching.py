"""Continuous batching against private streams in turn, and short requests beside a long prompt:

    KERAS_BACKEND=jax python -m examples.serving.batching --out out/batching_jax.json

Both generate the same tokens from the same prompts, greedily, and are compared. An engine reads, chooses, and stores
each session's turn; a private stream (`StreamingModel.generate`, compiled before) does the same sessions one by one and
stores nothing.
"""

import argparse
import json
import pathlib
import statistics
import time

import keras
import numpy as np

import keras_fam
from examples.record import run_record
from keras_fam.serve import Request, SessionEngine, SessionStore

VOCABULARY = 1000


def make_model(width, layers, block_size):
    keras.utils.set_random_seed(0)
    lm = keras_fam.TransformerFAMCausalLM(
        keras_fam.TransformerFAMBackbone(
            VOCABULARY, layers, width, width // 32, 4 * width, block_size=block_size, memory_segments=1, fam_length=8
        )
    )
    lm.build()
    rng = np.random.default_rng(0)
    for variable in lm.weights:  # larger than Keras' own, so that the next token is never nearly a tie
        scale = 1.0 if len(variable.shape) == 1 else 2.0 * variable.shape[0] ** -0.5
        variable.assign(rng.normal(size=variable.shape) * scale)
    return lm


def throughput(lm, sessions, args):
    """Seconds of an engine and of private streams for one turn of each session, and whether their tokens agree."""
    rng = np.random.default_rng(sessions)
    prompts = [rng.integers(0, VOCABULARY, args.prompt).tolist() for _ in range(sessions)]
    store, stream = SessionStore("memory://batching"), keras_fam.StreamingModel(lm, 1)
    times, fill, equal = {"engine": [], "private": []}, [], True
    for _ in range(6):  # after some times, how a stream is reset is compiled
        stream.reset_state()
    with SessionEngine(lm, store, rows=sessions, save_every=10**9) as engine:
        for repeat in range(args.repeats + 1):  # the first one compiles
            before, start = engine.snapshot(), time.perf_counter()
            turns = [
                engine.submit(Request(prompt, args.tokens, session=store.new_name(), create=True)) for prompt in prompts
            ]
            batched = [turn.result() for turn in turns]
            middle = time.perf_counter()
            private = []
            for prompt in prompts:
                stream.reset_state()
                private += stream.generate([prompt], max_new_tokens=args.tokens)
            end, after = time.perf_counter(), engine.snapshot()
            equal = equal and batched == private
            if repeat:
                times["engine"].append(middle - start)
                times["private"].append(end - middle)
                steps, rows = (after[name] - before[name] for name in ("steps", "rows_read"))
                fill.append(rows / steps / sessions)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "sessions": sessions,
        "seconds": times,
        "tokens_per_second": {name: sessions * args.tokens / median for name, median in medians.items()},
        "ratio": medians["private"] / medians["engine"],
        "batch_fill": statistics.mean(fill),
        "equal": equal,
    }


def beside_a_long_prompt(lm, args):
    """Time to the first token of short requests, alone and while another reads a long prompt."""
    rng = np.random.default_rng(0)
    with SessionEngine(lm, rows=4, save_every=10**9) as engine:

        def first_token():
            start = time.perf_counter()
            turn = engine.submit(Request(rng.integers(0, VOCABULARY, 16), 1))
            next(iter(turn))
            return time.perf_counter() - start, turn.steps

        [first_token() for _ in range(3)]
        alone = [first_token() for _ in range(20)]
        engine.submit(Request(rng.integers(0, VOCABULARY, 3000), 1)).result()  # compiles
        start = time.perf_counter()
        long = engine.submit(Request(rng.integers(0, VOCABULARY, args.long), 1))
        beside = []
        while not long.finished:
            beside.append(first_token())
            time.sleep(0.05)
        seconds = time.perf_counter() - start
    beside = beside[:-1]  # the long one may have ended in the last
    return {
        "long_prompt": args.long,
        "long_seconds": seconds,
        "piece": 4 * lm.block_size,
        "piece_seconds": seconds / (args.long / (4 * lm.block_size)),
        "requests": len(beside),
        "first_token_seconds": {
            name: {"median": statistics.median(t for t, _ in found), "largest": max(t for t, _ in found)}
            for name, found in (("alone", alone), ("beside", beside))
        },
        "largest_steps": max(steps for _, steps in beside),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated in a turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long", type=int, default=100_000, help="tokens of the long prompt")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file")
    args = parser.parse_args(argv)
    lm = make_model(args.width, args.layers, args.block_size)
    result = {**run_record("examples.serving.batching", args, argv), "throughput": []}
    print(f"{keras.backend.backend()}, {lm.count_params():,} weights, {args.tokens} tokens a turn")
    for sessions in args.sessions:
        found = throughput(lm, sessions, args)
        result["throughput"].append(found)
        rates = found["tokens_per_second"]
        print(
            f"{sessions:3} sessions: {rates['engine']:7.0f} tokens/s in a batch, {rates['private']:7.0f} in turn, "
            f"ratio {found['ratio']:.2f}, batch fill {found['batch_fill']:.2f}, equal tokens: {found['equal']}"
        )
    found = result["long_prompt"] = beside_a_long_prompt(lm, args)
    seconds = found["first_token_seconds"]
    print(
        f"first token of {found['requests']} short requests beside a prompt of {args.long:,} tokens: "
        f"{seconds['beside']['median']:.3f} s (largest {seconds['beside']['largest']:.3f}), alone "
        f"{seconds['alone']['median']:.3f} s; a piece takes {found['piece_seconds']:.3f} s; at most "
        f"{found['largest_steps']} step(s) of the engine"
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
