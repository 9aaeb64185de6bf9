"""Decoding one token at a time: is token 1,000,000 as cheap as token 1,000, and as fast as in a plain Transformer?

    python -m examples.benchmarks.decode --what position,hub,predict --out out/decode.json

position: two streams of one model, at `--near` and `--far` tokens, generate alternately; each is restored to its
    position after every call. Resident memory is recorded on the way to `--far`.
hub: keras_fam against KerasHub's `LlamaCausalLM.generate` with the same sizes, after each of `--contexts` tokens.
    Only decoding is timed: keras_fam reads the context before, KerasHub gets a random cache of that size instead of
    a prefill, since the cost of a decode step does not depend on the contents.
predict: `StreamingModel.predict` of chunks of one block against the compiled step itself, alternately.

All times are medians in one process; JSON is printed, and written to `--out`.
"""

import argparse
import json
import os
import pathlib
from statistics import median
from time import perf_counter

import numpy as np

from examples.record import run_record


def resident_mib():
    """Resident memory of this process; NaN without /proc."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return float("nan")
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def take_turns(functions, repeats):
    """Median of the seconds that functions return, called alternately, in reverse order every second round."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    for i in range(repeats):
        for name in list(functions)[:: 1 if i % 2 == 0 else -1]:
            times[name].append(functions[name]())
    return {name: median(found) for name, found in times.items()}


def timed(function):
    start = perf_counter()
    function()
    return perf_counter() - start


def make_model(args):
    import keras

    import keras_fam

    keras.utils.set_random_seed(args.seed)
    backbone = keras_fam.TransformerFAMBackbone(
        args.vocabulary,
        args.layers,
        args.width,
        args.heads,
        args.intermediate,
        block_size=args.block_size,
        memory_segments=args.memory_segments,
        fam_length=args.fam_length,
        memory_update="normalized",
        tie_weights=False,
    )
    return keras_fam.TransformerFAMCausalLM(backbone)


def read_to(stream, position, args):
    """Reads random tokens up to `position`; resident memory, in MiB, after every chunk."""
    rng = np.random.default_rng(args.seed)
    found = []
    while stream.position[0] < position:
        size = int(min(args.chunk, position - stream.position[0]))
        stream.predict(rng.integers(0, args.vocabulary, (args.batch, size)))
        found.append((int(stream.position[0]), resident_mib()))
    return found


def compile_all(stream):
    """Reads chunks of every padded length, so that nothing is compiled while memory is recorded."""
    for exponent in range(stream.block_size.bit_length()):
        for length in {2**exponent, max(2**exponent - 1, 1)}:  # the program's length, and a shorter one
            stream.reset_state()
            stream.predict(np.zeros((stream.batch_size, length), "int32"))


def generating(stream, args):
    """A function that generates `--new` tokens, restores the stream, and returns the seconds per token."""
    state, logits = stream.get_state(), stream.next_logits

    def run():
        seconds = timed(lambda: stream.generate(max_new_tokens=args.new))
        stream.set_state(state, next_logits=logits)
        return seconds / args.new

    return run


def measure_position(args):
    import keras_fam

    model = make_model(args)
    near, far = (keras_fam.StreamingModel(model, args.batch) for _ in range(2))
    for stream in (near, far):  # everything is compiled before memory is recorded
        compile_all(stream)
        stream.reset_state()
        read_to(stream, args.near, args)
        generating(stream, args)()
    start = perf_counter()
    memory = read_to(far, args.far, args)
    reading = perf_counter() - start
    early = [mib for position, mib in memory if position >= min(10_000 + args.near, args.far)]
    times = take_turns({"near": generating(near, args), "far": generating(far, args)}, args.repeats)
    end = resident_mib()
    return {
        "positions": [int(near.position[0]), int(far.position[0])],
        "ms_per_token_near": 1e3 * times["near"],
        "ms_per_token_far": 1e3 * times["far"],
        "far_over_near": times["far"] / times["near"],
        "reading_tokens_per_second": args.batch * (args.far - args.near) / reading,
        "resident_mib_after_10k": early[0],
        "resident_mib_largest": max(early),
        "resident_mib_at_end": end,
        "resident_growth_percent": 100 * (max(*early, end) / early[0] - 1),
    }


