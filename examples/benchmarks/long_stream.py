"""Streams a million tokens: peak resident memory after the first `--early` tokens and at the end, time of the first and
of the last chunks, and of the second half against the first (all after `--early`).

    KERAS_BACKEND=jax python -m examples.benchmarks.long_stream --tokens 1000000 --out out/long_stream.json
"""

import argparse
import json
import pathlib
import resource
import time

import keras
import numpy as np

import keras_fam
from examples.record import run_record


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--fam-length", type=int, default=16)
    parser.add_argument("--memory-segments", type=int, default=1)
    parser.add_argument("--early", type=int, default=10_000, help="tokens after which memory and time are recorded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    args = parser.parse_args(argv)
    keras.utils.set_random_seed(args.seed)
    backbone = keras_fam.TransformerFAMBackbone(
        256,
        args.layers,
        args.width,
        4,
        2 * args.width,
        block_size=args.block_size,
        memory_segments=args.memory_segments,
        fam_length=args.fam_length,
        memory_update="normalized",
    )
    model = keras_fam.TransformerFAMCausalLM(backbone)
    stream = keras_fam.StreamingModel(model, batch_size=1)
    rng = np.random.default_rng(args.seed)
    seconds, peaks, early = [], [], None
    while stream.position[0] < args.tokens:
        chunk = rng.integers(0, 256, (1, args.chunk))
        started = time.perf_counter()
        logits = stream.predict(chunk)
        seconds.append(time.perf_counter() - started)
        if early is None and stream.position[0] >= args.early:
            early = peak_mib()
        peaks.append(peak_mib())
    assert np.isfinite(logits).all()
    warm = [s for s, n in zip(seconds, np.arange(len(seconds)), strict=True) if n * args.chunk >= args.early]
    tenth = max(1, len(warm) // 10)
    first, last = float(np.median(warm[:tenth])), float(np.median(warm[-tenth:]))
    half = len(warm) // 2
    halves = sum(warm[-half:]) / sum(warm[:half])
    result = {
        "tokens": int(stream.position[0]),
        "peak_mib_early": early,
        "peak_mib_at_end": peaks[-1],
        "growth_percent": 100 * (peaks[-1] / early - 1),
        "chunk_ms_first_tenth": 1e3 * first,
        "chunk_ms_last_tenth": 1e3 * last,
        "time_ratio": last / first,
        "second_half_over_first": halves,
        "tokens_per_second": args.chunk * len(warm) / sum(warm),
        **run_record("examples.benchmarks.long_stream", args, argv),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
