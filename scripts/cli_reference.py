#!/usr/bin/env python
"""Writes docs/cli.md, the reference of the command line, from the commands.

    python scripts/cli_reference.py

A test fails while the page is out of date.
"""

from __future__ import annotations

from inspect import cleandoc
from pathlib import Path
from typing import Any

import typer

from lm_ortho.cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# Command line

Written by `python scripts/cli_reference.py`; do not edit. Bad input ends with one line `error: ...` and exit code 1;
a missing or unknown option ends with the usage and exit code 2.
"""


def make_page() -> str:
    """Makes the page: a section per command with its arguments and options."""
    return HEAD + "".join(_make_sections(typer.main.get_command(app), "lm-ortho"))


def _make_sections(command: Any, name: str) -> list[str]:
    subcommands = getattr(command, "commands", None)
    if subcommands is None:
        return [_make_section(command, name)]
    return [
        section
        for subname, subcommand in subcommands.items()
        for section in _make_sections(subcommand, f"{name} {subname}")
    ]


def _make_section(command: Any, name: str) -> str:
    context = typer.Context(command, info_name=name)
    records = [param.get_help_record(context) for param in command.params]
    rows = [f"| `{option}` | {_format_cell(text)} |\n" for option, text in filter(None, records)]
    table = "\n| | |\n|---|---|\n" + "".join(rows) if rows else ""
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    return f"\n## {name.removeprefix('lm-ortho ')}\n\n    {usage}\n\n{cleandoc(command.help or '')}\n{table}"


def _format_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Writes the page."""
    PAGE.write_text(make_page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
