"""Pre-trains a small language model on novels, the Bible and Python's documentation, without a memory; resumable.

What it leaves is a folder such as `examples.smollm2.memory prepare` writes, so that memories are trained into the small
model by the same command as into SmolLM2.
"""

import functools
import json
import time

import keras
import numpy as np

import keras_fam
from examples.datasets.austen import austen, chapters
from examples.datasets.king_james import king_james
from examples.datasets.python_docs import topics_text
from examples.smollm2.books import HELD_OUT, TRAINING, plain
from examples.smollm2.memory import batches
from examples.smollm2.memory.learner import Learner
from examples.smollm2.memory.prepared import WEIGHTS, Prepared, arrays_of, assign
from keras_fam.utils.atomic import replace_file


def pretrain(args):
    """Trains for `args.minutes`, or `args.steps` steps; a later call continues. Returns the record."""
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "texts.npz").exists():
        write_texts(args)
    (args.out / "config.json").write_text(json.dumps(config_of(args), indent=1) + "\n")
    prepared = Prepared(args.out)
    keras.utils.set_random_seed(args.seed)
    settings = {"block_size": args.context, "memory_segments": 0, "fam_length": 0}
    lm = keras_fam.TransformerFAMCausalLM(keras_fam.TransformerFAMBackbone(**{**prepared.config, **settings}))
    lm.build()
    record = {"steps": 0, "seconds": 0.0, "curve": []}
    if (args.out / "pretraining.json").exists():
        record = json.loads((args.out / "pretraining.json").read_text())
        assign(lm.backbone, prepared.arrays())  # Adam's moments are not kept
    learner = Learner(lm, {"weights": args.rate})
    train(learner, prepared, record, args)
    return record


def train(learner, prepared, record, args):
    began, before, saved, left = time.perf_counter(), record["seconds"], time.perf_counter(), 60 * args.minutes
    program, seconds = learner.compile(args.rows, args.context, args.context)
    print(f"{args.rows} texts of {args.context} tokens a step; compiled in {seconds:.0f} s", flush=True)
    tasks = make_task(prepared, args)
    ahead = batches.Ahead(functools.partial(draw, tasks, prepared, args), record["steps"])
    test = [draw(tasks, prepared, args, -1 - number, "held_out") for number in range(4)]
    until = record["steps"] + args.steps
    while time.perf_counter() - began < left and record["steps"] < until:
        passed = (time.perf_counter() - began) / left
        learner.step(program, ahead.get(), min(1.0, (learner.steps + 1) / 50, (1 - passed) / 0.5))
        record["steps"] += 1
        if record["steps"] % 50 == 0 or record["steps"] == until or time.perf_counter() - began >= left:
            line = {"step": record["steps"], **measure(learner, test)}
            record["seconds"] = round(before + time.perf_counter() - began, 1)
            record["curve"].append({**line, "seconds": record["seconds"]})
            print(f"[{record['seconds']:6.1f} s] {line}", flush=True)
        if time.perf_counter() - saved > 60:
            save(learner, record, args)
            saved = time.perf_counter()
    ahead.stop()
    save(learner, record, args)


def make_task(prepared, args):
    """Texts within the context: most are books, some ask for what they state, as texts for pre-training do."""
    short = [batches.SHORT_NEEDLE]
    if args.mixture == "standard":
        short += [keras_fam.tasks.KeyValue(pairs=2), keras_fam.tasks.WhoIsWhere(1, events=4)]
    mixture = [(keras_fam.tasks.Book(), 1 - args.asked), *((kind, args.asked / len(short)) for kind in short)]
    options = {"held_out": prepared.held_out, "min_distance": 0, "early": 0.0, "again": 0.0}
    return keras_fam.tasks.ProseTask(prepared.train, prepared.tokenizer, mixture, **options)


def draw(task, prepared, args, number, split="train"):
    """A `Batch` whose loss is on every token, `args.answer_weight` times on the answers."""
    rng, rows, tokens = np.random.default_rng([args.seed, abs(number), number < 0]), args.rows, args.context
    texts = [task.text(tokens + 1, seed=rng, split=split) for _ in range(rows)]
    ids = np.stack([text.token_ids for text in texts])
    answer = np.zeros((rows, tokens), bool)
    for row, text in enumerate(texts):
        for found in text.answers:
            answer[row, found.start - 1 : found.stop - 1] = True
    positions = np.tile(np.arange(tokens, dtype="int32"), (rows, 1))
    weights = np.where(answer, args.answer_weight, 1.0).astype("float32")
    names = [text.answers[-1].name if text.answers else "" for text in texts]
    return batches.Batch(ids[:, :-1], positions, ids[:, 1:], weights, answer, names)


def measure(learner, test):
    """Nats a token of held-out books and of answers, and the share of answers that are right token for token."""
    nats, right, asked = [], [], []
    for batch in test:
        _, (found, hits) = learner.evaluate(*batch[:4])
        found, hits = np.asarray(found), np.asarray(hits)
        books = [row for row, name in enumerate(batch.names) if not name]
        nats.append(found[books].mean() if books else np.nan)
        right += [bool(hits[row][batch.answer[row]].all()) for row, name in enumerate(batch.names) if name]
        asked += [found[row][batch.answer[row]].mean() for row, name in enumerate(batch.names) if name]
    means = {"nats": nats, "answer nats": asked, "answers": right}
    return {name: round(float(np.nanmean(values or [np.nan])), 4) for name, values in means.items()}


def save(learner, record, args):
    learner.assign()
    with replace_file(args.out / WEIGHTS) as file:
        file.write(arrays_of(learner.lm.backbone))
    with replace_file(args.out / "pretraining.json") as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def config_of(args):
    """Settings of the model, as `hub.convert` would read them from a Llama of that size."""
    return {
        "vocabulary_size": args.vocabulary,
        "num_layers": args.layers,
        "hidden_dim": args.width,
        "num_query_heads": args.width // 32,
        "num_key_value_heads": args.width // 32,
        "head_dim": 32,
        "intermediate_dim": int(8 / 3 * args.width) // 32 * 32,
        "norm_epsilon": 1e-5,
    }


def write_texts(args):
    """A byte-pair tokenizer of the training texts, and all texts as token ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    novels = austen(args.out.parent / "austen")
    texts = {title: "\n\n".join(plain(chapter) for chapter in chapters(lines)) for title, lines in novels.items()}
    bible = list(king_james(args.out.parent / "king_james").values())
    train = [*(texts[title] for title in TRAINING), *bible, *topics_text()]
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one, as SmolLM2 has them.
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=args.vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(train, trainer)
    tokenizer.save(str(args.out / "tokenizer.json"))
    arrays = {}
    for name, part in (("train", train), ("held_out", [texts[title] for title in HELD_OUT])):
        prose = keras_fam.tasks.Prose.from_texts(part, tokenizer)
        arrays |= {f"{name}_ids": prose.token_ids.astype("uint16"), f"{name}_gaps": prose.gaps.astype("int32")}
        print(f"{name}: {len(prose):,} tokens", flush=True)
    np.savez_compressed(args.out / "texts.npz", stream=arrays["held_out_ids"], **arrays)
