"""What long context is worth to each token of the training prose: the weights of `train --weigh-books`."""

import jax
import jax.numpy as jnp
import numpy as np

import keras_fam
from examples.smollm2.memory.prepared import WORTH, Prepared, build, read_config
from examples.smollm2.memory.read import reader


def token_nats(prepared, args, segments, tokens):
    """float64 `[tokens]`: −log p of tokens 1, 2, … of the training prose, by the model without memory."""
    size = args.chunk * args.block
    changes = {"fam_length": 0, "memory_segments": segments, "scan_layers": True, "blocks_per_step": args.chunk}
    config = read_config(prepared, args, **changes)
    lm = build(prepared, config, dtype=args.dtype, seed=args.seed, random=args.random)
    run, state, found = reader(lm, size), lm.get_initial_state(1), []
    for start in range(0, tokens, size):
        nats, state = run(jnp.asarray(prepared.train.token_ids[None, start : start + size + 1]), state)
        found.append(nats)
        if start // size % 64 == 63:
            jax.block_until_ready(nats)
            print(f"{(segments + 1) * args.block} tokens of window: {start + size:,} of {tokens:,} tokens", flush=True)
    return np.concatenate([np.asarray(nats, "float64") for nats in found])


def weigh(args):
    """Reads the training prose twice, with the window of the command and with one of `--long` tokens; writes weights.

    Both have attention sinks and no memory. The first token and those behind `--tokens` get weight 1.

    Returns:
        float32 `[N]`, the weights.
    """
    prepared, size = Prepared(args.data), args.chunk * args.block
    count = len(prepared.train)
    tokens = (min(args.tokens or count, count) - 1) // size * size
    if not tokens:
        raise ValueError(f"At least {size + 1} tokens are read at once. Received: {count} tokens of prose")
    long = max(args.segments + 1, args.long // args.block) - 1
    nats = [token_nats(prepared, args, segments, tokens) for segments in (args.segments, long)]
    weights = np.ones(count, "float32")
    weights[1 : tokens + 1] = keras_fam.data.long_context_weights(*nats)
    folder = args.data if args.out is None else args.out
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / WORTH, weights=weights.astype("float16"))
    gain = float((nats[0] - nats[1]).mean())
    print(f"{folder / WORTH}: a window of {(long + 1) * args.block} tokens is worth {gain:.4f} nats a token")
    return weights
