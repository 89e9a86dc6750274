"""Hashes the code and lists the packages that decide a result, so that results of older code are recognised as stale.

The code is found by following imports, so moved and new files are never missed.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import lm_ortho
from lm_ortho.kernels import calls
from lm_ortho.plugin.bridges import find_tasks_dir

DECOMPOSITION = ("lm_ortho.pipeline.build",)
"""The module whose code, with all that it imports, decides what a decomposition is."""
EVALUATION = ("lm_ortho.harness", "tasks")
"""The package and the folder that decide what is measured of a model. How a model is made is not followed: a result
names its model by hash."""
_PACKAGE = Path(lm_ortho.__file__).parent
_KERNELS = Path(inspect.getfile(calls)).parent
_NO_CODE = (".md", ".pyc", ".so")
_DEPENDENCIES = ("lm_eval", "torch", "transformers")


def versions() -> dict[str, str]:
    """The versions of the packages that decide what is measured, by name."""
    return {"lm_ortho": lm_ortho.__version__, **{name: version(name) for name in _DEPENDENCIES}}


@lru_cache
def code_hash(*roots: str, without: tuple[str, ...] = ()) -> str:
    """SHA-256 of the files of ``code_files``, names and content."""
    digest = hashlib.sha256()
    for name, path in code_files(*roots, without=without).items():
        digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()


@lru_cache
def evaluation_hash() -> str:
    """Hash of the code that measures a model, whatever made the model."""
    return code_hash(*EVALUATION, without=("lm_ortho.pipeline",))


@lru_cache
def code_files(*roots: str, without: tuple[str, ...] = ()) -> dict[str, Path]:
    """Files of the ``roots`` and of all that they import, by a name that is the same on every machine.

    A root is a module, a package (with all modules in it), or ``tasks``, the folder of lm-eval tasks. Imports inside
    functions count; those for type checkers only do not. All files of the kernels count as soon as one is imported.
    The modules and packages of ``without`` are left out, and what only they import.

    Raises:
        ValueError: for a root, or an entry of ``without``, that names nothing.
    """
    files = dict[str, Path]()
    excluded = {module for root in without for module in _members(root, package_modules())}
    modules = {name: path for name, path in package_modules().items() if name not in excluded}
    pending = [module for root in roots if root != "tasks" for module in _members(root, modules)]
    while pending:
        module = pending.pop()
        path = modules[module]
        if (name := _name(path)) not in files:
            files[name] = path
            pending += [other for other in imported_modules(module, path) if other in modules]
    folders = [find_tasks_dir()] if "tasks" in roots else []
    folders += [_KERNELS] if any(path.is_relative_to(_KERNELS) for path in files.values()) else []
    files |= {_name(path): path for folder in folders for path in folder.rglob("*") if _is_code(path)}
    return dict(sorted(files.items()))


def _members(root: str, modules: dict[str, Path]) -> list[str]:
    """Names of the module ``root`` and of all modules below it. Raises ``ValueError`` if there is none."""
    members = [name for name in modules if name == root or name.startswith(f"{root}.")]
    if not members:
        raise ValueError(f"{root!r} names no module of lm_ortho")
    return members


@lru_cache
def package_modules() -> dict[str, Path]:
    """The files of the package and of the kernels, by module name."""
    folders = {"lm_ortho": _PACKAGE, "lm_ortho.kernels": _KERNELS}
    return {
        ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): path
        for package, folder in folders.items()
        for path in folder.rglob("*.py")
    }


@lru_cache
def imported_modules(module: str, path: Path) -> frozenset[str]:
    """Names that ``module`` may import: modules, the packages above them, and names inside modules."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set[str]()
    for node in _run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            names |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    parts = [name.split(".") for name in names]
    return frozenset(".".join(words[:length]) for words in parts for length in range(1, len(words) + 1))


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from _run_time_nodes(node)


def _name(path: Path) -> str:
    """The path of a file below the package, the kernels or the tasks, with the name of that folder in front."""
    folders = (folder for folder in (_PACKAGE, _KERNELS) if path.is_relative_to(folder))
    folder = next(folders, find_tasks_dir())
    return f"{folder.name}/{path.relative_to(folder).as_posix()}"


def _is_code(path: Path) -> bool:
    return path.is_file() and path.suffix not in _NO_CODE
