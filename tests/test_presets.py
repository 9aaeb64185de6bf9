"""Folders that hold a language model and its words."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from small_model import logits, model, shake, tokens, with_text
from support import close, numpy

import keras_fam

READER = """
import sys, numpy as np, keras, keras_fam
from keras_fam.ops.backend import compiled
lm = keras_fam.TransformerFAMCausalLM.from_preset(sys.argv[1])
read = compiled(lambda x: lm(x), lambda: lm.variables)
np.save(sys.argv[2], keras.ops.convert_to_numpy(read(np.load(sys.argv[3]))))
"""


def test_a_folder_holds_the_model_and_its_words(tmp_path):
    layers = [{"fam_gate": -1.0}, {"fam_gate": float("-inf")}]
    update = keras_fam.Average(0.2, learned=True)
    lm = with_text(memory_update=update, fam_query="anchored", layer_settings=layers)
    lm.enable_lora(2)
    shake(lm)
    expected = logits(lm)
    lm.save_to_preset(tmp_path)
    loaded = keras_fam.TransformerFAMCausalLM.from_preset(tmp_path)
    close(logits(loaded), expected, 1e-5)
    assert loaded.lora_layers() == {} and len(loaded.trainable_weights) == len(loaded.weights)
    assert numpy(loaded.preprocessor.tokenizer("ab a")).tolist() == [3, 5]
    assert keras_fam.TransformerFAMCausalLM.from_preset(tmp_path, preprocessor=None).preprocessor is None
    half = keras_fam.TransformerFAMBackbone.from_preset(tmp_path, dtype="bfloat16", blocks_per_step=2)
    assert half.compute_dtype == "bfloat16" and half.blocks_per_step == 2


def test_a_folder_loads_under_another_backend(tmp_path):
    lm = model()
    lm.save_to_preset(tmp_path / "preset")
    np.save(tmp_path / "x.npy", tokens())
    other = {"torch": "jax", "jax": "torch", "tensorflow": "torch"}[keras.backend.backend()]
    command = [sys.executable, "-c", READER, *(str(tmp_path / name) for name in ("preset", "y.npy", "x.npy"))]
    environment = {**os.environ, "KERAS_BACKEND": other, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    close(np.load(tmp_path / "y.npy"), logits(lm), 1e-5)


def test_a_folder_that_is_no_preset_is_refused(tmp_path, monkeypatch):
    load = keras_fam.TransformerFAMCausalLM.from_preset
    with pytest.raises(ValueError, match="is no folder"):
        load(tmp_path / "missing")
    with pytest.raises(ValueError, match="has none"):
        load(tmp_path)
    with_text().save_to_preset(tmp_path)
    with pytest.raises(ValueError, match=r"have no \['fam_lenght'\]"):
        load(tmp_path, fam_lenght=4)
    with pytest.raises(ValueError, match="at most `block_size`"):
        load(tmp_path, block_size=2)
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(ImportError, match=r"keras-fam\[hub\]"):
        load(tmp_path)
    path = tmp_path / "keras_fam.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "format": "keras_fam.preset/9"}))
    with pytest.raises(ValueError, match=r"reads 'keras_fam.preset/2'"):
        load(tmp_path)
    config = {**record["backbone"]["config"], "sparse_heads": 3}
    path.write_text(json.dumps({**record, "backbone": {**record["backbone"], "config": config}}))
    with pytest.raises(ValueError, match="does not know"):
        load(tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path)
    path.write_text(json.dumps(record))
    (tmp_path / "model.weights.h5").unlink()
    with pytest.raises(ValueError, match=r"no model.weights.h5"):
        load(tmp_path)


def test_a_preprocessor_without_a_saver_is_refused(tmp_path):
    lm = model()
    lm.preprocessor = len
    with pytest.raises(ValueError, match="received builtin_function_or_method"):
        lm.save_to_preset(tmp_path / "new")
    assert not (tmp_path / "new").exists()
