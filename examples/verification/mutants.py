"""Breaks the package on purpose, one place at a time, and reports which test finds it.

    python -m examples.verification.mutants --backends jax,torch,tensorflow --out out/mutants.json

Each mutant is a copy of the repository in which one expression is replaced. The test files that concern the place run
first, then the others of `--tests`; a mutant that all of them pass has survived, and the command fails.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    """One wrong version: in `file`, the only occurrence of `old` becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # the files that should notice
    backends: tuple = ("jax", "torch", "tensorflow")


MUTANTS = (
    Mutant(
        "tokens never read the memory",
        "layers/chunk_attention.py",
        "    if memory is not None:\n        age, seen = memory_ages(attention), None",
        "    if memory is not None:\n        memory = [0 * part for part in memory]\n"
        "        age, seen = memory_ages(attention), None",
        "test_oracle",
    ),
    Mutant(
        "keys are not kept for the next call",
        "layers/chunk_attention.py",
        "return state._replace(key=key, value=value)",
        "return state._replace(key=key)",
        "test_contracts test_stateful",
    ),
    Mutant(
        "memory keys stand one position too far back",
        "ops/rope.py",
        "    return rows - fam_length\n",
        "    return rows - fam_length - 1\n",
        "test_oracle",
    ),
    Mutant(
        "a token sees the next one",
        "ops/masks.py",
        "seen = (key <= query) &",
        "seen = (key <= query + 1) &",
        "test_attention",
    ),
    Mutant(
        "torch reads the blocks in reverse",
        "ops/scan.py",
        "carry, y = step(carry, {name: x[i] for name, x in xs.items()})",
        "carry, y = step(carry, {name: x[length - 1 - i] for name, x in xs.items()})",
        "test_oracle",
        ("torch",),
    ),
    Mutant(
        "JAX reads the blocks in reverse",
        "ops/scan.py",
        "return jax.lax.scan(step, carry, xs, unroll=few)",
        "return jax.lax.scan(step, carry, xs, unroll=few, reverse=True)",
        "test_training test_model",
        ("jax",),
    ),
    Mutant(
        "TensorFlow reads the blocks in reverse",
        "ops/scan.py",
        "[array.read(i) for array in inputs]",
        "[array.read(size - 1 - i) for array in inputs]",
        "test_oracle",
        ("tensorflow",),
    ),
    Mutant(
        "Random State Passing hands on row 1",
        "layers/random_state_passing.py",
        "ops.stack([fam[0] for fam in fams], axis=0)",
        "ops.stack([fam[-1] for fam in fams], axis=0)",
        "test_model",
    ),
    Mutant(
        "every process draws the rows of the first",
        "layers/random_state_passing.py",
        "ops.slice(draw, [shard * batch_size], [batch_size])",
        "ops.slice(draw, [0], [batch_size])",
        "test_processes",
    ),
    Mutant(
        "every process resumes the rows of the first",
        "distribution/processes.py",
        "x[index * size : (index + 1) * size]",
        "x[:size]",
        "test_processes",
        ("torch", "tensorflow"),
    ),
    Mutant(
        "another row is reset",
        "layers/recurrent.py",
        'state = where_rows(ops.cast(reset, "bool"), ',
        'state = where_rows(ops.roll(ops.cast(reset, "bool"), 1), ',
        "test_contracts test_stateful",
    ),
    Mutant(
        "padding behind a row's length enters the state",
        "layers/chunk.py",
        "        if self.lengths is None:\n            return x\n",
        "        return x\n",
        "test_contracts test_stateful",
    ),
    Mutant(
        "the first update after a reset has a residual",
        "layers/memory_scan.py",
        "residual = fam * ops.cast(ops.logical_not(position.fresh), fam.dtype)[:, None, None]",
        "residual = fam",
        "test_oracle",
    ),
    Mutant(
        "older memories are not moved back",
        "layers/memory_scan.py",
        "rotate(memory.key[:, :kept], attention.positions.back(1))",
        "memory.key[:, :kept]",
        "test_oracle",
    ),
    Mutant(
        "sinks stand one position too far back",
        "ops/rope.py",
        "memory_segments * self.block_size + attention_sinks)",
        "memory_segments * self.block_size + attention_sinks + 1)",
        "test_oracle",
    ),
    Mutant(
        "the soft cap is left out of fused attention's plain path",
        "ops/attention.py",
        "logits = softmax_ready(ops.matmul(query, key), softcap)",
        "logits = softmax_ready(ops.matmul(query, key), None)",
        "test_oracle test_attention",
    ),
    Mutant(
        "a layer hands on its memory in place of what it made of anchored rows",
        "layers/memory_scan.py",
        "above = (written,) if anchored",
        "above = (new.fam,) if anchored",
        "test_model",
    ),
    Mutant(
        "the gate on reading weighs sinks, too",
        "layers/chunk_attention.py",
        "keys = np.arange(attention.attention_sinks + len(age)) >= attention.attention_sinks",
        "keys = np.arange(attention.attention_sinks + len(age)) >= 0",
        "test_oracle",
    ),
    Mutant(
        "what the first block writes is averaged with the first memory",
        "layers/memory_update.py",
        "if self.takes_first_write and fresh is not None:",
        "if False:",
        "test_oracle",
    ),
    Mutant(
        "noise on the memory outside of training",
        "layers/memory_update.py",
        "if not self.noise or seed is None:",
        "if not self.noise:",
        "test_training test_steps",
    ),
    Mutant(
        "a train step does not hand on its state",
        "training/stateful.py",
        "self.assign_state(keras.tree.map_structure(ops.stop_gradient, state))",
        "pass",
        "test_stateful_training",
    ),
    Mutant(
        "validation continues the training's streams",
        "training/stateful.py",
        "        self._kept = self._trainer.state\n        self._trainer.reset_state()\n",
        "        self._kept = self._trainer.state\n",
        "test_stateful_training",
    ),
    Mutant(
        "a step does not wait for its batch",
        "ops/backend.py",
        "    return tf.control_dependencies([part for part in keras.tree.flatten(x) if tf.is_tensor(part)])",
        "    return contextlib.nullcontext()",
        "test_stateful_training",
        ("tensorflow",),
    ),
    Mutant(
        "a session does not ask whose weights wrote it",
        "streaming/session.py",
        'if check_weights and found["weights"] != fingerprint:',
        "if False:",
        "test_sessions",
    ),
    Mutant(
        "rows that are written at once read the memory after their block",
        "layers/memory_scan.py",
        "[merge(part[:count]) for part in memories]",
        "[merge(part[1:]) for part in memories]",
        "test_model",
    ),
    Mutant(
        "a memory that is written at once forgets earlier calls",
        "layers/memory_scan.py",
        "[ops.concatenate([ops.expand_dims(a, 0), b], axis=0)",
        "[ops.concatenate([ops.expand_dims(0 * a, 0), b], axis=0)",
        "test_model test_contracts",
    ),
    Mutant(
        "an unfinished block enters a memory that is written at once",
        "layers/memory_scan.py",
        'new = where_rows(x["active"], new, fam) if "active" in x else new',
        "new = new",
        "test_model test_contracts",
    ),
    Mutant(
        "single tokens leave out the softmax sink",
        "ops/block_attention.py",
        "    if sink is None:\n        weights = ops.cast(",
        "    if True:\n        weights = ops.cast(",
        "test_contracts test_attention",
    ),
    Mutant(
        "rows are weighed over experts that they did not choose",
        "layers/mixture_of_experts.py",
        "ops.where(chosen > 0, logits",
        "ops.where(chosen >= 0, logits",
        "test_oracle test_feed_forward",
    ),
    Mutant(
        "the feed-forward part of a parallel residual reads the attention",
        "layers/transformer_fam_block.py",
        "x if self.parallel_residual else attended",
        "attended",
        "test_oracle",
    ),
    Mutant(
        "the last features of a head are rotated in place of the first",
        "ops/rope.py",
        "else x[..., :width]",
        "else x[..., -width:]",
        "test_oracle test_attention",
    ),
)
BROAD = (
    "test_oracle test_attention test_model test_systems test_stateful test_stateful_training "
    "test_training test_steps test_generation test_sessions test_contracts test_properties"
)


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backends", default="jax,torch,tensorflow")
    parser.add_argument("--only", default="", help="a part of the names of the mutants to run")
    parser.add_argument("--tests", default=BROAD, help="files that run where those of the mutant notice nothing")
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args(argv)


