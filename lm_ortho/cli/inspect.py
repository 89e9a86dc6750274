"""``lm-ortho inspect``: verifies a checkpoint and prints its contents and where its memory is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_ortho.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from lm_ortho.checkpoint.contents import CheckpointContents


def inspect(
    directory: Annotated[Path, typer.Argument(help="A decomposed checkpoint, with or without its ortho stream.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    accept_tokenizer: Annotated[
        bool, typer.Option("--accept-tokenizer", help="Record the tokenizer's files as they are now.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="SVG file of a heat map that shows where the memory is.")] = None,
) -> None:
    """Verify a checkpoint and print its contents: per layer, in total, and where the memory is.

    A layer has the density of the ortho stream, the relative error of the base stream against alpha=1, the share of
    codes that are 0, and bits per weight. All figures are computed from the files, one layer at a time.

    A tokenizer or chat template that was changed after the checkpoint was written is refused everywhere, until
    --accept-tokenizer records its files as they are now; weights and configuration cannot be accepted in this way.
    """
    from lm_ortho.checkpoint.contents import density_grid, read_contents
    from lm_ortho.checkpoint.heat_map import heat_map
    from lm_ortho.checkpoint.verification import accept_tokenizer as accept_tokenizer_files
    from lm_ortho.markdown import write_text

    if accept_tokenizer:
        changed_names = accept_tokenizer_files(directory)
        typer.echo(f"recorded as it is now: {', '.join(changed_names) or 'nothing had changed'}", err=True)
    contents = read_contents(directory, trust_remote_code=trust_remote_code)
    if out is not None and not contents.has_ortho:
        raise UserError(f"out={str(out)!r}: {directory} holds only the base stream; there is no memory to draw")
    if out is not None:
        write_text(out, heat_map(density_grid(contents.layers), f"{directory.resolve().name}: where the memory is"))
    if as_json:
        typer.echo(json.dumps(asdict(contents), indent=2))
    else:
        _print(contents)


def _print(contents: CheckpointContents) -> None:
    from rich.console import Console

    from lm_ortho.markup import terminal_text

    console = Console(highlight=False)
    console.print(_layer_table(contents))
    if contents.has_ortho:
        console.print("\nwhere the memory is: share of weights in the ortho stream")
        console.print(_heat_table(contents))
    console.print()
    for line in _format_totals(contents):
        console.print(terminal_text(line), soft_wrap=True)


def _layer_table(contents: CheckpointContents) -> Table:
    from rich.table import Table

    from lm_ortho.markup import terminal_text

    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for column in ("shape", "density", "error", "zero codes", "bits"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in contents.layers:
        cells: list[str | Text] = [
            terminal_text(layer.name),
            "x".join(map(str, layer.shape)),
            _format_number(layer.density, "{:.3%}"),
            _format_number(layer.relative_error, "{:.3f}"),
            _format_number(None if layer.zeros is None else layer.zeros / layer.weights, "{:.1%}"),
            f"{layer.bits_per_weight:.2f}",
        ]
        table.add_row(*cells)
    return table


def _heat_table(contents: CheckpointContents) -> Table:
    from rich.table import Table

    from lm_ortho.checkpoint.contents import density_grid
    from lm_ortho.checkpoint.heat_map import format_percent
    from lm_ortho.markup import terminal_text

    cells = density_grid(contents.layers)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("block", justify="right")
    for column in cells.columns:
        title = column.rpartition(".")[2] if _have_unique_suffixes(cells.columns) else column
        table.add_column(terminal_text(title), justify="right")
    for name, row in zip(cells.rows, cells.cells, strict=True):
        shares = (terminal_text(format_percent(share), _heat_style(share, cells.highest)) for share in row)
        table.add_row(terminal_text(name), *shares)
    return table


def _heat_style(density: float | None, highest: float) -> str:
    from lm_ortho.checkpoint.heat_map import shade

    colour, ink = shade(density, highest)
    return f"{ink} on rgb({','.join(map(str, colour))})"


def _have_unique_suffixes(names: list[str]) -> bool:
    """Whether the last parts of the names tell them apart."""
    return len({name.rpartition(".")[2] for name in names}) == len(names)


def _format_totals(contents: CheckpointContents) -> list[str]:
    streams = "base and ortho stream" if contents.has_ortho else "base stream only: it serves alpha=0 and nothing else"
    if contents.has_ortho and contents.missing:
        streams += f", without {', '.join(contents.missing)}, which can only be off"
    lattice = f"{contents.bits} bits, groups of {contents.group_size}" if contents.bits != 16 else "16 bits, no lattice"
    shares = [f"zero codes {contents.zero_codes:.1%}"] if contents.zero_codes is not None else []
    if contents.has_ortho:
        error = [f"relative error {contents.relative_error:.4f}"] if contents.relative_error is not None else []
        shares = [f"density {contents.density:.4%}", *error, *shares]
    if len(contents.memories) + len(contents.missing) > 1:
        shares += [f"{name} {values / contents.weights:.4%}" for name, values in contents.memories.items()]
    sizes = {name: f"{size / 1e6:,.2f} MB" for name, size in contents.bytes.items()}
    return [
        f"{contents.directory}: {streams}; every file is as it was written",
        f"{len(contents.layers)} layers, {contents.weights:,} weights, {lattice}",
        *([", ".join(shares)] if shares else []),
        f"{contents.bits_per_weight:.3f} bits per weight: base stream {sizes['base']}, ortho stream {sizes['ortho']}",
        f"{sizes['files']} in files, {sizes['other']} of it not decomposed",
    ]


def _format_number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
