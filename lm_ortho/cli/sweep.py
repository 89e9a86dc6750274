"""``lm-ortho sweep``: evaluates one checkpoint at several alphas on several tasks and stores every result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

ALPHAS = "0,0.25,0.5,0.75,1"


def sweep(
    tasks: Annotated[str, typer.Option(help="Tasks and groups, separated by commas.")] = "tofu_forget,tofu_retain",
    alpha: Annotated[str, typer.Option(help="Values of alpha, separated by commas.")] = ALPHAS,
    model_args: Annotated[
        str, typer.Option(help="Model args of libortho without alpha, by default those of the embedded model.")
    ] = "",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the results; an interrupted sweep resumes from it.")
    ] = Path("runs/sweep"),
    limit: Annotated[int | None, typer.Option(min=1, help="Number of documents per task, the first ones.")] = None,
    metadata: Annotated[
        str, typer.Option(help="Metadata of the tasks, like lm_eval's --metadata: a=1,b=2, or JSON.")
    ] = "",
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask in the chat template of the tokenizer.")
    ] = False,
    system_instruction: Annotated[
        str | None, typer.Option(help="Message of the system before the question of a chat.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device, cpu or cuda; by default a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Data type of activations and dense weights.")] = "auto",
    batch_size: Annotated[str, typer.Option(help="Requests per batch; 1 means as many as the logits allow.")] = "1",
    parallelize: Annotated[bool, typer.Option("--parallelize", help="Spread one model over all GPUs.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed pieces again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """Measure one model at several alphas on several tasks; the model is loaded once.

    Each result of an alpha and a task is stored as soon as it is finished, in a store and in lm-eval's own files beside
    it, so that an interrupted sweep resumes. `lm-ortho board page` writes its page. Under
    `torchrun --nproc_per_node 2 -m lm_ortho sweep ...` the documents are distributed over the processes.
    """
    from rich.console import Console

    from lm_ortho.cli.board import parse_metadata, parse_model_args, report_tally
    from lm_ortho.leaderboard.report.terminal import print_records
    from lm_ortho.leaderboard.store import Store
    from lm_ortho.leaderboard.sweep import Sweep, run_sweep

    plan = Sweep(
        tasks=[task for task in tasks.split(",") if task],
        alphas=[value for value in alpha.split(",") if value],
        model_args=parse_model_args(model_args),
        limit=limit,
        metadata=parse_metadata(metadata),
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        parallelize=parallelize,
    )
    tally = run_sweep(plan, out, Console(stderr=True), retry_failed)
    if tally is None:
        return
    records = Store(out, create=False).records()
    if as_json:
        typer.echo(json.dumps([record.as_json() for record in records], indent=2))
    else:
        print_records(records, Console())
    report_tally(tally, f"{out}: ")
