"""Rules of the code base that no other tool checks: circles between files, long calls, large classes, names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from lm_ortho.pipeline.code_hash import imported_modules, package_modules
from tests.support.paths import REPOSITORY

FOLDERS = ("lm_ortho", "kernels", "tests", "scripts", "experiments", "benchmarks")
PACKAGE = ("lm_ortho", "kernels", "scripts")
MAX_METHODS = 15
MAX_POSITIONAL = 5
DIALECT = set(
    "told kept given found wanted asked taken settled spoken heard lent dealt gone said theirs ours mine "
    "leavings halted".split()
)
"""Words that say what was done to a thing and not what it is; no name of ours is one of them."""
STORED = {("lm_ortho/baselines/kfac.py", "kept"), ("lm_ortho/cli/doctor.py", "found")}
"""Names that are keys of files or of printed JSON."""


@lru_cache
def trees(*folders: str) -> dict[str, ast.Module]:
    paths = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return {str(path.relative_to(REPOSITORY)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_no_two_files_import_each_other() -> None:
    """Imports inside functions count, and so do calls of ``import_module`` with a name of ours."""
    modules = package_modules()
    graph = dict[str, set[str]]()
    for module, path in modules.items():
        names = set(imported_modules(module, path))
        for call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if function == "import_module" and call.args and isinstance(call.args[0], ast.Constant):
                names.add(str(call.args[0].value))
        graph[module] = {name for name in names & modules.keys() if not f"{module}.".startswith(f"{name}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_call_has_more_than_five_positional_arguments(folder: str) -> None:
    long = [
        f"{file}:{call.lineno}"
        for file, tree in trees(folder).items()
        for call in calls(tree)
        if len(call.args) > MAX_POSITIONAL and not has_no_keywords(call, file)
    ]
    assert long == []


def has_no_keywords(call: ast.Call, file: str) -> bool:
    """Whether the arguments cannot have names: strategies and words of a command line, C functions, Triton kernels."""
    if isinstance(call.func, ast.Name) and call.func.id in {"given", "run"}:
        return file.startswith("tests/")
    return ast.unparse(call.func).startswith("functions.") or file.startswith("kernels/cuda/")


def test_no_class_has_more_than_fifteen_methods_without_a_reason() -> None:
    large = []
    for file, tree in trees(*PACKAGE).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
                if len(methods) > MAX_METHODS and "Many methods:" not in (ast.get_docstring(node) or ""):
                    large.append(f"{file}: {node.name} has {len(methods)}")
    assert large == []


def names_of(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that the file makes, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def test_names_say_what_a_thing_is() -> None:
    odd = [
        f"{file}:{line} {name}"
        for file, tree in trees(*PACKAGE).items()
        for name, line in names_of(tree)
        if name.strip("_").lower() in DIALECT and (file, name) not in STORED
    ]
    assert odd == []


@pytest.mark.parametrize("path", sorted((REPOSITORY / "tests").iterdir()), ids=lambda path: path.name)
def test_folders_of_tests_are_named_after_rooms(path: Path) -> None:
    others = {"support", "fuzz", "kernels", "experiments", "__pycache__"}
    assert not path.is_dir() or path.name in others or (REPOSITORY / "lm_ortho" / path.name).is_dir()
