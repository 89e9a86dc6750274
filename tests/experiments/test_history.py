"""Every mistake of docs/history.md has a test that says it guards against it."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.paths import REPOSITORY

TABLE = REPOSITORY / "docs" / "history.md"
LATER: dict[int, str] = {}
"""Numbers without a test as yet, and why."""


def guarded() -> dict[int, list[str]]:
    """Tests by the numbers their docstrings name."""
    found: dict[int, list[str]] = {}
    for path in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                named = re.findall(r"HISTORY ([\d, and]+)", ast.get_docstring(node) or "")
                for number in re.findall(r"\d+", " ".join(named)):
                    found.setdefault(int(number), []).append(f"{path.name}::{node.name}")
    return found


@pytest.mark.parametrize("number", range(1, 19))
def test_every_mistake_has_a_test(number):
    if number in LATER:
        pytest.skip(LATER[number])
    assert guarded().get(number), f"no test names HISTORY {number}"


def test_the_table_lists_the_same_numbers():
    if not TABLE.is_file():
        pytest.skip("the documentation is not beside the tests")
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|", TABLE.read_text(encoding="utf-8"), re.MULTILINE)]
    assert rows == list(range(1, 19))
    assert set(guarded()) <= set(rows)
