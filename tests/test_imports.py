"""Importing little loads little, and the low rooms depend on torch alone."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lm_ortho
from tests.support.paths import REPOSITORY

HEAVY = {"accelerate", "datasets", "lm_eval", "numpy", "peft", "scipy", "sklearn", "torch", "transformers"}
# What each low room may import of ours; of others only torch and the standard library, and the GPU kernels Triton.
FOUNDATIONS = {"lm_ortho.errors"}
LOW_ROOMS = {
    "kernels": set(),
    "lm_ortho/streams": FOUNDATIONS | {"lm_ortho.streams", "lm_ortho.kernels"},
    "lm_ortho/layer": FOUNDATIONS | {"lm_ortho.layer", "lm_ortho.streams", "lm_ortho.kernels"},
}


def _loaded_by(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has after ``code`` and had not before it."""
    script = f"import sys; before = set(sys.modules)\n{code}\nprint(*sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "LM_ORTHO_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(done.stdout.split())


def _heavy(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} & HEAVY


@pytest.mark.parametrize(
    "module",
    ["lm_ortho", "lm_ortho.errors", "lm_ortho.plugin.bridges", "lm_ortho.config", "lm_ortho.cli.app"],
)
def test_import_loads_nothing_heavy(module: str) -> None:
    assert _heavy(_loaded_by(f"import {module}")) == set()


def test_the_start_up_line_loads_three_small_modules() -> None:
    line = (REPOSITORY / "lm_ortho.pth").read_text()
    assert line.count("\n") == 1
    assert line.startswith("import ")
    ours = {"lm_ortho", "lm_ortho.plugin", "lm_ortho.plugin.startup"}
    script = f"import sys; sys.modules.pop('lm_ortho', None)\n{line}"
    assert _loaded_by(script) | ours == ours


def test_the_start_up_line_survives_a_missing_package(tmp_path: Path) -> None:
    line = (REPOSITORY / "lm_ortho.pth").read_text()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-I", "-c", line], check=True, env=environment, cwd=tmp_path, timeout=60)


def test_both_start_up_files_name_the_same_function() -> None:
    (reference,) = (REPOSITORY / "lm_ortho.start").read_text().split()
    module, _, function = reference.partition(":")
    assert f"from {module} import {function}" in (REPOSITORY / "lm_ortho.pth").read_text()


def test_the_hook_imports_only_sys_and_os_until_it_is_called() -> None:
    tree = ast.parse((REPOSITORY / "lm_ortho/plugin/startup.py").read_text())
    assert {name for node in tree.body for name in _imported(node, "lm_ortho.plugin")} == {"os", "sys"}


def test_public_names_are_listed_and_lazy() -> None:
    assert set(lm_ortho.__all__) <= set(dir(lm_ortho))
    assert set(lm_ortho._HOMES) | {"__version__"} == set(lm_ortho.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lm_ortho.nonsense  # noqa: B018


@pytest.mark.parametrize("name", sorted(lm_ortho._HOMES))
def test_public_names_exist(name: str) -> None:
    assert getattr(lm_ortho, name).__name__ == name


def test_a_public_function_is_not_hidden_by_the_module_of_its_name() -> None:
    for name in lm_ortho.__all__:
        assert importlib.util.find_spec(f"lm_ortho.{name}") is None


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    """Absolute names that one import statement loads; nothing for other nodes."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        yield ".".join([*above, *filter(None, [node.module])])


@pytest.mark.parametrize("room", sorted(LOW_ROOMS))
def test_low_rooms_need_torch_and_the_standard_library_only(room: str) -> None:
    files = sorted((REPOSITORY / room).rglob("*.py"))
    assert files
    for file in files:
        package = ".".join(file.parent.relative_to(REPOSITORY).parts)
        allowed = {"torch", *sys.stdlib_module_names} | ({"triton"} if package == "kernels.cuda" else set())
        for node in ast.walk(ast.parse(file.read_text())):
            for name in _imported(node, package):
                ours = name.startswith("lm_ortho")
                known = _in_rooms(name, LOW_ROOMS[room]) if ours else name.split(".")[0] in allowed | {room}
                assert known, f"{file.relative_to(REPOSITORY)} imports {name}"


def _in_rooms(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)
