"""The import rules of docs/architecture.md, read from the syntax trees of the sources."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import qmamba_cli

PACKAGE = Path(qmamba_cli.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Top-level module or package → its layer; imports go strictly downward.
LAYERS = {
    "__init__": 0,
    "errors": 0,
    "progress": 0,
    "config": 1,
    "sites": 1,
    "modes": 1,
    "resources": 1,
    "quant": 1,
    "kernels": 2,
    "artifacts": 2,
    "model": 3,
    "evaluation": 3,
    "text": 3,
    "tokenizer": 3,
    "html": 3,
    "stages": 4,
    "cli": 5,
    "options": 5,
    "commands": 5,
    "views": 5,
    "lm_eval": 5,
    "console": 5,
    "__main__": 5,
}
EDGE = 5
# Imports that strictly downward would allow, and that are refused.
REFUSED = {(unit, "artifacts") for unit in ("model", "evaluation", "text", "tokenizer")} | {
    ("cli", "kernels"),
    ("console", "kernels"),
    ("commands", "kernels"),
    ("views", "kernels"),
}
# Imports inside a layer.
SIBLINGS = {
    ("modes", "quant"),
    ("quant", "sites"),
    ("evaluation", "text"),
    ("evaluation", "tokenizer"),
    ("text", "tokenizer"),
    ("cli", "console"),
    ("cli", "commands"),
    ("cli", "views"),
    ("commands", "console"),
    ("commands", "options"),
    ("commands", "views"),
    ("views", "console"),
    ("__main__", "cli"),
}
# Packages a unit may import beside the standard library; a unit not listed may import any dependency.
LIBRARIES = {
    "__init__": set(),
    "errors": set(),
    "progress": set(),
    "config": set(),
    "sites": set(),
    "modes": set(),
    "resources": set(),
    "quant": {"numpy", "torch"},
    "kernels": {"numpy", "torch", "cupy", "cupy_backends", "cuda", "triton"},
    "model": {"numpy", "torch"},
    "html": {"jinja2"},
}
# Units that never touch a file.
NO_FILES = {"errors", "progress", "config", "sites", "modes", "quant", "model", "html"}
FILE_MODULES = {"io", "os", "pathlib", "shutil", "tempfile", "safetensors", "json"}
# Files of the kernels that may import CuPy; NVRTC by itself compiles where there is no GPU.
CUPY = {
    "cupy": {"cuda.py", "_launch.py", "_cache.py"},
    "cupy_backends": {"cuda.py", "_launch.py", "_compile.py"},
}
CONSOLE_ONLY = {"typer", "rich", "click"}
# Slow to import, or not always installed: only inside the function that needs them.
LAZY = {
    *("cupy", "cupy_backends", "cuda", "triton"),
    *("datasets", "transformers", "huggingface_hub", "lm_eval", "scipy", "jinja2"),
}
# Modules that are themselves only imported where their library is wanted.
ENTRANCES = {
    *("evaluation/harness.py", "lm_eval.py"),
    *("kernels/linear/triton_matmul.py", "kernels/linear/triton_float.py"),
}
MAX_LINES = 450


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def label(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


each_source = pytest.mark.parametrize("path", SOURCES, ids=label)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_in(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted name and line of every import below a node; ``from a import b`` counts as a.b."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import"
            yield from ((f"{child.module}.{alias.name}", child.lineno) for alias in child.names)


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    for name, line in imports_in(tree_of(path)):
        top, _, rest = name.partition(".")
        if top == "qmamba_cli":
            unit = rest.partition(".")[0]
            # ``from qmamba_cli import __version__`` reads the package itself.
            yield (
                (unit if (PACKAGE / unit).is_dir() or (PACKAGE / f"{unit}.py").is_file() else "__init__"),
                line,
            )


def eager_imports(body: list[ast.stmt]) -> Iterator[tuple[str, int]]:
    """Imports that run when the module is imported."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from eager_imports(statement.orelse)
        elif isinstance(statement, ast.ClassDef | ast.If | ast.Try | ast.With):
            for field in ("body", "orelse", "finalbody"):
                yield from eager_imports(getattr(statement, field, []))
            for handler in getattr(statement, "handlers", []):
                yield from eager_imports(handler.body)
        else:
            yield from imports_in(statement)


