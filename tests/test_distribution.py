"""Many devices: the published layout map, and the same numbers as one device, by the examples' own comparison."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_fam
from keras_fam.distribution.layout_map import WEIGHTS
from keras_fam.distribution.state_sharding import fitted, state_layout
from keras_fam.models.configs import weight_shapes

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = {"jax": "jax_distribution", "tensorflow": "tf_mirrored"}  # torch: test_processes.py
SETTINGS = {"vocabulary_size": 32, "num_layers": 2, "hidden_dim": 16, "num_query_heads": 4, "intermediate_dim": 32}


def mesh(shape=(2, 4), names=("batch", "model")):
    """A mesh of devices that are only named: layouts are looked at here, and nothing is put anywhere."""
    return keras.distribution.DeviceMesh(shape, names, [f"cpu:{i}" for i in range(np.prod(shape))])


@pytest.mark.skipif(keras.backend.backend() not in SCRIPTS, reason="torch: see test_processes")
def test_same_numbers_as_one_device():
    """Losses, states, streams and the passed memory agree to 5 decimals; the script says so by its exit status."""
    backend = keras.backend.backend()
    command = [sys.executable, "-m", f"examples.distributed.{SCRIPTS[backend]}", "--steps", "3", "--layers", "1"]
    env = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "the same to 5 decimals" in done.stdout
    if backend == "jax":  # the state lies along both axes of the mesh
        assert "ModelParallel: keys of a stream are sharded as ('batch', None, 'model'" in done.stdout
        assert "DataParallel: keys of a stream are sharded as ('batch'" in done.stdout


def test_layout_map_covers_the_large_weights():
    """Every weight of more than one axis, norms and memory aside, lies along both axes of the mesh."""
    layouts = keras_fam.layout_map(mesh())
    memory = {"fam_length": 4, "memory_update": "hard_gate", "fam_gate": -1.0}
    shapes = weight_shapes({**SETTINGS, "tie_weights": False, **memory})
    small = ("norm", "memory_prompt", "memory_update", "fam_gate")
    for name, shape in shapes.items():
        layout = layouts[f"lm/backbone/{name}"]
        if any(word in name for word in small):
            assert layout is None, name
        else:
            assert len(layout.axes) == len(shape), name
            assert {"batch", "model"} <= set(layout.axes), (name, layout)
    assert layouts["lm/backbone/block_1/output"].axes == ("batch", None, None)


def test_layout_map_matches_the_variables():
    """Each entry for weights names a variable of a model that has them all."""
    block = {"use_attention_bias": True, "use_feedforward_bias": True, "block_size": 8, "fam_length": 2,
             "memory_update": "hard_gate", "fam_gate": -1.0}  # fmt: skip
    experts = keras_fam.MixtureOfExperts(2, 32, use_bias=True, shared_intermediate_dim=32)
    block["layer_settings"] = [{}, {"feed_forward": experts}]
    backbone = keras_fam.TransformerFAMBackbone(**SETTINGS, **block, tie_weights=False)
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.build()
    layouts = backbone.get_layout_map(mesh())
    found = {variable.path: layouts[variable.path] for variable in lm.trainable_variables}
    used = {id(layout) for layout in found.values() if layout is not None}
    assert used == {id(layouts[pattern]) for pattern in WEIGHTS}
    for variable in lm.trainable_variables:
        layout = found[variable.path]
        assert layout is None or len(layout.axes) == len(variable.shape), variable.path


def test_settings_keep_axes_whole_that_do_not_divide():
    layouts = keras_fam.layout_map(mesh(), {**SETTINGS, "num_key_value_heads": 1, "fam_length": 4})
    assert layouts["block_0/attention/key/kernel"].axes == ("batch", None, None)
    assert layouts["block_0/attention/query/kernel"].axes == ("batch", "model", None)


def test_names_of_axes():
    layouts = keras_fam.layout_map(
        mesh(names=("data", "tensor")), model_parallel_dim_name="tensor", data_parallel_dim_name="data"
    )
    assert layouts["block_0/up/kernel"].axes == ("data", "tensor")
    with pytest.raises(ValueError, match=r"'batch'.*of size 1"):
        keras_fam.layout_map(mesh(names=("data", "model")))
    with pytest.raises(ValueError, match=r"DeviceMesh; received list"):
        keras_fam.layout_map([1, 2])


def test_states_lie_along_the_rows():
    """Rows over the batch axis, heads over the model axis where they divide; no layout without a distribution."""
    assert state_layout("key", (8, 16, 4, 4)) is None
    parallel = keras.distribution.ModelParallel(layout_map=keras_fam.layout_map(mesh()), batch_dim_name="batch")
    with parallel.scope():
        assert state_layout("key", (8, 16, 4, 4)).axes == ("batch", None, "model", None)
        assert state_layout("key", (1, 16, 2, 4)).axes == (None, None, None, None)
        assert state_layout("fam", (8, 4, 16)).axes == ("batch", None, None)
        assert state_layout("offset", (8,)).axes == ("batch",)
    layout = keras.distribution.TensorLayout(("batch", "model"), mesh())
    assert fitted(layout, (3, 8)).axes == (None, "model")
