"""The examples: modules that define, and act only in `main`; commands that name them."""

import ast
import pathlib
import re

import pytest
from support import on_one_backend

from examples.verification import mutants

pytestmark = on_one_backend
ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "examples").rglob("*.py"))
SCRIPTS = [path for path in FILES if "__main__" in path.read_text()]
DEFINITIONS = (*(ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign),)


def name(path):
    return path.relative_to(ROOT).as_posix()


def calls_outside_functions(tree):
    """Calls that an import makes: those of the module's own statements, not those inside of functions."""
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.If):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_an_import_only_defines(path):
    """No arguments are parsed, no environment is changed and nothing is printed by an import; `sys` is not changed."""
    tree = ast.parse(path.read_text())
    docstring, *body = tree.body
    assert isinstance(docstring, ast.Expr) and ast.get_docstring(tree), "a module says what it is"
    if path == ROOT / "examples" / "__init__.py":
        return  # defaults of the environment, before a backend is imported
    for statement in body:
        if isinstance(statement, ast.If):
            assert ast.unparse(statement.test) == "__name__ == '__main__'", ast.unparse(statement.test)
            assert [ast.unparse(line) for line in statement.body] in (["main()"], ["sys.exit(main())"])
        else:
            assert isinstance(statement, DEFINITIONS), ast.unparse(statement)
    for call in calls_outside_functions(tree):
        assert "parse" not in call and "environ" not in call and call != "print", call
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            assert not any(ast.unparse(target).startswith(("sys.argv", "sys.path")) for target in targets)
        if isinstance(node, ast.Call):
            assert not ast.unparse(node.func).startswith("sys.path."), "modules are imported by their full names"


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_a_script_takes_its_arguments(path):
    """`main(argv=None)` parses what it is given, so that other programs and tests can call it, and shows a command."""
    tree = ast.parse(path.read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    if not found:  # the folder's command is that of one of its scripts
        assert path.name == "__main__.py" and "import main" in path.read_text()
        return
    (main,) = found
    assert ast.unparse(main.args) == "argv=None"
    assert "argv" in {node.id for node in ast.walk(main) if isinstance(node, ast.Name)}
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    assert f"python -m {module}" in ast.get_docstring(tree)


def test_commands_name_modules_that_exist():
    """In the Makefile, the README, the guides and the pages of results."""
    pages = [ROOT / "Makefile", ROOT / "README.md", *(ROOT / "examples").rglob("*.md"), *FILES]
    commands = [
        (page, found) for page in pages for found in re.findall(r"(?:-m|\(RUN\)) (examples[\w.]*)", page.read_text())
    ]
    assert len(commands) > 40
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in SCRIPTS}
    assert not [f"{name(page)}: {found}" for page, found in commands if found.rstrip(".") not in modules]


def test_the_index_lists_every_script():
    """With links that lead somewhere."""
    folder = ROOT / "examples"
    index = (folder / "README.md").read_text()
    for path in SCRIPTS:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path != folder / "passkey" / "__main__.py":  # the demo, which is listed by its own name
            assert f"python -m {module.removesuffix('.__main__')}" in index, module
    for link in re.findall(r"\]\(([^)#]+)\)", index):
        assert (folder / link).exists(), link


def test_every_fault_of_the_mutants_has_one_place():
    """Otherwise the command stops at the first one whose code has changed since."""
    package = ROOT / "keras_fam"
    assert not [m.name for m in mutants.MUTANTS if (package / m.file).read_text().count(m.old) != 1]