def is_attribute(node: ast.AST, *dotted: str) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) in dotted


@each_source
def test_every_module_has_a_layer(path):
    assert unit_of(path) in LAYERS, f"give `{unit_of(path)}` a layer in {Path(__file__).name}"


@each_source
def test_imports_go_downward(path):
    unit = unit_of(path)
    for imported, line in own_imports(path):
        if imported == unit:
            continue
        pair = (unit, imported)
        assert imported in LAYERS, f"give `{imported}` a layer in {Path(__file__).name}"
        allowed = LAYERS[imported] < LAYERS[unit] or pair in SIBLINGS
        assert allowed and pair not in REFUSED, f"{label(path)}:{line}: {unit} must not import {imported}"


@each_source
def test_libraries_belong_to_the_layer(path):
    unit = unit_of(path)
    for name, line in imports_in(tree_of(path)):
        top = name.partition(".")[0]
        where = f"{label(path)}:{line}: {top}"
        if top in CONSOLE_ONLY:
            assert LAYERS[unit] == EDGE, f"{where} belongs to the command line"
        if top in CUPY:
            assert unit == "kernels" and path.name in CUPY[top], f"{where} belongs to {sorted(CUPY[top])}"
        if unit in NO_FILES:
            assert top not in FILE_MODULES, f"{where}: {unit} never touches a file"
        if unit in LIBRARIES and top not in sys.stdlib_module_names and top != "qmamba_cli":
            assert top in LIBRARIES[unit], f"{where} is not among the libraries of {unit}"


@each_source
def test_slow_libraries_are_imported_where_they_are_needed(path):
    if label(path) in ENTRANCES:
        return
    for name, line in eager_imports(tree_of(path).body):
        assert name.partition(".")[0] not in LAZY, f"{label(path)}:{line}: import {name} inside its function"


@pytest.mark.parametrize("path", [path for path in SOURCES if LAYERS.get(unit_of(path), 0) < EDGE], ids=label)
def test_nothing_below_the_command_line_prints_exits_or_reads_the_environment(path):
    for node in ast.walk(tree_of(path)):
        where = f"{label(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"print", "exit", "quit", "input", "SystemExit"}, f"{where}: a call"
        assert not is_attribute(
            node, "os.environ", "os.getenv", "os.environb", "sys.exit", "sys.argv", "sys.stdout", "sys.stderr"
        ), f"{where}: {ast.unparse(node)}"
    for name, line in imports_in(tree_of(path)):
        assert name not in {"os.environ", "os.getenv", "sys.exit"}, f"{label(path)}:{line}: {name}"


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if unit_of(path) in NO_FILES | {"kernels"}], ids=label
)
def test_the_calculating_units_open_no_file(path):
    calls = [node.func for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    assert not [name for name in calls if isinstance(name, ast.Name) and name.id == "open"]


@each_source
def test_modules_stay_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{label(path)}: {lines} lines, split it"


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if unit_of(path) in {"model", "kernels", "stages"}], ids=label
)
def test_no_branch_on_the_name_of_a_mode(path):
    for node in ast.walk(tree_of(path)):
        match node:
            case ast.Compare():
                tested = [node]
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                tested = [test]
            case ast.Match(subject=subject):
                tested = [subject]
            case ast.Subscript(slice=index):
                tested = [index]
            case _:
                continue
        text = " ".join(ast.unparse(part) for part in tested)
        assert not re.search(r"\bmode\.name\b|\bmode (==|!=|in) ['\"(\[{]", text), f"{label(path)}: {text}"


def test_the_light_modules_do_not_import_torch():
    light = ", ".join(f"qmamba_cli.{name}" for name in ("errors", "config", "sites", "modes", "resources"))
    code = f"import sys, {light}; print(sorted({{'torch', 'cupy', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
