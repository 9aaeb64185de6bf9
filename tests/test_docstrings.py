"""The examples in docstrings: all of them name what exists, and those of the classes that users meet first run."""

import ast
import importlib
import inspect
import pathlib
import re

import keras
import numpy as np
import pytest
from support import on_one_backend

import keras_fam

PACKAGE = pathlib.Path(keras_fam.__file__).parent
RUN = {
    "StreamingModel": keras_fam.StreamingModel,
    "Sampler": keras_fam.samplers.Sampler,
    "TransformerFAMCausalLM": keras_fam.TransformerFAMCausalLM,
    "convert": keras_fam.hub.convert,
}


def examples(docstring):
    """The code blocks of a docstring, without those that begin by saying that they download something."""
    blocks = re.findall(r"```python\n(.*?)```", inspect.cleandoc(docstring or ""), flags=re.S)
    return [block for block in blocks if not block.lstrip().startswith("# downloads")]


@pytest.mark.parametrize("name", RUN)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"keras_fam": keras_fam, "keras": keras, "np": np}
    if name == "convert":
        names["keras_hub"] = pytest.importorskip("keras_hub")
    blocks = examples(inspect.getdoc(RUN[name]))
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    if name == "StreamingModel":
        assert names["logits"].shape == (2, 50, 100) and [len(row) for row in names["tokens"]] == [20, 20]
    if name == "Sampler":
        stream = names.setdefault("stream", keras_fam.StreamingModel(_lm(), 1))
        assert 3 not in stream.generate([[1, 2]], max_new_tokens=30, sampler=names["Unlike"](3))[0]
    if name == "TransformerFAMCausalLM":
        assert tuple(names["logits"].shape) == (1, 4, 50) and len(names["tokens"][0]) == 12
        assert names["tokens"][0][:3] == [5, 3, 8] and np.isfinite(names["history"].history["loss"][0])
        assert names["lm"].lora_layers() == {}, "the folder holds merged weights"
    if name == "convert":
        assert tuple(names["hidden"].shape) == (1, 20, 16)
        assert {id(v) for v in names["windowed"].weights} == {id(v) for v in names["source"].weights}


def _lm():
    return keras_fam.TransformerFAMCausalLM(keras_fam.TransformerFAMBackbone(7, 1, 8, 2, 8, block_size=8, fam_length=2))


@on_one_backend
@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_examples_name_what_exists(path):
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(path.read_text())):
        for block in examples(ast.get_docstring(node)) if isinstance(node, documented) else ():
            for part in ast.walk(ast.parse(block)):
                if isinstance(part, ast.Attribute) and ast.unparse(part).startswith("keras_fam."):
                    assert _exists(ast.unparse(part)), ast.unparse(part)


def _exists(dotted):
    """Whether `keras_fam.a.b` can be reached after `import keras_fam`, arguments and calls aside."""
    found = keras_fam
    for name in re.sub(r"\(.*", "", dotted, flags=re.S).split(".")[1:]:
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
        if inspect.ismodule(found):
            importlib.import_module(found.__name__)
    return True