def hub_generating(args, context):
    """KerasHub's `generate` of `--new` tokens after `context` tokens, without its prefill: seconds per token."""
    import keras_hub
    from keras import ops

    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=args.vocabulary,
        num_layers=args.layers,
        num_query_heads=args.heads,
        num_key_value_heads=args.heads,
        hidden_dim=args.width,
        intermediate_dim=args.intermediate,
    )
    model = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    model.compile(sampler="greedy")
    size = context + args.new
    head = args.width // args.heads
    cache = 0.1 * np.random.default_rng(0).normal(size=(args.batch, args.layers, 2, size, args.heads, head))
    cache = ops.convert_to_tensor(cache.astype("float32"))
    model._build_cache = lambda token_ids: (None, cache * 1.0)
    inputs = {
        "token_ids": np.random.default_rng(1).integers(1, args.vocabulary, (args.batch, size)).astype("int32"),
        "padding_mask": np.broadcast_to(np.arange(size) < context, (args.batch, size)).astype("int32"),
    }
    return lambda: timed(lambda: model.generate(inputs, stop_token_ids=None)) / args.new


def measure_hub(args):
    import keras_fam

    found, model = {}, make_model(args)
    for context in args.contexts:
        stream = keras_fam.StreamingModel(model, args.batch)
        read_to(stream, context, args)
        turns = {"keras_fam": generating(stream, args), "keras_hub": hub_generating(args, context)}
        times = take_turns(turns, args.repeats)
        found[str(context)] = {f"{name}_tokens_per_second": args.batch / t for name, t in times.items()} | {
            "keras_fam_over_keras_hub": times["keras_hub"] / times["keras_fam"]
        }
    return found


def measure_predict(args):
    from keras import ops

    import keras_fam
    from keras_fam.ops.backend import compiled

    model = make_model(args)
    stream = keras_fam.StreamingModel(model, args.batch)
    chunk = np.random.default_rng(0).integers(0, args.vocabulary, (args.batch, args.block_size)).astype("int32")
    step = compiled(lambda ids, state: model.advance(ids, state, aligned=True), lambda: model.variables)
    ids, state = ops.convert_to_tensor(chunk), stream.state

    def bare():
        nonlocal state
        outputs, state = step(ids, state)
        ops.convert_to_numpy(outputs)

    predict = {"bare": lambda: timed(bare), "predict": lambda: timed(lambda: stream.predict(chunk))}
    times = take_turns(predict, 10 * args.repeats)
    return {
        "ms_bare_step": 1e3 * times["bare"],
        "ms_predict": 1e3 * times["predict"],
        "ratio": times["predict"] / times["bare"],
    }


MEASUREMENTS = {"position": measure_position, "hub": measure_hub, "predict": measure_predict}


def main(argv=None):
    def numbers(text):
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="position,hub,predict", help=f"of {', '.join(MEASUREMENTS)}")
    parser.add_argument("--near", type=int, default=1_000)
    parser.add_argument("--far", type=int, default=1_000_000)
    parser.add_argument("--contexts", type=numbers, default=[8192, 32768])
    parser.add_argument("--new", type=int, default=64, help="tokens generated by a call")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens read by a call on the way")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--fam-length", type=int, default=16)
    parser.add_argument("--memory-segments", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    args = parser.parse_args(argv)
    what = args.what.split(",")
    if set(what) - set(MEASUREMENTS):
        parser.error(f"--what: {', '.join(MEASUREMENTS)}")
    result = {}
    for name in what:
        result[name] = MEASUREMENTS[name](args)
    result |= run_record("examples.benchmarks.decode", args, argv)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
