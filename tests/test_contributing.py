"""The steps of CONTRIBUTING.md for a new task, run as they are written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

COPIED = ("docs", "kernels", "lm_ortho", "scripts", "tasks", "tests", "CHANGELOG.md", "README.md", "pyproject.toml")
HEAVY = "weights"
"""A folder that is linked, not copied."""


def steps(title: str) -> list[str]:
    """The numbered steps of a section, as they are written."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text.split(f"\n## {title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    parts = re.split(r"^(\d+)\. ", section, flags=re.MULTILINE)
    assert parts[1::2] == [str(number) for number in range(1, len(parts) // 2 + 1)]
    return parts[2::2]


def commands(step: str) -> list[str]:
    """The code blocks of a step, without the indentation of the list."""
    return [textwrap.dedent(block) for block in re.findall(r"^ *```bash\n(.*?)^ *```$", step, re.DOTALL | re.MULTILINE)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a contributor works on, without version control and caches."""
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", HEAVY))
        else:
            shutil.copy(source, tmp_path / name)
    heavy = Path("lm_ortho", "world", HEAVY)
    (tmp_path / heavy).symlink_to(REPOSITORY / heavy)
    return tmp_path


def run(command: str, tree: Path) -> None:
    """Runs a code block in the copy, with the programs of this environment, and fails with what it printed."""
    dropped = {"LM_ORTHO_AUTOLOAD", "PYTEST_ADDOPTS"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    programs = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent), environment["PATH"]]
    environment |= {"PATH": os.pathsep.join(programs), "PYTHONPATH": str(tree)}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    shell = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(shell, cwd=tree, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def is_measuring(command: str) -> bool:
    return command.startswith("lm_eval --model")


@pytest.mark.parametrize("measuring", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["check", "measure"])
def test_the_steps_of_adding_a_task(tree: Path, measuring: bool) -> None:
    written = [command for step in steps("Adding a task") for command in commands(step)]
    assert [is_measuring(command) for command in written] == [False, False, False, False, True]
    for command in written:
        if measuring or not is_measuring(command):
            run(command, tree)
    made = sorted(path.name for path in (tree / "tasks" / "rivers").iterdir())
    assert made == ["README.md", "rivers_forget.yaml", "rivers_retain.yaml"]
    rows = [line for line in (tree / "docs" / "tasks.md").read_text().splitlines() if "rivers_" in line]
    assert len(rows) == 2
    assert all("| two rivers that do not exist, made up for this page | CC0-1.0 |" in row for row in rows)


def test_a_failing_command_fails_the_test(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no such thing"):
        run("echo no such thing\nfalse\ntrue", tmp_path)


@pytest.mark.parametrize("title", ["Adding a sieve", "Adding a task", "Adding a metric", "Adding a command"])
def test_steps_are_numbered(title: str) -> None:
    assert len(steps(title)) >= 4


def test_files_that_the_steps_name_are_there() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:lm_ortho|tasks|tests|docs|scripts)/[\w/.]+)`", text))
    made_by_the_steps = {"tasks/rivers/README.md"}
    assert [path for path in sorted(named - made_by_the_steps) if not (REPOSITORY / path).exists()] == []
