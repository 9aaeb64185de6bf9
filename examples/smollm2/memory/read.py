"""The untrained model over one text of two million tokens: perplexity by ten thousand tokens, FAM beside BSWA."""

import functools
import json
import time

import jax
import jax.numpy as jnp
import keras
import numpy as np

from examples.smollm2.memory.prepared import Prepared, build, read_config

EACH = 10_000  # tokens of one figure
SYSTEMS = {"FAM": {}, "BSWA, 4 sinks": {"fam_length": 0}, "BSWA": {"fam_length": 0, "attention_sinks": 0}}


def reader(lm, size):
    """A compiled function of `[1, size + 1]` token ids and a state: nats `[size]` and the state."""
    variables, backbone = lm.variables, lm.backbone

    def run(values, ids, state):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            hidden, state = backbone.advance(ids[:, :-1], state, aligned=True)
            table = backbone.token_embedding.embeddings.value

            def nats(part):  # a piece of the tokens at a time: logits are large
                hidden, targets = part
                logits = jnp.einsum("td,vd->tv", hidden, table, preferred_element_type="float32")
                chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
                return jax.nn.logsumexp(logits, axis=-1) - chosen

            block = backbone.block_size
            parts = hidden[0].reshape(size // block, block, -1), ids[0, 1:].reshape(-1, block)
            return jax.lax.map(nats, parts).reshape(-1), state

    return functools.partial(jax.jit(run), [v.value for v in variables])


def read(args):
    """Reads `args.tokens` tokens (0: all) with every system of `args.systems`; writes `read.json`."""
    prepared, found = Prepared(args.data), {}
    size = args.chunk * args.block
    tokens = min(args.tokens or len(prepared.stream), len(prepared.stream)) - 1
    tokens = tokens // size * size
    args.out.mkdir(parents=True, exist_ok=True)
    for system in args.systems:
        changes = {**SYSTEMS[system], "scan_layers": True, "blocks_per_step": args.chunk}
        lm = build(
            prepared, read_config(prepared, args, **changes), dtype=args.dtype, seed=args.seed, random=args.random
        )
        run, state, losses = reader(lm, size), lm.get_initial_state(1), []
        started = time.perf_counter()
        for start in range(0, tokens, size):
            nats, state = run(jnp.asarray(prepared.stream[None, start : start + size + 1]), state)
            losses.append(nats)
            if start // size % 32 == 31 or start + size >= tokens:
                jax.block_until_ready(nats)
                seconds = time.perf_counter() - started
                print(f"{system}: {start + size:,} tokens in {seconds:.0f} s", flush=True)
        losses = np.concatenate([np.asarray(x, "float64") for x in losses])
        whole = losses[: len(losses) // EACH * EACH].reshape(-1, EACH)
        perplexity = [round(float(x), 3) for x in np.exp(whole.mean(1))]
        found[system] = {"tokens": tokens, "seconds": round(time.perf_counter() - started, 1)}
        found[system] |= {"perplexity": float(np.exp(losses.mean())), "perplexity by ten thousand tokens": perplexity}
        sizes = [float(jnp.sqrt(jnp.mean(jnp.square(layer.fam)))) for layer in state.layers if np.size(layer.fam)]
        found[system]["memory RMS at the end"] = [round(x, 3) for x in sizes]
        compare(found)
        record = {"device": jax.local_devices()[0].device_kind, "dtype": args.dtype, "block": args.block}
        record |= {"segments": args.segments, "fam": args.fam, "seed": args.seed, "systems": found}
        (args.out / "read.json").write_text(json.dumps(record, indent=1) + "\n")
    return found


def compare(found):
    """Adds and prints the ratios of FAM's perplexities to those of BSWA with sinks."""
    fam, other = (found.get(name) for name in ("FAM", "BSWA, 4 sinks"))
    if fam is None or other is None or "over BSWA, 4 sinks" in fam:
        return
    key = "perplexity by ten thousand tokens"
    ratios = [a / b for a, b in zip(fam[key], other[key], strict=True)] or [fam["perplexity"] / other["perplexity"]]
    fam["over BSWA, 4 sinks"] = {"least": min(ratios), "most": max(ratios)}
    print(f"FAM over BSWA with 4 sinks: {min(ratios):.4f} to {max(ratios):.4f} times the perplexity", flush=True)
