"""``lm-ortho cache``: the decompositions kept between runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lm_ortho.checkpoint.cache import Entry

WARNING = "Entries hold the memory in clear, as `--log_samples` files do; keep the folder to yourself."

app = typer.Typer(help="The decompositions kept between runs.", no_args_is_help=True)


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
    used = sum(entry.bytes for entry in entries)
    typer.echo(f"{len(entries)} entries, {_megabytes(used)} of {_megabytes(limit)}, in {folder}")
    typer.echo(WARNING)


@app.command("clear")
def clear() -> None:
    """Remove every cached decomposition."""
    from lm_ortho.checkpoint import cache

    removed = cache.clear()
    freed = sum(entry.bytes for entry in removed)
    typer.echo(f"removed {len(removed)} entries, {_megabytes(freed)}, from {cache.cache_dir()}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _print_table(entries: list[Entry]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("entry", "size", "last used", "what"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        used = datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
        table.add_row(entry.key[:12], _megabytes(entry.bytes), used, entry.description)
    Console().print(table)
