"""``lm-ortho decompose``: a model split into its two streams, in a directory."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lm_ortho.cli.schema_options import with_fields
from lm_ortho.config import ModelSource, ModelSpec, Recipe, make_spec
from lm_ortho.errors import UserError

if TYPE_CHECKING:
    from lm_ortho.pipeline.checkpoint_writer import CheckpointSummary

_SOURCE = (*ModelSource.model_fields, "held_out", "gguf_file", "tokenizer", "fresh", "force")


@with_fields(Recipe, "recipe")
@with_fields(ModelSpec, "source", only=_SOURCE)
def decompose(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the new checkpoint, new or empty.")],
    add: Annotated[
        str | None,
        typer.Option(help="Name of a memory to add to the checkpoint --pretrained; --forget has its rows."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device, cpu or cuda; by default a GPU if there is one.")] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep the model in host memory and move one block at a time to the GPU.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a summary.")] = False,
    *,
    source: dict[str, Any],
    recipe: dict[str, Any],
) -> None:
    """Split a model into a base stream and an ortho stream and write the checkpoint.

    A decomposition that this command or lm_eval has made of the same model, rows and recipe is taken from the cache,
    and a new one is stored there. Without any option but --out it is the embedded default, made anew if it is not in
    the cache. --pretrained needs --forget and --retain. Progress goes to standard error.
    """
    from lm_ortho.pipeline.checkpoint_writer import write_checkpoint, write_checkpoint_with_memory

    spec = make_spec(recipe, **source)
    if add and offload:
        raise UserError("offload: a memory is added on one device; leave it out, or give --device cpu")
    if add:
        summary = write_checkpoint_with_memory(spec, add, out, device=device)
    else:
        summary = write_checkpoint(spec, out, device=device, offload=offload)
    typer.echo(json.dumps(asdict(summary), indent=2) if as_json else _summary_text(summary, add))


def _summary_text(summary: CheckpointSummary, memory: str | None) -> str:
    recipe, target, memories = summary.recipe, summary.target, summary.memories
    lattice = f"INT{recipe['bits']}" if recipe["bits"] != 16 else "BF16"
    target_text = f"{target['name']} ({target['reason']})" if target else "none (the recipe needs none)"
    in_all = " in all" if len(memories) > 1 else ""
    for_each = f" for each of {', '.join(memories)}" if len(memories) > 1 else ""
    if memory:
        for_each = f" for {memory}"
    return "\n".join(
        [
            f"{summary.directory}: {summary.layers} layers, {summary.weights:,} weights, in {summary.seconds:g} s",
            f"density {summary.density:.4g}{in_all}, of at most {recipe['density']:g}{for_each}",
            f"{summary.bits_per_weight:.3f} bits per weight: {lattice} base stream and BF16 ortho stream",
            f"target {target_text}",
            *([f"cache: {summary.cache}"] if summary.cache else []),
            *([f"held out: {summary.held_out}"] if summary.held_out else []),
            f"next: {summary.next}",
        ]
    )
