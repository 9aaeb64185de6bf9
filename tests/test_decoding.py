"""What a decoded token costs, by what its program holds, and the plan of the GPU report."""

import argparse
import importlib

import keras
import pytest

BACKEND = keras.backend.backend()
ARGS = {"layers": 1, "width": 128, "block_size": 64, "memory_segments": 1, "fam_length": 2, "rows": 1}
ARGS |= {"memory_update": "normalized"}
KEYS = 2 * 64 * 128 * 4  # bytes of the keys that a layer holds


@pytest.mark.skipif(BACKEND == "tensorflow", reason="reads XLA's text or torch's profile; TensorFlow shows neither")
def test_a_token_copies_no_keys():
    """Within a block: no branch, no copy as large as the keys of a layer, and on torch keys written where they lie.

    At width 128, as recorded: XLA copies the keys of narrower models (16, 64) on a CPU.
    """
    kernels = importlib.import_module("examples.benchmarks.kernels")
    args = argparse.Namespace(**ARGS)
    if BACKEND == "jax":
        counts = kernels.count_jax(args, 1)
        assert counts["dot"] >= 8 and not counts["conditional"] and not counts["while"]
        assert counts["bytes copied"] < KEYS
    else:
        counts = kernels.count_torch(args, 1)
        assert counts["mm"] == 8 and counts["index_put_"] == 2
        assert counts["clone"] <= 1  # the logits of the queries' own blocks, side by side


@pytest.mark.skipif(BACKEND == "tensorflow", reason="reads XLA's text or torch's profile; TensorFlow shows neither")
def test_a_memory_update_is_a_few_products():
    """Query, key and value in one, output, and three of the feed-forward part; one attention."""
    kernels = importlib.import_module("examples.benchmarks.kernels")
    if BACKEND == "jax":
        counts = kernels.updates_jax(argparse.Namespace(**ARGS))
        assert 7 <= kernels.operations(counts) <= 50 and counts["bytes copied"] < KEYS
    else:
        counts = kernels.updates_torch(argparse.Namespace(**ARGS))
        assert counts["matmul"] == 5 and counts["scaled_dot_product_attention"] == 1
        assert kernels.operations(counts) <= 24 and not counts["to"]


def test_executed_instructions():
    """Of a branch the shorter side, of a loop the loop alone; what moves nothing is not counted."""
    kernels = importlib.import_module("examples.benchmarks.kernels")
    text = """
HloModule example

%short (p: f32[4]) -> f32[4] {
  ROOT %c.1 = f32[4]{0} copy(%p)
}

%long (p: f32[4]) -> f32[4] {
  %c.2 = f32[4]{0} copy(%p)
  ROOT %n = f32[4]{0} negate(%c.2)
}

%body (p: (f32[4])) -> (f32[4]) {
  %p = (f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=0
  %d = f32[4]{0} dot(%x, %x)
  %k = f32[4]{0} conditional(%i, %d, %d), branch_computations={%long, %short}
  ROOT %t = (f32[4]{0}) tuple(%k)
}
"""
    counts = kernels.executed(kernels.computations(text), "body")
    assert counts == {"dot": 1, "conditional": 1, "copy": 1, "bytes copied": 16}


def test_the_gpu_report_fills_one_table_over_runs():
    gpu = importlib.import_module("examples.benchmarks.gpu")
    cell = {"backend": "jax", "device": "card", "task": "decode", "system": "fam", "rows": 1, "length": 1024}
    before = [{**cell, "seconds": 2.0}, {**cell, "rows": 4, "seconds": 3.0}]
    found = gpu.merged(before, [{**cell, "seconds": 1.0}, {**cell, "backend": "torch", "seconds": 5.0}])
    assert [result["seconds"] for result in found] == [3.0, 1.0, 5.0]
    args = argparse.Namespace(tasks="card,decode,prefill,train", systems=None, small=False)
    cells = list(gpu.planned(args, "jax"))
    assert [cell[0] for cell in cells[:3]] == ["card", "decode", "prefill"]  # what counts most comes first
    assert {cell[1] for cell in cells} == {"-", "fam", "masked", "bswa", "full", "inputs"}  # Mistral runs on torch
    args.systems = "bswa"
    assert {cell[1] for cell in gpu.planned(args, "jax")} == {"bswa"}
