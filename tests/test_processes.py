"""Several processes on this machine train as one does; and what each of them does alone."""

import importlib
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from support import on_one_backend

import keras_fam
from examples.distributed import common, processes, starting, work
from keras_fam.distribution import processes as rows_of_processes
from keras_fam.layers import random_state_passing
from keras_fam.ops import random as fam_random

BACKEND = keras.backend.backend()


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """Losses with Random State Passing at p = 0.5 and on carried state, and a checkpoint of two processes that one
    resumes, and then two, to 5 decimals. By `fit`; on torch also by loops around DDP and FSDP."""
    pytest.importorskip("safetensors")
    monkeypatch.setitem(common.SETTINGS, "num_layers", 1)
    options = ["--layers", "1", *(["--variants", "model", "--simulate", "4"] if BACKEND == "jax" else [])]
    module = importlib.import_module(f"examples.distributed.{processes.MODULES[BACKEND]}")

    def run_here(options):  # one process less to start
        return module.results(work.parse(module.parser(), ["--folder", str(tmp_path), *options]))

    one, many = processes.runs(BACKEND, 2, 3, options, tmp_path, run_here)
    assert set(many) == {"jax": {"model"}, "torch": {"fit", "ddp", "fsdp"}, "tensorflow": {"fit"}}[BACKEND]
    for variant, found in many.items():
        largest = processes.differences(one, found)
        assert processes.agree(largest), (variant, largest)
    assert len(one["training, RSP 0.5"]) == len(found["resumed"]) == 3
    assert np.any(one["after: passed memory"]) and np.any(one["after: carried state"])


