"""The shape of the house: imports point one way, backend code stands in a few places, modules stay readable."""

import ast
import pathlib
import sys

import pytest
from support import on_one_backend

pytestmark = on_one_backend
PACKAGE = pathlib.Path(__file__).parents[1] / "keras_fam"
MODULES = sorted(PACKAGE.rglob("*.py"))
# A module imports only from groups that stand before its own, or from its own group.
ORDER = [
    *("ops.torch_passes", "ops.torch_graph", "ops.torch_loop", "ops.backend", "state"),
    *("distribution.state_sharding", "ops"),
    *("distribution.processes", "utils", "tasks", "layers", "training.process_training"),
    *("streaming.session", "streaming.samplers", "streaming.text", "streaming.sampling", "streaming.hub_samplers"),
    *(
        "streaming.decoding",
        "streaming.generation",
        "training.batches",
        "training.callback_model",
        "training.checked_inputs",
    ),
    *("training.dataset_position", "training.stateful", "training.stream_fit", "streaming", "models.configs"),
    *("distribution", "models", "baselines", "training", "data", "testing", "evaluation", "export", "serve", "hub", ""),
]
BACKEND_PLACES = {"ops/backend.py", "ops/processes.py", "ops/scan.py"}
BACKEND_PLACES |= {"ops/torch_graph.py", "ops/torch_passes.py", "ops/torch_loop.py"}
BACKEND_PLACES |= {
    "ops/attention.py",
    "ops/attention_kernels.py",
    "ops/block_attention.py",
    "distribution/fully_sharded.py",
}
BACKENDS = {"jax", "torch", "tensorflow"}


def group(name):
    """Rank of a dotted module name below keras_fam."""
    for rank, prefix in enumerate(ORDER):
        if name == prefix or (prefix and name.startswith(prefix + ".")):
            return rank
    raise AssertionError(f"{name} has no place in the order of modules")


def dotted(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node, node.module
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = group(dotted(path))
    known = {dotted(p) for p in MODULES}
    for _, name in imports(ast.parse(path.read_text())):
        if name.startswith("keras_fam."):
            name = name.removeprefix("keras_fam.")
            if name in known and name:
                assert group(name) <= own, f"{dotted(path)} imports {name}, which stands further down"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_backend_code_stands_in_a_few_places(path):
    place = path.relative_to(PACKAGE).as_posix()
    text = path.read_text()
    tree = ast.parse(text)
    named = {name.split(".")[0] for _, name in imports(tree)} & BACKENDS
    if place not in BACKEND_PLACES and not place.startswith("export/"):
        assert not named, f"{place} imports {named}"
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Compare)):
            assert "backend()" not in ast.unparse(call), f"{place} branches on the backend"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_core_needs_keras_and_numpy_alone(path):
    tree = ast.parse(path.read_text())
    allowed = {"keras", "numpy", "keras_fam"}
    at_import = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    for _, name in imports(at_import):
        root = name.split(".")[0]
        assert root in sys.stdlib_module_names or root in allowed, f"{path.name} needs {root}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 400


def test_public_names():
    import keras_fam

    for name in keras_fam.__all__:
        assert getattr(keras_fam, name).__doc__, name
