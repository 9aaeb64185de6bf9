"""The examples in docstrings of public classes run."""

import inspect
import re

import numpy as np
import pytest

import keras_fam

OBJECTS = [keras_fam.StreamingModel, keras_fam.samplers.Sampler]


@pytest.mark.parametrize("thing", OBJECTS, ids=lambda x: x.__name__)
def test_examples_run(thing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", inspect.getdoc(thing), flags=re.S)
    assert blocks
    import keras

    names = {"keras_fam": keras_fam, "keras": keras, "np": np}
    for block in blocks:
        exec(compile(block, thing.__name__, "exec"), names)
    if thing is keras_fam.StreamingModel:
        assert names["logits"].shape == (2, 50, 100) and [len(row) for row in names["tokens"]] == [20, 20]
    if thing is keras_fam.samplers.Sampler:
        stream = names.setdefault("stream", keras_fam.StreamingModel(_lm(), 1))
        assert 3 not in stream.generate([[1, 2]], max_new_tokens=30, sampler=names["Unlike"](3))[0]


def _lm():
    return keras_fam.TransformerFAMCausalLM(keras_fam.TransformerFAMBackbone(7, 1, 8, 2, 8, block_size=8, fam_length=2))
