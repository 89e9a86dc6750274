"""Light imports load no heavy library, and the lowest packages depend on torch alone."""

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

HEAVY_PACKAGES = {"accelerate", "datasets", "lm_eval", "numpy", "peft", "scipy", "sklearn", "torch", "transformers"}
# Modules of this project that each low package may import. Of other packages only torch is allowed, and Triton in the
# GPU kernels.
FOUNDATIONS = {"lm_ortho.dial", "lm_ortho.errors"}
LOW_PACKAGES = {
    "kernels": set(),
    "lm_ortho/streams": FOUNDATIONS | {"lm_ortho.streams", "lm_ortho.kernels"},
    "lm_ortho/layer": FOUNDATIONS | {"lm_ortho.layer", "lm_ortho.streams", "lm_ortho.kernels"},
}


def _list_loaded_modules(code: str) -> set[str]:
    """Names of the modules that ``code`` loads in a fresh interpreter."""
    script = f"import sys; before = set(sys.modules)\n{code}\nprint(*sorted(set(sys.modules) - before))"
    process = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "LM_ORTHO_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(process.stdout.split())


def _select_heavy(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} & HEAVY_PACKAGES


@pytest.mark.parametrize(
    "module",
    ["lm_ortho", "lm_ortho.errors", "lm_ortho.plugin.bridges", "lm_ortho.config", "lm_ortho.cli.app"],
)
def test_import_loads_nothing_heavy(module: str) -> None:
    assert _select_heavy(_list_loaded_modules(f"import {module}")) == set()


def test_the_start_up_line_loads_three_small_modules() -> None:
    line = (REPOSITORY / "lm_ortho.pth").read_text()
    assert line.count("\n") == 1
    assert line.startswith("import ")
    expected = {"lm_ortho", "lm_ortho.plugin", "lm_ortho.plugin.startup"}
    script = f"import sys; sys.modules.pop('lm_ortho', None)\n{line}"
    assert _list_loaded_modules(script) | expected == expected


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
    assert {name for node in tree.body for name in _list_imports(node, "lm_ortho.plugin")} == {"os", "sys"}


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


def _list_imports(node: ast.AST, package: str) -> Iterator[str]:
    """Absolute names that one import statement loads; nothing for other nodes."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        yield ".".join([*above, *filter(None, [node.module])])


@pytest.mark.parametrize("folder", sorted(LOW_PACKAGES))
def test_low_packages_need_torch_and_the_standard_library_only(folder: str) -> None:
    files = sorted((REPOSITORY / folder).rglob("*.py"))
    assert files
    for file in files:
        package = ".".join(file.parent.relative_to(REPOSITORY).parts)
        allowed_packages = {"torch", *sys.stdlib_module_names} | ({"triton"} if package == "kernels.cuda" else set())
        for node in ast.walk(ast.parse(file.read_text())):
            for name in _list_imports(node, package):
                is_internal = name.startswith("lm_ortho")
                is_allowed = (
                    _is_in_packages(name, LOW_PACKAGES[folder])
                    if is_internal
                    else name.split(".")[0] in allowed_packages | {folder}
                )
                assert is_allowed, f"{file.relative_to(REPOSITORY)} imports {name}"


def _is_in_packages(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)
