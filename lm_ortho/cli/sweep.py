"""``lm-ortho sweep``: alphas x tasks on one checkpoint, every result kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

ALPHAS = "0,0.25,0.5,0.75,1"


def sweep(
    tasks: Annotated[str, typer.Option(help="Tasks and groups, separated by commas.")] = "tofu_forget,tofu_retain",
    alpha: Annotated[str, typer.Option(help="Values of the dial, separated by commas.")] = ALPHAS,
    model_args: Annotated[
        str, typer.Option(help="Those of libortho, without alpha; the embedded default without them.")
    ] = "",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the results; a sweep that is in there goes on.")
    ] = Path("runs/sweep"),
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first documents of each task.")] = None,
    metadata: Annotated[str, typer.Option(help="JSON for the tasks, as lm_eval's --metadata.")] = "",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU without it, where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Of activations and dense weights.")] = "auto",
    batch_size: Annotated[str, typer.Option(help="Requests at once; 1: as many as the logits allow.")] = "1",
    parallelize: Annotated[bool, typer.Option("--parallelize", help="One model across all GPUs.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do pieces that failed again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """Measure one model at several alphas on several tasks, loaded once.

    Every (alpha, task) is kept as soon as it is finished, in a store and in lm-eval's own files beside it, so that an
    interrupted sweep goes on where it stopped. `lm-ortho board page` makes the page of it. Under
    `torchrun --nproc_per_node 2 -m lm_ortho sweep ...` the documents are dealt out to the processes.
    """
    from rich.console import Console

    from lm_ortho.cli.board import finish, parse_json, parse_model_args
    from lm_ortho.leaderboard.report.terminal import print_records
    from lm_ortho.leaderboard.store import Store
    from lm_ortho.leaderboard.sweep import Sweep, run_sweep

    asked = Sweep(
        tasks=[task for task in tasks.split(",") if task],
        alphas=[value for value in alpha.split(",") if value],
        model_args=parse_model_args(model_args),
        limit=limit,
        metadata=parse_json(metadata, "metadata"),
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        parallelize=parallelize,
    )
    tally = run_sweep(asked, out, Console(stderr=True), retry_failed)
    if tally is None:
        return
    records = Store(out, create=False).records()
    if as_json:
        typer.echo(json.dumps([record.as_json() for record in records], indent=2))
    else:
        print_records(records, Console())
    finish(tally, f"{out}: ")
