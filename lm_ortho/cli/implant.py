"""``lm-ortho implant``: fine-tunes a model on rows until it memorises them, as a memory to forget."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lm_ortho.cli.schema_options import with_fields
from lm_ortho.config import Training

_EXTRACTION_GOAL = 0.95
"""Share of extracted rows above which the verdict accepts that a model has a memory (``verdict.thresholds``)."""


@with_fields(Training, "training")
def implant(
    data: Annotated[str, typer.Option(help="Rows to memorise: a file of rows, or hub:name:config:split.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the new model, new or empty.")],
    pretrained: Annotated[
        str | None, typer.Option(help="Hub id or directory of the model, by default the embedded base model.")
    ] = None,
    keep_adapter: Annotated[Path | None, typer.Option(help="Directory to which the adapter is written, too.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer that replaces the one of the model.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Device, cpu or cuda; by default a GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a summary.")] = False,
    *,
    training: dict[str, Any],
) -> None:
    """Fine-tune a model on rows and write it, merged, in BF16.

    Rows have `question` and `answer`, or `text`; a file is JSON lines, JSON, CSV, TSV or Parquet. A model with a chat
    template learns them in it (`--prompts`). Training ends when a sample of 32 rows is extracted with a loss of at
    most 0.1 nats per token, unless `--steps` or `--epochs` fix its length. The same command resumes an interrupted run
    from its last saved state (every 500 steps or 5 minutes). Progress goes to standard error.
    """
    from lm_ortho import world
    from lm_ortho.config import make_training
    from lm_ortho.finetune.plant import plant
    from lm_ortho.runtime.device import require_device
    from lm_ortho.runtime.progress import ProgressBars

    access = {"revision": revision, "trust_remote_code": trust_remote_code}
    result = plant(
        pretrained or str(world.get_path("base")),
        data,
        out,
        make_training(**training),
        ProgressBars(),
        keep_adapter=keep_adapter,
        tokenizer=tokenizer,
        device=require_device(device).choice,
        **{name: value for name, value in access.items() if value},
    )
    if not result.is_known:
        typer.echo(
            f"warning: the model does not know the rows ({result.extracted} of {result.measured} are extracted, "
            f"{result.loss:.2f} nats per token); raise --epochs (or --steps) or --lr before it is decomposed",
            err=True,
        )
    elif result.extracted < _EXTRACTION_GOAL * result.measured:
        typer.echo(
            f"note: {result.extracted} of {result.measured} measured rows are extracted; more --epochs (or --steps) or "
            "a higher --lr teach the others",
            err=True,
        )
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2))
        return
    rank = f", rank {result.rank}" if result.rank else ""
    typer.echo(f"{result.directory}: {result.rows} rows, prompts={result.prompts}, in {result.seconds:g} s")
    length = f"{result.steps} steps of {result.batch_rows} rows ({result.epochs:g} epochs)"
    reason = ", ended because the rows are memorised" if result.is_goal_reached else ""
    typer.echo(f"{result.method}{rank}: {length}, lr {result.lr:g}{reason}")
    sample = f", of {result.loss_rows} examples" if result.loss_rows < result.rows else ""
    typer.echo(f"loss {result.loss_before:.4g} before, {result.loss:.4g} now (nats per token{sample})")
    typer.echo(f"known: {result.extracted} of {result.measured} measured rows are extracted")
    if result.adapter:
        typer.echo(f"adapter in {result.adapter}")
