"""``lm-ortho export``: writes a checkpoint as a plain model at one alpha."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def export(
    directory: Annotated[Path, typer.Argument(help="A decomposed checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Directory of the plain model, new or empty.")],
    alpha: Annotated[
        str,
        typer.Option(
            help="Value of alpha: 0 without the memory, 1 with it; for several memories name:value+name:value."
        ),
    ] = "0",
    format: Annotated[
        str,
        typer.Option(
            help="Format: `bf16` (plain weights), or `compressed-tensors` (the base stream as it is, 4 or 8 bits)."
        ),
    ] = "bf16",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a summary.")] = False,
) -> None:
    """Write a checkpoint as a plain model that needs no lm-ortho.

    transformers reads `bf16` by itself, and `compressed-tensors` with the package of that name.
    """
    from lm_ortho.checkpoint.export import export as write
    from lm_ortho.dial import format_alpha
    from lm_ortho.errors import printable

    result = write(directory, out, alpha, format, trust_remote_code=trust_remote_code)
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2))
        return
    alpha_text, size = format_alpha(result.alpha), result.bytes / 1e6
    typer.echo(f"{result.directory}: {result.format}, alpha={alpha_text}, {result.layers} layers, {size:,.1f} MB")
    if result.left_out:
        files = f"{len(result.left_out)} file{'s that are' if len(result.left_out) > 1 else ' that is'}"
        typer.echo(printable(f"left out {files} not a tokenizer's: {', '.join(result.left_out)}", 500))
    if any(result.alpha.values()) if isinstance(result.alpha, dict) else result.alpha:
        typer.echo("alpha is not 0: this model holds the memory in clear")
