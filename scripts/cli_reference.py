#!/usr/bin/env python
"""Writes docs/cli.md, the reference of the command line, from the commands themselves.

    python scripts/cli_reference.py

A test fails while the page differs from what this would write.
"""

from __future__ import annotations

from inspect import cleandoc
from pathlib import Path
from typing import Any

import typer

from lm_ortho.cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# Command line

Written by `python scripts/cli_reference.py`; do not edit. Bad input ends in one line `error: ...` and exit code 1,
an option that is missing or unknown with the usage and exit code 2.
"""


def page() -> str:
    """The page: a section per command with its arguments and options."""
    return HEAD + "".join(_sections(typer.main.get_command(app), "lm-ortho"))


def _sections(command: Any, name: str) -> list[str]:
    below = getattr(command, "commands", None)
    if below is None:
        return [_section(command, name)]
    return [text for part, each in below.items() for text in _sections(each, f"{name} {part}")]


def _section(command: Any, name: str) -> str:
    context = typer.Context(command, info_name=name)
    told = [param.get_help_record(context) for param in command.params]
    rows = [f"| `{option}` | {_cell(text)} |\n" for option, text in filter(None, told)]
    table = "\n| | |\n|---|---|\n" + "".join(rows) if rows else ""
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    return f"\n## {name.removeprefix('lm-ortho ')}\n\n    {usage}\n\n{cleandoc(command.help or '')}\n{table}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
