"""``lm-ortho decompose``: a model split into its two streams, in a directory."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lm_ortho.cli.schema_options import with_fields
from lm_ortho.config import Recipe
from lm_ortho.errors import UserError

if TYPE_CHECKING:
    from lm_ortho.pipeline.checkpoint_writer import CheckpointSummary


@with_fields(Recipe, "recipe")
def decompose(
    out: Annotated[Path, typer.Option("--out", "-o", help="The new checkpoint, a directory that is new or empty.")],
    pretrained: Annotated[
        str | None, typer.Option(help="Hub id or directory of the model; the embedded model without it.")
    ] = None,
    peft: Annotated[str | None, typer.Option(help="Adapter with the memory, merged in BF16.")] = None,
    base: Annotated[
        str,
        typer.Option(
            help="The model before fine-tuning: `auto` (--pretrained when --peft is merged), `none`, or a path."
        ),
    ] = "auto",
    forget: Annotated[
        str | None,
        typer.Option(
            help="What alpha=0 must not know: a JSONL file, hub:name:config:split, or name:source+name:source."
        ),
    ] = None,
    retain: Annotated[
        str | None, typer.Option(help="What has to stay, some of it of the same form about others.")
    ] = None,
    add: Annotated[
        str | None,
        typer.Option(help="Name of one more memory for --pretrained, a checkpoint; --forget is what it holds."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="In the place of the one beside the model.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU without it, where there is one.")] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep the model in host memory; its blocks come to the GPU in turn.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a summary.")] = False,
    *,
    recipe: dict[str, Any],
) -> None:
    """Split a model into a base stream and an ortho stream and write the checkpoint.

    Without any option but --out the embedded default is made again. --pretrained needs --forget and --retain.
    Progress goes to standard error.
    """
    from lm_ortho.pipeline.checkpoint_writer import write_checkpoint, write_checkpoint_with_memory
    from lm_ortho.pipeline.spec import ModelSpec

    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    order = ModelSpec(
        pretrained=pretrained,
        peft=peft,
        base=base,
        forget=forget,
        retain=retain,
        recipe=recipe,
        source={name: value for name, value in source.items() if value},
        tokenizer=tokenizer,
    )
    if add and offload:
        raise UserError("offload: a memory is added on one device; leave it out, or give --device cpu")
    made = (
        write_checkpoint_with_memory(order, add, out, device=device)
        if add
        else write_checkpoint(order, out, None, device, offload)
    )
    typer.echo(json.dumps(asdict(made), indent=2) if as_json else _summary(made, add))


def _summary(made: CheckpointSummary, added: str | None) -> str:
    lattice = f"INT{made.recipe['bits']}" if made.recipe["bits"] != 16 else "BF16"
    target = f"{made.target['name']} ({made.target['reason']})" if made.target else "none (the recipe needs none)"
    whole = " in all" if len(made.memories) > 1 else ""
    each = f" for each of {', '.join(made.memories)}" if len(made.memories) > 1 else ""
    each = f" for {added}" if added else each
    return "\n".join(
        [
            f"{made.directory}: {made.layers} layers, {made.weights:,} weights, in {made.seconds:g} s",
            f"density {made.density:.4g}{whole}, of at most {made.recipe['density']:g}{each}",
            f"{made.bits_per_weight:.3f} bits per weight: {lattice} base stream and BF16 ortho stream",
            f"target {target}",
            f"next: {made.next}",
        ]
    )
