"""Training by the clock: texts grow as needles are found, and everything is saved as it goes."""

import collections
import concurrent.futures
import functools
import io
import json
import pathlib
import time

import keras
import numpy as np

import keras_fam
from examples.smollm2.memory import batches, plan
from examples.smollm2.memory.evaluate import Reader, evaluate
from examples.smollm2.memory.learner import Learner
from examples.smollm2.memory.prepared import Prepared, build, read_config
from keras_fam.utils.atomic import replace_file

MEASURED_AFTER = 30.0  # seconds of training after which the speed is known
RECENT = 128  # answers that decide whether texts grow
FILES = {"values": "values.npz", "moments": "moments.npz", "lora": "memory.lora.h5", "record": "record.json"}


class Clock:
    """Seconds since the command began, of a budget."""

    def __init__(self, seconds):
        self.began, self.seconds = time.perf_counter(), seconds

    @property
    def passed(self):
        return time.perf_counter() - self.began

    @property
    def left(self):
        return self.seconds - self.passed


class Training:
    """One call of the command.

    Args:
        args: namespace of the command.
        prepared: `Prepared`.
        clock: `Clock`.
    """

    def __init__(self, args, prepared, clock):
        self.args, self.prepared, self.clock = args, prepared, clock
        self.config = read_config(prepared, args)
        longest = {"remat": "layers", "scan_layers": True, "blocks_per_step": max(args.levels)}
        self.lm = build(prepared, {**self.config, **longest}, dtype=args.dtype, seed=args.seed, random=args.random)
        if args.rank:
            self.lm.enable_lora(args.rank, tuple(args.targets), rows=args.lora_rows)
        rates = {"lora": args.rate, "weights": args.rate, "memory": args.memory_rate, "gate": args.gate_rate}
        teacher = None
        if args.distill:
            longest = min(args.distill_tokens, max(args.levels) * args.block)
            teacher = keras_fam.training.full_attention(self.lm, longest, scan_layers=True, remat="layers")
        self.learner = Learner(self.lm, rates, teacher=teacher, distill=args.distill, longest=args.distill_tokens)
        if args.weigh_books:
            prepared.train = prepared.weighted()
        self.task = batches.make_task(prepared, args)
        self.levels, self.level = list(args.levels), 0
        self.step_tokens = args.step_tokens or min(plan.largest_step(self.config, plan.device_bytes()), 65_536)
        self.recent = collections.defaultdict(lambda: collections.deque(maxlen=RECENT))
        self.record = {"arguments": {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in vars(args).items()}}
        self.record |= {"curve": [], "events": [], "steps": 0, "tokens": 0, "steps by blocks": {}, "seconds": 0.0}
        self.threads = concurrent.futures.ThreadPoolExecutor(1)
        self.programs, self.seconds_before, self._reader = {}, 0.0, None

    # Programs and data ------------------------------------------------------------------------------------------

    def rows(self, level):
        return max(1, self.step_tokens // (self.levels[level] * self.args.block))

    def wanted(self, level):
        """Starts compiling the step of a level in the background, unless it is made; a future."""
        key = (self.rows(level), self.levels[level] * self.args.block, batches.POSITIONS)
        if key not in self.programs:
            self.programs[key] = self.threads.submit(self.learner.compile, *key)
        return self.programs[key]

    def open(self, level):
        """`(program, batches)` of a level."""
        program, seconds = self.wanted(level).result()
        rows, tokens = self.rows(level), self.levels[level] * self.args.block
        self.event(f"texts of {tokens} tokens, {rows} a step; compiled in {seconds:.0f} s")
        if level + 1 < len(self.levels):
            self.wanted(level + 1)
        draw = functools.partial(self.draw, rows, tokens, level)
        return program, batches.Ahead(draw, self.learner.steps)

    def reader(self):
        """Starts compiling what the evaluation needs in the background, once; a future."""
        if self._reader is None:
            chunk = max(1, min(16, max(self.args.levels)))
            self._reader = self.threads.submit(Reader, self.learner, self.args.rows, chunk)
        return self._reader

    def draw(self, rows, tokens, level, number):
        return batches.draw(self.task, rows, tokens, [self.args.seed, level, number])

    # The loop ---------------------------------------------------------------------------------------------------

    def factor(self):
        """The factor of all rates: up over the first steps, down to 0 over the last quarter of the time."""
        share_left = (self.clock.left - self.args.reserve) / max(self.clock.seconds - self.args.reserve, 1e-9)
        return min(1.0, (self.learner.steps + 1) / 20, max(share_left, 0.0) / 0.25)

    def run(self):
        """Trains until the time for it is over."""
        program, ahead = self.open(self.level)
        began, measured, saved, waiting = self.clock.passed, False, self.clock.passed, None
        tokens_before, at_level = self.record["tokens"], 0
        while self.clock.left > self.args.reserve and self.record["steps"] < self.args.steps:
            batch, factor = ahead.get(), self.factor()
            found = self.learner.step(program, batch, factor)
            self.record["steps"] += 1
            self.record["tokens"] += batch.token_ids.size
            at_level += 1
            by_blocks, blocks = self.record["steps by blocks"], str(self.levels[self.level])
            by_blocks[blocks] = by_blocks.get(blocks, 0) + 1
            if waiting is not None:
                self.note(*waiting)  # of the step before, while the device computes this one
            waiting = self.record["steps"], batch, found, factor
            if not measured and self.clock.passed - began >= MEASURED_AFTER:
                measured = True
                self.fit_time((self.record["tokens"] - tokens_before) / (self.clock.passed - began))
            grown = self.grows(at_level)
            shrunk = batch.token_ids.shape[0] > self.rows(self.level) and self.wanted(self.level).done()
            if grown or shrunk:
                self.level += int(grown)
                ahead.stop()
                program, ahead = self.open(self.level)
                at_level = 0 if grown else at_level
                self.recent.clear()
            if self.clock.passed - saved > self.args.save_every:
                self.save()
                saved = self.clock.passed
        ahead.stop()
        if waiting is not None:
            self.note(*waiting, show=True)
        self.save()

    def fit_time(self, speed):
        """Levels and step size for what is left, at the measured speed in tokens a second."""
        seconds = self.clock.left - self.args.reserve
        levels, size = plan.plan(speed, seconds, self.step_tokens, self.args.levels, self.args.block)
        self.levels, self.step_tokens = levels[: max(len(levels), self.level + 1)], size
        if self.level >= len(self.levels):
            self.levels = list(self.args.levels[: self.level + 1])
        self.event(f"{speed:,.0f} tokens/s: levels of {self.levels} blocks, {size:,} tokens a step from now on")
        self.wanted(self.level)
        if self.args.evaluate:
            self.reader()

    def trained_blocks(self):
        """Blocks of the longest texts that were trained on for `--level-steps` steps, or for the most."""
        by_blocks = {int(blocks): steps for blocks, steps in self.record["steps by blocks"].items()}
        enough = [blocks for blocks, steps in by_blocks.items() if steps >= self.args.level_steps]
        return max(enough or [max(by_blocks, key=by_blocks.get)]) if by_blocks else max(self.args.levels)

    def grows(self, at_level):
        """Whether the needles of this length are found, and the step of the next one is compiled."""
        recent = self.recent.get("Needle", ())
        if self.level + 1 >= len(self.levels) or at_level < self.args.level_steps or len(recent) < RECENT // 2:
            return False
        if np.mean(recent) < self.args.grow_at or not self.wanted(self.level + 1).done():
            return False
        failed = self.wanted(self.level + 1).exception()
        if failed is not None:  # the texts stay as long as they are
            self.levels = self.levels[: self.level + 1]
            self.event(f"longer texts do not compile: {str(failed)[:300]}")
        return failed is None

    # What is kept -----------------------------------------------------------------------------------------------

    def event(self, text):
        self.record["events"].append(
            {"seconds": round(self.clock.passed, 1), "step": self.record["steps"], "text": text}
        )
        print(f"[{self.clock.passed:6.1f} s] {text}", flush=True)

    def note(self, step, batch, found, factor, show=False):
        """Keeps the results of a step; a line of the curve every few steps."""
        loss, norm, nats, right = (np.asarray(x) for x in found)
        for row, name in enumerate(batch.names):
            if name:
                self.recent[name].append(bool(right[row][batch.answer[row]].all()))
        if not show and step % self.args.line_every and step > 3:
            return
        exact = {name: round(float(np.mean(found)), 3) for name, found in sorted(self.recent.items())}
        line = {"step": step, "seconds": round(self.clock.passed + self.seconds_before, 1), "loss": float(loss)}
        line |= {"norm": float(norm), "blocks": batch.token_ids.shape[1] // self.args.block, "exact": exact}
        line |= {"tokens": self.record["tokens"], "factor": round(float(factor), 4)}
        answered = batch.answer.any()
        line["answers"] = float(nats[batch.answer].mean()) if answered else None
        self.record["curve"].append(line)
        shown = "  ".join(f"{name} {100 * share:.0f}" for name, share in exact.items())
        print(
            f"[{self.clock.passed:6.1f} s] step {step}, {line['blocks']} blocks: loss {line['loss']:.3f}, answers "
            f"{line['answers'] or float('nan'):.3f}, gradient {line['norm']:.2f}; exact %: {shown}",
            flush=True,
        )

    def save(self):
        """Writes everything to continue from; what was there before is replaced file by file."""
        out, state = self.args.out, self.learner.state()
        for name in ("values", "moments"):
            parts = {key: value for key, value in state.items() if key.startswith("value") == (name == "values")}
            content = io.BytesIO()
            np.savez(content, steps=self.learner.steps, **parts)
            with replace_file(out / FILES[name]) as file:
                file.write(content.getbuffer())
        self.learner.assign()
        if self.args.rank:
            self.lm.save_lora_weights(out / FILES["lora"])
        self.record |= {"level": self.level, "learner steps": self.learner.steps}
        self.record["seconds"] = round(self.seconds_before + self.clock.passed, 1)
        self.write_record()

    def write_record(self):
        with replace_file(self.args.out / FILES["record"]) as file:
            file.write((json.dumps(self.record, indent=1) + "\n").encode())

    def resume(self):
        """Continues from the files of an earlier call, if there are any."""
        path = self.args.out / FILES["record"]
        if not path.exists():
            return
        record, found = json.loads(path.read_text()), {}
        same = {
            k: v for k, v in record["arguments"].items() if k in MODEL_ARGUMENTS and self.record["arguments"][k] != v
        }
        if same:
            raise ValueError(
                f"{self.args.out} has a run with other values: {same}. Pass the same ones, or another --out."
            )
        for name in ("values", "moments"):
            with np.load(self.args.out / FILES[name]) as file:
                found |= {key: file[key] for key in file.files}
        self.learner.load_state(found, int(found["steps"]))
        self.level = min(record["level"], len(self.levels) - 1)
        arguments = self.record["arguments"]
        self.record, self.seconds_before = {**record, "arguments": arguments}, record["seconds"]
        self.event(f"continues after step {self.record['steps']}")


MODEL_ARGUMENTS = (
    "block",
    "segments",
    "fam",
    "sinks",
    "fam_query",
    "memory_update",
    "gate",
    "rank",
    "lora_rows",
    "targets",
    "tiny",
    "distill",
)


def train(args):
    """Trains within `args.minutes`, the evaluation included; returns the record."""
    clock = Clock(60 * args.minutes)
    args.out.mkdir(parents=True, exist_ok=True)
    prepared = Prepared(args.data)
    training = Training(args, prepared, clock)
    training.resume()
    import jax

    device = jax.local_devices()[0]
    training.record |= {"device": device.device_kind, "versions": {"jax": jax.__version__, "keras": keras.__version__}}
    count = sum(int(np.prod(v.shape)) for v in training.learner.trainable)
    training.event(f"{device.device_kind}: {count:,} trainable parameters, {training.step_tokens:,} tokens a step")
    if args.steps:
        try:
            training.run()
        except jax.errors.JaxRuntimeError as error:  # out of memory, mostly: what was saved last is evaluated
            training.event(f"training ends early: {str(error)[:300]}")
            training.resume()
    stats = device.memory_stats() or {}
    training.record["peak GB"] = round(stats.get("peak_bytes_in_use", 0) / 1e9, 2)
    if args.evaluate:
        trained = training.trained_blocks() * args.block
        training.record["evaluation"] = evaluate(training, training.reader().result(), trained)
    training.write_record()
    return training.record
