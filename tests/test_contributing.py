"""The steps of CONTRIBUTING.md for a new task run without changes."""

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

COPIED_PATHS = (
    "docs",
    "kernels",
    "lm_ortho",
    "scripts",
    "tasks",
    "tests",
    "CHANGELOG.md",
    "README.md",
    "pyproject.toml",
)
WEIGHTS = "weights"
"""A large folder that is linked, not copied."""


def steps(title: str) -> list[str]:
    """The text of the numbered steps of a section."""
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
    """A copy of the repository as a contributor sees it, without version control and caches."""
    for name in COPIED_PATHS:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", WEIGHTS))
        else:
            shutil.copy(source, tmp_path / name)
    heavy = Path("lm_ortho", "world", WEIGHTS)
    (tmp_path / heavy).symlink_to(REPOSITORY / heavy)
    return tmp_path


def run(command: str, tree: Path) -> None:
    """Runs a code block in the copy, with the programs of this environment, and shows its output if it fails."""
    dropped_names = {"LM_ORTHO_AUTOLOAD", "PYTEST_ADDOPTS"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped_names}
    programs = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent), environment["PATH"]]
    environment |= {"PATH": os.pathsep.join(programs), "PYTHONPATH": str(tree)}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    shell = ["bash", "-euo", "pipefail", "-c", command]
    process = subprocess.run(shell, cwd=tree, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, f"{command}\n{process.stdout}\n{process.stderr}"


def is_measuring(command: str) -> bool:
    return command.startswith("lm_eval --model")


@pytest.mark.slow
@pytest.mark.parametrize("measuring", [False, True], ids=["check", "measure"])
def test_the_steps_of_adding_a_task(tree: Path, measuring: bool) -> None:
    documented_commands = [command for step in steps("Adding a task") for command in commands(step)]
    assert [is_measuring(command) for command in documented_commands] == [False, False, False, False, True]
    for command in documented_commands:
        if measuring or not is_measuring(command):
            run(command, tree)
    file_names = sorted(path.name for path in (tree / "tasks" / "rivers").iterdir())
    assert file_names == ["README.md", "rivers_forget.yaml", "rivers_retain.yaml"]
    rows = [line for line in (tree / "docs" / "tasks.md").read_text().splitlines() if "rivers_" in line]
    assert len(rows) == 2
    assert all("| two rivers that do not exist, made up for this page | CC0-1.0 |" in row for row in rows)


def test_a_failing_command_fails_the_test(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no such thing"):
        run("echo no such thing\nfalse\ntrue", tmp_path)


@pytest.mark.parametrize("title", ["Adding a sieve", "Adding a task", "Adding a metric", "Adding a command"])
def test_steps_are_numbered(title: str) -> None:
    assert len(steps(title)) >= 4


def test_files_that_the_steps_name_exist() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:lm_ortho|tasks|tests|docs|scripts)/[\w/.]+)`", text))
    created_paths = {"tasks/rivers/README.md"}
    assert [path for path in sorted(paths - created_paths) if not (REPOSITORY / path).exists()] == []