@on_one_backend
def test_processes_are_ended(tmp_path):
    """All that were started, if one fails or time is over, with the end of its log."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starting.subprocess, "Popen", Recorded)
        with pytest.raises(RuntimeError, match=r"(?s)exit codes \[.*2.*unrecognized arguments: --unknown"):
            starting.start("jax_processes", 2, ["--unknown"], tmp_path)
        with pytest.raises(RuntimeError, match="out of time"):
            starting.start("jax_processes", 2, [], tmp_path, timeout=0)
    assert len(started) == 4 and None not in [process.returncode for process in started]
    assert len(set(starting.free_ports(3))) == 3


def passing(rate=0.5, seed=3):
    layer = keras_fam.RandomStatePassing(rate, 1, 2, seed=seed)
    layer.build((None, None, 4))
    layer.filled.assign(True)
    return layer


def test_rows_are_drawn_by_their_number_among_all(monkeypatch):
    """Three processes of two rows choose together what one process of six rows chooses, step after step."""
    whole, shards = passing(), [passing() for _ in range(3)]
    seen = set()
    for _ in range(8):
        expected = keras.ops.convert_to_numpy(whole.choose(6))
        found = []
        for i, layer in enumerate(shards):
            with monkeypatch.context() as patch:
                patch.setattr(random_state_passing, "row_shard", lambda i=i: (i, 3))
                found.append(keras.ops.convert_to_numpy(layer.choose(2)))
        assert np.array_equal(np.concatenate(found), expected)
        seen.add(tuple(expected.tolist()))
    assert len(seen) > 4


def test_processes_drop_out_differently(monkeypatch):
    """Each process has masks of its own; process 0 those that it has alone."""
    seeds = []
    for shard in ((0, 1), (0, 3), (1, 3), (2, 3)):
        monkeypatch.setattr(fam_random, "row_shard", lambda shard=shard: shard)
        seed = fam_random.next_seed(keras.random.SeedGenerator(5), None)
        seeds.append(tuple(keras.ops.convert_to_numpy(seed).tolist()))
    assert seeds[0] == seeds[1] and len(set(seeds)) == 3


def documents():
    return [np.arange(length) % 7 for length in (9, 30, 14, 25, 8, 40, 21)]


def rows(batch_size, shard=(0, 1), **kwargs):
    return keras_fam.data.DocumentRows(documents(), batch_size, 8, shard=shard, seed=2, **kwargs)


def test_positions_of_shards_are_one_position(monkeypatch):
    """Merged, that of a dataset with all rows; loaded, each shard reads its rows on, however many shards there are."""
    shards = [rows(2, (i, 3)) for i in range(3)]
    whole = rows(6)
    for dataset in (whole, *shards):
        dataset.advance(4)
    states = [json.loads(json.dumps(shard.state_dict(1))) for shard in shards]
    merged = keras_fam.data.DocumentRows.merge_states(states)
    assert merged == json.loads(json.dumps(whole.state_dict(1)))
    expected = whole.batch_at(6)
    for count in (1, 2, 3, 6):
        found = []
        for i in range(count):
            dataset = rows(6 // count, (i, count))
            dataset.load_state_dict(merged)
            found.append(dataset.batch_at(6))
        chunks = {name: np.concatenate([batch[0][name] for batch in found]) for name in expected[0]}
        assert all(np.array_equal(chunks[name], expected[0][name]) for name in expected[0])
        assert np.array_equal(np.concatenate([batch[1] for batch in found]), expected[1])
    with pytest.raises(ValueError, match=r"Process i of n reads shard \(i, n\).*process_shard"):
        keras_fam.data.DocumentRows.merge_states(states[::-1])
    with pytest.raises(ValueError, match="other settings"):
        rows(2, (0, 2)).load_state_dict(merged)  # four rows of six


def test_tasks_resume_with_as_many_processes():
    def batches(i, count):
        return keras_fam.data.TaskBatches(keras_fam.tasks.Copy(), 2, block_size=8, blocks=4, shard=(i, count))

    shards = [batches(i, 2) for i in range(2)]
    for shard in shards:
        shard.advance(3)
    merged = keras_fam.data.TaskBatches.merge_states([shard.state_dict() for shard in shards])
    again = batches(1, 2)
    again.load_state_dict(merged)
    assert again.position == 3 and again.settings()["shard"] == [1, 2]
    with pytest.raises(ValueError, match="other settings"):
        batches(0, 3).load_state_dict(merged)


def test_one_process_has_all_rows(monkeypatch):
    state = {"a": keras.ops.arange(6), "b": (keras.ops.ones((6, 2)),)}
    found = keras_fam.distribution.gather_rows(state)
    assert isinstance(found["a"], np.ndarray) and found["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert keras_fam.distribution.own_rows(found)["b"][0].shape == (6, 2)
    assert keras_fam.distribution.process_shard() == (0, 1)
    dataset = rows(2)
    dataset.advance(2)
    assert keras_fam.distribution.gather_position(dataset, 1) == dataset.state_dict(1)
    with keras_fam.distribution.independent_processes():
        assert keras_fam.distribution.process_shard() == (0, 1)
    if BACKEND != "jax":  # JAX's programs see all rows
        monkeypatch.setattr(rows_of_processes, "process_shard", lambda: (1, 3))
        assert keras_fam.distribution.own_rows(found)["a"].tolist() == [2, 3]
        with pytest.raises(ValueError, match=r"6 rows for 3|the same number of rows; received 5 rows for 3"):
            keras_fam.distribution.own_rows(np.zeros(5))


def test_a_file_is_there_for_all(monkeypatch):
    monkeypatch.setattr(rows_of_processes, "gather_objects", lambda value: [value, False, value])
    assert rows_of_processes.agree_on_file(False, "f") is False
    with pytest.raises(ValueError, match=r"f exists in processes \[0, 2\] only.*all machines share"):
        rows_of_processes.agree_on_file(True, "f")


def test_weights_are_divided_by_torch_alone():
    backbone = keras_fam.TransformerFAMBackbone(7, 1, 8, 2, 8, block_size=8, fam_length=2)
    expected = "process group; received none" if BACKEND == "torch" else "the backend is"
    with pytest.raises(ValueError, match=expected):
        keras_fam.distribution.fully_shard(backbone)


@pytest.mark.skipif(BACKEND != "torch", reason="FSDP is torch's; other engines divide weights otherwise")
def test_divided_weights(tmp_path):
    """In a group of one: the module computes what the model does, its parameters are parts, and weights come back."""
    import torch
    from torch import distributed

    backbone = keras_fam.TransformerFAMBackbone(7, 1, 8, 2, 8, block_size=8, fam_length=2, dropout=0.0)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 1, 2, 3]])
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="`build` first"):
            keras_fam.distribution.fully_shard(backbone)
        expected = backbone(ids).detach()
        before = [variable.numpy() for variable in backbone.trainable_variables]
        sharded = keras_fam.distribution.fully_shard(backbone)
        assert all(type(p).__name__ == "DTensor" for p in sharded.parameters())
        assert len(list(sharded.parameters())) == len(before)
        outputs = sharded(ids)
        assert torch.allclose(outputs, expected)
        outputs.square().mean().backward()
        assert all(p.grad is not None for p in sharded.parameters())
        torch.optim.SGD(sharded.parameters(), 0.1).step()
        with sharded.whole_weights() as whole:
            assert whole is backbone
            after = [variable.numpy() for variable in backbone.trainable_variables]
            changed = backbone(ids)
        assert any(np.any(a != b) for a, b in zip(before, after, strict=True))
        assert torch.allclose(sharded(ids), changed)
    finally:
        distributed.destroy_process_group()


def test_several_replicas_carry_no_state():
    """On TensorFlow; other engines know no replicas."""
    if BACKEND != "tensorflow":
        pytest.skip("several replicas in one process are TensorFlow's alone")
    program = (
        "import tensorflow as tf, keras_fam; cpu = tf.config.list_physical_devices('CPU')[0];"
        "tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)\n"
        "with tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1']).scope():\n"
        "    backbone = keras_fam.TransformerFAMBackbone(7, 1, 8, 2, 8, block_size=8, fam_length=2)\n"
        "    try: keras_fam.StreamingModel(backbone, 2).compile()\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=starting.ROOT)
    assert "one device per process" in done.stdout and "has 2 in this one" in done.stdout, done.stderr[-2000:]
