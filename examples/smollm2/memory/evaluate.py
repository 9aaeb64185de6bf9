"""What the memory holds in held-out novels: needles at multiples of the trained length, and the text itself.

Each text is read once. Its last blocks are read several times over: as they are, with the gate closed, with the memory
zeroed, with another text's memory, and with its own of eight blocks ago, before every block. So late an ablation leaves
what tokens before took from the memory; `--tail` blocks later, little of that is left in the window. `base` is the
model before training, without memory: a window of the same size with attention sinks.
"""

import contextlib
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from keras import ops

import keras_fam
from examples.long_context.systems import DELAY, memory_of, with_memory
from examples.smollm2.memory import batches
from examples.smollm2.memory.learner import compile_program
from keras_fam.evaluation.ablation import ablate_state, derangement
from keras_fam.layers.chunk_attention import closed_memory

SYSTEMS = ("memory", "closed", "zeroed", "other", "ago", "base")  # "memory" comes first: "ago" reads what it kept
TEXT_SECONDS = 15  # kept for the text
KINDS = (
    keras_fam.tasks.Needle(),
    keras_fam.tasks.Needle(count=3),
    keras_fam.tasks.KeyValue(),
    keras_fam.tasks.WhoIsWhere(1),
    keras_fam.tasks.WhoIsWhere(2),
)


