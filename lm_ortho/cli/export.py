"""``lm-ortho export``: a checkpoint as a plain model at one alpha."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def export(
    directory: Annotated[Path, typer.Argument(help="A decomposed checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The plain model, a directory that is new or empty.")],
    alpha: Annotated[
        str, typer.Option(help="0 without the memory, 1 with it; one for each of several as name:value+name:value.")
    ] = "0",
    format: Annotated[
        str,
        typer.Option(help="`bf16` (plain weights), or `compressed-tensors` (the base stream as it is, 4 or 8 bits)."),
    ] = "bf16",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a summary.")] = False,
) -> None:
    """Write a checkpoint as a plain model that needs no lm-ortho.

    transformers reads `bf16` alone and `compressed-tensors` with the package of that name.
    """
    from lm_ortho.checkpoint.export import export as write
    from lm_ortho.config import format_alpha

    done = write(directory, out, alpha, format, trust_remote_code=trust_remote_code)
    if as_json:
        typer.echo(json.dumps(asdict(done), indent=2))
        return
    dial, size = format_alpha(done.alpha), done.bytes / 1e6
    typer.echo(f"{done.directory}: {done.format}, alpha={dial}, {done.layers} layers, {size:,.1f} MB")
    if any(done.alpha.values()) if isinstance(done.alpha, dict) else done.alpha:
        typer.echo("alpha is not 0: this model holds the memory in clear")