def first_failure(folder, backend, files):
    """The name of the first test that fails, or None."""
    flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "XLA_FLAGS": flags}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header"]
    done = subprocess.run(
        [*command, *(f"tests/{name}.py" for name in files)], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+?)\.py(?:::(.+?))?(?: - .*)?$", done.stdout, re.MULTILINE)
    if found is None or done.returncode != 1:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return f"{found[1]}::{found[2]}"


def run(mutant, backend, broad):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in ("keras_fam", "tests", "examples"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "Makefile", "CHANGELOG.md"):
            shutil.copy(ROOT / name, folder / name)
        path = folder / "keras_fam" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise ValueError(f"{mutant.name}: {mutant.file} has {text.count(mutant.old)} places {mutant.old!r}, not 1.")
        path.write_text(text.replace(mutant.old, mutant.new))
        files = mutant.tests.split()
        found = first_failure(folder, backend, files)
        return found or first_failure(folder, backend, [name for name in broad.split() if name not in files])


def main(argv=None):
    args = arguments(argv)
    results = []
    for mutant in MUTANTS:
        if args.only not in mutant.name:
            continue
        for backend in args.backends.split(","):
            if backend not in mutant.backends:
                continue
            started = time.perf_counter()
            found = run(mutant, backend, args.tests)
            results.append({"mutant": mutant.name, "file": mutant.file, "backend": backend, "found_by": found})
            print(
                f"{mutant.name} ({backend}, {time.perf_counter() - started:.0f} s): {found or 'SURVIVED'}", flush=True
            )
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(results, indent=1) + "\n")
    survived = [f"{r['mutant']} ({r['backend']})" for r in results if r["found_by"] is None]
    print(f"{len(results) - len(survived)} of {len(results)} found.")
    if survived:
        raise SystemExit(f"Survived: {', '.join(survived)}")


if __name__ == "__main__":
    main()
