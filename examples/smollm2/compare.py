"""The converted SmolLM2 against KerasHub's: the same tokens, the same perplexity, and the speed of reading."""

import json
import time

import keras
import keras_hub
import numpy as np
from keras import ops

import keras_fam
from examples.smollm2.books import HELD_OUT, book_ids
from examples.smollm2.evaluate import log_losses
from examples.smollm2.model import chat, load, stop_tokens
from keras_fam.ops.backend import compiled

QUESTIONS = (
    "What is the capital of France?", "Name three colours of the rainbow.", "Why is the sky blue?",
    "Write one sentence about a dog.", "What do bees make?", "How many days has a week?", "What is photosynthesis?",
    "Who wrote Hamlet?", "What is the opposite of hot?", "Give me a word that rhymes with cat.",
)  # fmt: skip


def answer(args):
    """Prints the answer of the model, as `convert` makes it, to a question."""
    settings = {"block_size": args.block, "memory_segments": args.segments, "fam_length": args.fam}
    lm = keras_fam.hub.convert(load(), weights="share", seed=args.seed, **settings)
    lm.compile(sampler="greedy")
    stream = keras_fam.StreamingModel(lm, 1)
    text = stream.generate(
        chat(args.question), max_new_tokens=64, stop_token_ids=stop_tokens(lm.preprocessor.tokenizer)
    )
    print(text)
    return text


def prompts(tokenizer, ids):
    """Twenty prompts of at most 64 tokens: ten questions, ten passages of the held-out books."""
    found = [tokenizer(chat(question)) for question in QUESTIONS]
    for i in range(10):
        book = ids[HELD_OUT[i % 2]]
        start = (i + 1) * len(book) // 12
        found.append(book[start : start + 64])
    return [[int(token) for token in prompt] for prompt in found]


def greedy(args, source, ids):
    """Of 20 prompts, how many get the same 64 greedy tokens from KerasHub's `generate` and from streams."""
    found = prompts(source.preprocessor.tokenizer, ids)
    width = max(map(len, found)) + 64
    tokens = np.zeros((len(found), width), "int32")
    mask = np.zeros((len(found), width), "int32")
    for i, prompt in enumerate(found):
        tokens[i, : len(prompt)], mask[i, : len(prompt)] = prompt, 1
    preprocessor, source.preprocessor = source.preprocessor, None
    source.compile(sampler="greedy")
    expected = np.asarray(
        source.generate({"token_ids": tokens, "padding_mask": mask}, stop_token_ids=None)["token_ids"]
    )
    source.preprocessor = preprocessor
    same = {}
    for name, memory in (("BSWA", {"fam_length": 0}), ("FAM", {"fam_length": args.fam})):
        lm = keras_fam.hub.convert(source, block_size=256, memory_segments=1, weights="share", **memory)
        new = keras_fam.StreamingModel(lm, len(found)).generate(found, max_new_tokens=64, sampler="greedy")
        same[name] = sum(
            row == expected[i, len(prompt) : len(prompt) + 64].tolist()
            for i, (prompt, row) in enumerate(zip(found, new, strict=True))
        )
        print(f"{name}: {same[name]} of {len(found)} prompts have the same 64 tokens", flush=True)
    return {"prompts": len(found), "block": 256, "longest prompt": max(map(len, found)), "same": same}


def perplexity(args, source, ids, context=1024):
    """Perplexity of KerasHub's model and of the converted one with the same context, one block of `context` tokens."""
    rows = np.stack([ids[title][s : s + context + 1] for title in HELD_OUT for s in (5_000, 50_000)])

    def theirs(inputs, targets):
        inputs = ops.convert_to_tensor(inputs)  # torch takes no mixture of arrays and tensors
        logits = source({"token_ids": inputs, "padding_mask": ops.ones_like(inputs)})
        return source_loss(targets, logits)

    source_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    run = compiled(theirs, lambda: source.variables)
    there = np.concatenate([ops.convert_to_numpy(run(row[None, :-1], row[None, 1:])) for row in rows])
    lm = keras_fam.hub.convert(source, block_size=context, memory_segments=0, fam_length=0, weights="share")
    here = np.concatenate([log_losses(lm, row[None], context) for row in rows])
    found = {"KerasHub": float(np.exp(there.mean())), "converted": float(np.exp(here.mean()))}
    found["relative difference"] = abs(found["converted"] / found["KerasHub"] - 1)
    found["largest difference of a token's loss"] = float(np.abs(there - here).max())
    print(f"context {context}, {there.size} tokens: {found}", flush=True)
    return found


def ready(backbone, tokens):
    """A compiled call of a KerasHub backbone, hidden states of the last token; on JAX it is compiled without a run."""

    def call(tokens):
        tokens = ops.convert_to_tensor(tokens)
        return ops.sum(backbone({"token_ids": tokens, "padding_mask": ops.ones_like(tokens)})[:, -1])

    if keras.backend.backend() == "jax":
        import jax

        def pure(values, tokens):
            with keras.StatelessScope(state_mapping=list(zip(backbone.variables, values, strict=True))):
                return call(tokens)

        values = [v.value for v in backbone.variables]
        program = jax.jit(pure).lower(values, tokens).compile()
        return lambda tokens: float(program(values, tokens))
    run = compiled(call, lambda: backbone.variables)
    run(tokens)
    return lambda tokens: float(ops.convert_to_numpy(run(tokens)))


def speed(args, source, ids, contexts=(2048, 4096, 8192)):
    """Tokens read per second: KerasHub's backbone over a whole context at once, and a stream with the same weights."""
    backbone, book = source.backbone, ids[HELD_OUT[0]]
    lm = keras_fam.hub.convert(
        backbone, block_size=args.block, memory_segments=args.segments, fam_length=args.fam, weights="share", seed=0
    )
    stream, found = keras_fam.StreamingModel(lm, 1), {}

    def read(tokens):
        stream.reset_state()
        for start in range(0, tokens.shape[1], 512):
            stream.predict(tokens[:, start : start + 512])

    read(book[None, :1024])  # compiles the one program of the stream
    for context in contexts:
        tokens = book[None, :context]
        theirs, seconds = ready(backbone, tokens), {}
        for name, call in (("KerasHub", theirs), ("stream", read)):
            began = time.perf_counter()
            call(tokens)
            seconds[name] = time.perf_counter() - began
        found[context] = {name: round(context / s, 1) for name, s in seconds.items()}
        print(f"context {context}: tokens per second {found[context]}", flush=True)
    return found


def compare(args):
    """Runs the comparisons in `args.parts`; writes `compare.json`."""
    source = load()
    ids = book_ids(source.preprocessor.tokenizer, args.out)
    report = args.out / "compare.json"
    record = json.loads(report.read_text()) if report.exists() else {}
    for name, measure in (("greedy", greedy), ("perplexity", perplexity), ("speed", speed)):
        if name in args.parts:
            record[name] = {**measure(args, source, ids), "backend": keras.backend.backend(),
                            "versions": {"keras": keras.__version__, "keras_hub": keras_hub.__version__}}  # fmt: skip
            report.write_text(json.dumps(record, indent=1) + "\n")
    return record
