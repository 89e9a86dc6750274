"""``lm-ortho cache``: lists and deletes cached decompositions."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lm_ortho.checkpoint.cache import Entry

WARNING = "Entries hold the memory in clear, as `--log_samples` files do; do not share the folder."

app = typer.Typer(help="Manage the decompositions cached between runs.", no_args_is_help=True)


@app.command("list")
def list_cached(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the cached decompositions, the least recently used first."""
    from lm_ortho.checkpoint import cache

    entries, folder, limit = cache.list_entries(), cache.cache_dir(), cache.size_limit()
    if as_json:
        rows = [asdict(entry) | {"path": str(entry.path)} for entry in entries]
        report = {"folder": str(folder), "limit": limit, "entries": rows, "warning": WARNING}
        typer.echo(json.dumps(report, indent=2))
        return
    if entries:
        _print_table(entries)
    size = sum(entry.bytes for entry in entries)
    typer.echo(f"{len(entries)} entries, {_format_megabytes(size)} of {_format_megabytes(limit)}, in {folder}")
    typer.echo(WARNING)


@app.command("clear")
def clear() -> None:
    """Delete every cached decomposition."""
    from lm_ortho.checkpoint import cache

    entries = cache.clear()
    size = sum(entry.bytes for entry in entries)
    typer.echo(f"removed {len(entries)} entries, {_format_megabytes(size)}, from {cache.cache_dir()}")


def _format_megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _print_table(entries: list[Entry]) -> None:
    from rich.console import Console
    from rich.table import Table

    from lm_ortho.markup import terminal_text

    table = Table(box=None, pad_edge=False)
    for column in ("entry", "size", "last used", "description"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        last_used = datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
        table.add_row(
            entry.key[:12], _format_megabytes(entry.bytes), last_used, terminal_text(entry.description, limit=200)
        )
    Console().print(table)
