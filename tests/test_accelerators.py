"""Programs for accelerators, without one: lowered for TPU, compiled by XLA, and the GPU report at small sizes."""

import argparse
import importlib
import os
import pathlib
import re
import subprocess
import sys
from importlib.util import find_spec

import keras
import numpy as np
import pytest
from support import SPLIT, close

import keras_fam

ROOT = pathlib.Path(__file__).parents[1]
BACKEND = keras.backend.backend()


@pytest.mark.skipif(BACKEND != "jax", reason="TPUs are reached through JAX here")
@pytest.mark.parametrize("what", ["train", "stream"])
def test_lowers_for_tpu(what):
    """The programs of `tpu_compile.py`: lowered for TPU without host callbacks, dynamic shapes or float64."""
    tpu = importlib.import_module("examples.verification.tpu_compile")
    (program,) = (p for p in tpu.PROGRAMS if p.model == "tiny" and p.what == what)
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"))
    layouts = keras_fam.layout_map(mesh)
    parallel = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    with parallel.scope():
        lowered, parameters = tpu.lower(program, parallel)
    settings = keras_fam.model_config(program.model, **program.changes)
    assert parameters == keras_fam.models.configs.count_weights(settings)
    tpu.check(lowered.as_text())


def test_check_finds_what_a_tpu_cannot_run():
    tpu = importlib.import_module("examples.verification.tpu_compile")
    tpu.check("stablehlo.custom_call @Sharding(%1) : tensor<4x8xf32>")
    for text in ("custom_call @xla_python_cpu_callback(%1)", "tensor<?x8xf32>", "tensor<4xf64>", '"stablehlo.infeed"'):
        with pytest.raises(AssertionError):
            tpu.check(text)


@pytest.mark.tpu
@pytest.mark.skipif(BACKEND != "jax", reason="TPUs are reached through JAX here")
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed here: `make tpu` does that")
def test_compiles_for_a_tpu_topology():
    """XLA's TPU compiler takes a train and a streaming step, sharded over four chips."""
    command = [sys.executable, "-m", "examples.verification.tpu_compile", "--only", "tiny"]
    done = subprocess.run(command, env={**os.environ, "XLA_FLAGS": ""}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(re.findall(r"^tiny (train|stream) v5e:2x2 .* s$", done.stdout, re.MULTILINE)) == 2, done.stdout


def small_lm():
    keras.utils.set_random_seed(0)
    backbone = keras_fam.TransformerFAMBackbone(
        17, 2, 16, 2, 32, block_size=4, memory_segments=1, fam_length=2, random_state_passing=1.0
    )
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.build()
    return lm


def train_program(lm):
    """Keras' own train step, as one XLA program."""
    import tensorflow as tf

    return tf.function(lambda x, y: lm.train_step((x, y))["loss"], jit_compile=True)


def check_hlo(text):
    assert "f64[" not in text
    assert not re.search(r"[a-z]\d+\[[^\]]*(\?|<=)", text), "shapes are not static"


@pytest.mark.skipif(BACKEND != "tensorflow", reason="JAX always compiles with XLA, torch has its own compiler")
def test_tensorflow_compiles_with_xla():
    """`jit_compile=True`: one XLA program each for the train step and the streaming step; results as without."""
    import tensorflow as tf

    ids = np.random.default_rng(0).integers(0, 17, (2, 17)).astype("int32")
    x, y = tf.constant(ids[:, :-1]), tf.constant(ids[:, 1:])
    losses = {}
    for compiled in (True, False):
        lm = small_lm()
        lm.compile(keras.optimizers.SGD(0.1), jit_compile=compiled)
        losses[compiled] = [lm.train_on_batch(x, y)[0] for _ in range(2)]
        if compiled:
            check_hlo(train_program(lm).experimental_get_compiler_ir(x, y)(stage="hlo"))
    close(losses[True], losses[False], SPLIT)

    step = tf.function(lambda ids, state: lm.advance(ids, state), jit_compile=True)
    state, plain = lm.get_initial_state(2), lm.get_initial_state(2)
    for first, size in ((0, 8), (8, 1)):
        chunk = x[:, first : first + size]
        check_hlo(step.experimental_get_compiler_ir(chunk, state)(stage="hlo"))
        outputs, state = step(chunk, state)
        expected, plain = lm.advance(chunk, plain)
        close(outputs, expected, SPLIT)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="the GPU report covers JAX and torch")
@pytest.mark.parametrize(
    "task, system",
    [("prefill", "inputs"), ("prefill", "full"), ("train", "fam"), ("decode", "fam"), ("decode", "full")],
)
def test_gpu_report_at_small_sizes(monkeypatch, task, system):
    monkeypatch.setenv("KERAS_BACKEND", BACKEND)  # as the script's own processes have it
    gpu = importlib.import_module("examples.benchmarks.gpu")
    args = argparse.Namespace(
        small=True, system=system, task=task, rows=1, blocks_per_step=2, train_blocks=2, repeats=1, cell_seconds=1.0
    )
    args.memory_update, args.new = "residual", 4
    results = list(gpu.measure(args, [32, 64]))
    assert [result["length"] for result in results] == [32, 64]
    for result in results:
        assert result["seconds"] > 0
        assert result["share"] > 0
        assert result["tokens_per_second"] > 0


@pytest.mark.skipif(BACKEND == "tensorflow", reason="the GPU report covers JAX and torch")
def test_full_attention_decodes_what_it_reads():
    """The peer is a real one: token by token over a cache, its outputs are those of the whole sequence."""
    from keras import ops

    full = importlib.import_module("examples.benchmarks.peers.full_attention")
    keras.utils.set_random_seed(0)
    model = full.FullAttention(17, 2, 16, 2, 32)
    model.build()
    ids = np.random.default_rng(0).integers(0, 17, (2, 5)).astype("int32")
    expected, caches = model(ids), model.get_cache(2, 5)
    for i in range(5):
        hidden, caches = model.step(ids[:, i : i + 1], caches, ops.convert_to_tensor(np.int32(i)))
        close(hidden[:, 0], expected[:, i], SPLIT)
