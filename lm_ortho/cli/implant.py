"""``lm-ortho implant``: rows learnt by heart, to have a memory that can be taken away again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lm_ortho.cli.schema_options import with_fields
from lm_ortho.config import Training


@with_fields(Training, "training")
def implant(
    data: Annotated[str, typer.Option(help="The rows to learn: a JSONL file, or hub:name:config:split.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new model, a directory that is new or empty.")],
    pretrained: Annotated[
        str | None, typer.Option(help="Hub id or directory of the model; the embedded base model without it.")
    ] = None,
    keep_adapter: Annotated[Path | None, typer.Option(help="Also write the adapter, to another directory.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="In the place of the one beside the model.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU without it, where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a summary.")] = False,
    *,
    training: dict[str, Any],
) -> None:
    """Fine-tune a model on rows and write it, merged, in BF16.

    Rows are JSON lines with `question` and `answer`, or `text`. The same command goes on where an interrupted one
    last kept its state (every 500 steps). Progress goes to standard error.
    """
    from lm_ortho import world
    from lm_ortho.config import make_training
    from lm_ortho.finetune.plant import plant
    from lm_ortho.runtime.device import require_device
    from lm_ortho.runtime.progress import ProgressBars

    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    planted = plant(
        pretrained or str(world.path("base")),
        data,
        out,
        make_training(**training),
        ProgressBars(),
        keep_adapter=keep_adapter,
        tokenizer=tokenizer,
        device=require_device(device).choice,
        **{name: value for name, value in hub.items() if value},
    )
    if as_json:
        typer.echo(json.dumps(asdict(planted), indent=2))
        return
    rank = f", rank {planted.rank}" if planted.rank else ""
    typer.echo(f"{planted.directory}: {planted.rows} rows, in {planted.seconds:g} s")
    typer.echo(f"{planted.method}{rank}: {planted.steps} steps of {planted.batch_rows} rows, lr {planted.lr:g}")
    typer.echo(f"loss {planted.loss_before:.4g} before, {planted.loss:.4g} now (nats per token)")
    if planted.adapter:
        typer.echo(f"adapter in {planted.adapter}")
