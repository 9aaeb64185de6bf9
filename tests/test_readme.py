"""The README's Python runs, in order, as one program; what needs a download or a server is left out by name."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
# Pre-trained weights, several devices, minutes of training: such blocks are compiled and not run.
LEFT_OUT = ("from_preset", "enable_lora", "DeviceMesh", "SaveProgress", "keras_fam.evaluate")


def blocks():
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    pytest.importorskip("keras_hub")
    monkeypatch.chdir(tmp_path)
    names, ran = {}, 0
    for block in blocks():
        compile(block, "README.md", "exec")
        if not any(word in block for word in LEFT_OUT):
            exec(block, names)
            ran += 1
    assert ran >= 3
    assert (tmp_path / "session.safetensors").exists()
    assert [int(n) for n in names["stream"].position] == 2 * [int(names["stream"].position[0])]
