"""What an option of the layers costs: prefill and decoding of one model with two or more of its values, in turns.

    KERAS_BACKEND=jax python -m examples.benchmarks.option attention_sinks 0 4 --out out/sinks_jax.json
    KERAS_BACKEND=torch python -m examples.benchmarks.option fam_length 0 16

Values are read as JSON, or as strings. Printed are medians of seconds, and their ratios to those of the first value.
"""

import argparse
import json
import pathlib

import keras
import numpy as np

import keras_fam
from examples.benchmarks.measuring import cpu_name, take_turns, write
from examples.record import run_record


def value(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("option", help="a keyword of TransformerFAMBackbone")
    parser.add_argument("values", nargs="+", type=value)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--memory-segments", type=int, default=1)
    parser.add_argument("--fam-length", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the prefill")
    parser.add_argument("--new", type=int, default=128, help="tokens that are decoded, one by one")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    return parser


def make_model(args, setting):
    keras.utils.set_random_seed(args.seed)
    settings = {
        "block_size": args.block_size,
        "memory_segments": args.memory_segments,
        "fam_length": args.fam_length,
        "memory_update": "normalized",
        args.option: setting,
    }
    sizes = (args.vocabulary, args.layers, args.width, args.heads, 4 * args.width)
    return keras_fam.TransformerFAMCausalLM(keras_fam.TransformerFAMBackbone(*sizes, **settings))


def functions(args, setting):
    """`(prefill, decode)` of one model: functions without arguments, after which its streams stand as before."""
    lm = make_model(args, setting)
    reading, writing = keras_fam.StreamingModel(lm, 1), keras_fam.StreamingModel(lm, 1)
    tokens = np.random.default_rng(args.seed).integers(0, args.vocabulary, (1, args.tokens))

    def prefill():
        reading.reset_state()
        reading.predict(tokens)

    writing.predict(tokens[:, : 3 * args.block_size])
    state, logits = writing.get_state(), writing.next_logits

    def decode():
        writing.generate(max_new_tokens=args.new, sampler="greedy")
        writing.set_state(state, next_logits=logits)

    return prefill, decode


def main(argv=None):
    args = parser().parse_args(argv)
    made = {str(setting): functions(args, setting) for setting in args.values}
    result = {**run_record("examples.benchmarks.option", args, argv), "cpu": cpu_name()}
    for i, (name, tokens) in enumerate((("prefill", args.tokens), ("decode", args.new))):
        times = take_turns({setting: pair[i] for setting, pair in made.items()}, args.repeats)
        first = times[str(args.values[0])]
        for setting, found in times.items():
            found["ratio"] = found["median"] / first["median"]
            found["ratio of the least"] = found["min"] / first["min"]
            print(
                f"{name}, {args.option}={setting}: {found['median']:.3f} s, {tokens / found['median']:.0f} tokens/s, "
                f"{found['ratio']:.3f} times ({found['ratio of the least']:.3f} for the least of each)",
                flush=True,
            )
        result[name] = times
    write(result, args.out)


if __name__ == "__main__":
    main()