class Reader:
    """Compiled programs that read a few blocks of `rows` texts. They are made at once, in any thread.

    Args:
        learner: `Learner`.
        rows: int, B.
        chunk: int, blocks read at a time where nothing is ablated.
    """

    def __init__(self, learner, rows, chunk):
        self.learner, self.rows, self.chunk = learner, rows, chunk
        backbone = self.backbone = learner.lm.backbone
        self.block = backbone.block_size
        values, _, fixed = learner.specs
        state = jax.eval_shape(self._initial, values, fixed)
        ids, order = (jax.ShapeDtypeStruct(shape, "int32") for shape in ((rows, self.block), (rows,)))
        many = jax.ShapeDtypeStruct((rows, chunk * self.block), "int32")
        hidden = jax.ShapeDtypeStruct((rows, self.block, backbone.hidden_dim), backbone.compute_dtype)

        def program(function, *specs, **options):
            return compile_program(jax.jit(functools.partial(function, **options)), *specs)

        self._initial_state = program(self._initial, values, fixed)
        self._read = {
            chunk: program(self._advance, values, fixed, many, state, closed=False),
            1: program(self._advance, values, fixed, ids, state, closed=False),
        }
        self._closed = program(self._advance, values, fixed, ids, state, closed=True)
        self._ablate = {
            how: program(self._ablated, values, fixed, state, order, how=how) for how in ("zeroed", "shuffled")
        }
        self._nats = program(self._nats_of, values, fixed, hidden, ids)

    def _initial(self, values, fixed):
        with self.learner.scope(values, fixed):
            return self.backbone.get_initial_state(self.rows)

    def _advance(self, values, fixed, ids, state, *, closed):
        with self.learner.scope(values, fixed), closed_memory() if closed else contextlib.nullcontext():
            return self.backbone.advance(ids, state, aligned=True)

    def _ablated(self, values, fixed, state, order, *, how):
        return ablate_state(state, how, self._initial(values, fixed), order)

    def _nats_of(self, values, fixed, hidden, targets):
        logits = self.learner.logits(values, fixed, hidden)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    def values(self, base=False):
        """The trained values, or those before training: SmolLM2's own."""
        return self.learner.initial if base else self.learner.values

    def start(self, base=False):
        return self._initial_state(self.values(base), self.learner.fixed)

    def read(self, ids, state):
        """The state after `ids` `[B, n · S]`."""
        size = self.chunk * self.block
        whole = ids.shape[1] // size * size
        pieces = [(start, size) for start in range(0, whole, size)]
        pieces += [(start, self.block) for start in range(whole, ids.shape[1], self.block)]
        for start, length in pieces:
            part = jnp.asarray(ids[:, start : start + length])
            _, state = self._read[length // self.block](self.values(), self.learner.fixed, part, state)
        return state

    def blocks(self, ids, state, system, rng):
        """Yields the hidden states of one block of `ids` after the other, read by a system."""
        how, base = {"zeroed": "zeroed", "other": "shuffled"}.get(system), system == "base"
        values, fixed = self.values(base), self.learner.fixed
        if system == "memory":
            self._memories = []  # what each block read
        run = self._closed if base or system == "closed" else self._read[1]
        for start in range(0, ids.shape[1], self.block):
            if how:
                order = derangement(self.rows, rng) if how == "shuffled" else np.zeros(self.rows, "int32")
                state = self._ablate[how](values, fixed, state, jnp.asarray(order))
            elif system == "memory":
                self._memories.append(memory_of(state))
            elif system == "ago":
                state = with_memory(state, self._memories[max(start // self.block - DELAY, 0)])
            hidden, state = run(values, fixed, jnp.asarray(ids[:, start : start + self.block]), state)
            yield hidden

    def nats(self, hidden, targets, base=False):
        """float32 `[B, S]`."""
        return np.asarray(self._nats(self.values(base), self.learner.fixed, hidden, jnp.asarray(targets)))


def make_texts(training, rows, tokens, seed):
    """`[B, tokens]`, and the name and the last answer of each row; kinds take turns."""
    texts = []
    for row in range(rows):
        kinds = batches.ASKED.get(training.args.mixture, KINDS)
        task = batches.make_task(training.prepared, training.args, mixture=kinds[row % len(kinds)], again=0.0)
        texts.append(task.text(tokens, seed=(seed, row), split="held_out"))
    return np.stack([text.token_ids for text in texts]), [text.answers[-1] for text in texts]


def needles(training, reader, blocks, seed):
    """Which answers each system gives to texts of so many blocks; a dict for the record."""
    block, rows, tail = reader.block, reader.rows, min(training.args.tail, blocks)
    ids, answers = make_texts(training, rows, blocks * block, seed)
    started, head = time.perf_counter(), (blocks - tail) * block
    state = jax.block_until_ready(reader.read(ids[:, :head], reader.start()))
    seconds = time.perf_counter() - started
    right = {}
    for system in SYSTEMS:
        begin, tokens = state, ids[:, head:]
        if system == "base":  # its window forgets: the first block, for its sinks, and as many at the end say all
            begin = reader.start(base=True)
            tokens = np.concatenate([ids[:, :block], ids[:, head:][:, block if not head else 0 :]], axis=1)
        *_, hidden = reader.blocks(tokens, begin, system, np.random.default_rng(seed))
        right[system] = answered(reader, hidden, ids, answers, system == "base")
    names = [answer.name for answer in answers]
    found = {"blocks": blocks, "tokens": blocks * block, "seconds": round(seconds, 1), "exact": {}}
    found["memory RMS"] = [round(float(ops.sqrt(ops.mean(ops.square(layer.fam)))), 3) for layer in state.layers]
    for name in sorted({*names}):
        chosen = [i for i, other in enumerate(names) if other == name]
        found["exact"][name] = {system: [int(right[system][i]) for i in chosen] for system in SYSTEMS}
        found["exact"][name]["distances"] = [answers[i].distance for i in chosen]
    return found, head * rows / max(seconds, 1e-9)


def answered(reader, hidden, ids, answers, base):
    """Whether each row's last answer, which lies in the last block, is predicted token for token."""
    first = ids.shape[1] - reader.block
    longest = max(answer.stop - answer.start for answer in answers)
    positions = np.stack([np.arange(answer.start - 1, answer.start - 1 + longest) - first for answer in answers])
    positions = np.clip(positions, 0, reader.block - 1)
    chosen = jnp.take_along_axis(hidden, jnp.asarray(positions)[..., None], axis=1)
    logits = reader.learner.logits(reader.values(base), reader.learner.fixed, chosen)
    predicted = np.asarray(jnp.argmax(logits, axis=-1))
    return [
        bool((predicted[row, : a.stop - a.start] == ids[row, a.start : a.stop]).all()) for row, a in enumerate(answers)
    ]


def text_nats(training, reader, blocks, skip):
    """Nats a token of held-out prose behind the first `skip` blocks: each system, and its difference to `memory`."""
    rng, size, prose = np.random.default_rng(5), blocks * reader.block, training.prepared.held_out
    ids = np.stack([prose.window(rng, size + 1)[0] for _ in range(reader.rows)])
    means = {}
    for system in SYSTEMS:
        start, found = reader.start(system == "base"), []
        for number, hidden in enumerate(reader.blocks(ids[:, :-1], start, system, np.random.default_rng(1))):
            targets = ids[:, number * reader.block + 1 : (number + 1) * reader.block + 1]
            if number >= skip:
                found.append(reader.nats(hidden, targets, system == "base").mean(1))
        means[system] = np.mean(found, axis=0)  # [B]
    result = {"tokens": size, "rows": reader.rows, "nats": {}}
    for system, mean in means.items():
        difference = mean - means["memory"]
        error = float(difference.std(ddof=1) / len(difference) ** 0.5) if len(difference) > 1 else float("nan")
        result["nats"][system] = {"mean": float(mean.mean()), "over memory": float(difference.mean()), "error": error}
    return result


def evaluate(training, reader, trained):
    """Needles at 1, 10 and 100 times `trained` tokens, as far as there is time, and the text; a dict for the record."""
    args, clock, block = training.args, training.clock, reader.block
    found, speed = {"trained tokens": trained, "rows": args.rows, "needles": {}}, None

    def keep():
        (args.out / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")

    for factor in (1, *args.factors):
        wanted = factor * trained // block
        if speed is not None:
            left = max(clock.left - TEXT_SECONDS, 0)
            wanted = min(wanted, int(left * speed / args.rows) // block)
            if wanted <= trained // block:
                training.event(f"no time is left for {factor} times the trained length")
                continue
        measured, new_speed = needles(training, reader, wanted, args.seed + factor)
        speed = new_speed if wanted > args.tail else speed
        times = round(wanted * block / trained, 1)
        found["needles"][f"{times:g}"] = measured
        show(training, times, measured)
        keep()
    found["text"] = text_nats(training, reader, blocks=min(64, max(16, trained // block)), skip=4)
    for system, value in found["text"]["nats"].items():
        over = f"{value['over memory']:+.4f} ± {value['error']:.4f} over its own memory"
        training.event(f"text, {system}: {value['mean']:.4f} nats, {over}")
    keep()
    return found


def show(training, times, measured):
    training.event(f"{times:g} times the trained length, {measured['tokens']:,} tokens; exact answers in %:")
    for name, systems in measured["exact"].items():
        shown = "  ".join(f"{system} {100 * np.mean(systems[system]):.0f}" for system in SYSTEMS)
        print(f"    {name:<12} ({len(systems['memory'])} texts)  {shown}", flush=True)
