"""``lm-ortho inspect``: what is in a checkpoint, and where the memory sits."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_ortho.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from lm_ortho.checkpoint.contents import CheckpointContents


def inspect(
    directory: Annotated[Path, typer.Argument(help="A decomposed checkpoint, with its ortho stream or without.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also draw where the memory sits, as an SVG file.")] = None,
) -> None:
    """Verify a checkpoint and say what is in it: per layer, in all, and where the memory sits.

    Per layer: density of the ortho stream, relative error of the base stream against alpha=1, share of codes that are
    0, bits per weight. Everything is counted from the files, one layer at a time.
    """
    from lm_ortho.checkpoint.contents import grid, read_contents
    from lm_ortho.checkpoint.heat_map import heat_map
    from lm_ortho.markdown import write_text

    found = read_contents(directory, trust_remote_code=trust_remote_code)
    if out is not None and not found.has_ortho:
        raise UserError(f"out={str(out)!r}: {directory} holds only the base stream; there is no memory to draw")
    if out is not None:
        write_text(out, heat_map(grid(found.layers), f"{directory.resolve().name}: where the memory sits"))
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        _print(found)


def _print(found: CheckpointContents) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_layer_table(found))
    if found.has_ortho:
        console.print("\nwhere the memory sits: share of weights in the ortho stream")
        console.print(_heat_table(found))
    console.print()
    for line in _totals(found):
        console.print(line, soft_wrap=True, markup=False)


def _layer_table(found: CheckpointContents) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for column in ("shape", "density", "error", "zero codes", "bits"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in found.layers:
        table.add_row(
            layer.name,
            "x".join(map(str, layer.shape)),
            _number(layer.density, "{:.3%}"),
            _number(layer.relative_error, "{:.3f}"),
            _number(None if layer.zeros is None else layer.zeros / layer.weights, "{:.1%}"),
            f"{layer.bits_per_weight:.2f}",
        )
    return table


def _heat_table(found: CheckpointContents) -> Table:
    from rich.table import Table
    from rich.text import Text

    from lm_ortho.checkpoint.contents import grid
    from lm_ortho.checkpoint.heat_map import percent

    cells = grid(found.layers)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("block", justify="right")
    for column in cells.columns:
        table.add_column(column.rpartition(".")[2] if _told_apart(cells.columns) else column, justify="right")
    for name, row in zip(cells.rows, cells.cells, strict=True):
        table.add_row(name, *(Text(percent(density), _style(density, cells.highest)) for density in row))
    return table


def _style(density: float | None, highest: float) -> str:
    from lm_ortho.checkpoint.heat_map import shade

    colour, ink = shade(density, highest)
    return f"{ink} on rgb({','.join(map(str, colour))})"


def _told_apart(names: list[str]) -> bool:
    """Whether the last parts are enough."""
    return len({name.rpartition(".")[2] for name in names}) == len(names)


def _totals(found: CheckpointContents) -> list[str]:
    streams = "base and ortho stream" if found.has_ortho else "base stream only: it serves alpha=0 and nothing else"
    if found.has_ortho and found.missing:
        streams += f", without {', '.join(found.missing)}, which can only be off"
    lattice = f"{found.bits} bits, groups of {found.group_size}" if found.bits != 16 else "16 bits, no lattice"
    shares = [f"zero codes {found.zero_codes:.1%}"] if found.zero_codes is not None else []
    if found.has_ortho:
        error = [f"relative error {found.relative_error:.4f}"] if found.relative_error is not None else []
        shares = [f"density {found.density:.4%}", *error, *shares]
    if len(found.memories) + len(found.missing) > 1:
        shares += [f"{name} {values / found.weights:.4%}" for name, values in found.memories.items()]
    sizes = {name: f"{size / 1e6:,.2f} MB" for name, size in found.bytes.items()}
    return [
        f"{found.directory}: {streams}; every file is as it was written",
        f"{len(found.layers)} layers, {found.weights:,} weights, {lattice}",
        *([", ".join(shares)] if shares else []),
        f"{found.bits_per_weight:.3f} bits per weight: base stream {sizes['base']}, ortho stream {sizes['ortho']}",
        f"{sizes['files']} in files, {sizes['other']} of it not decomposed",
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
