"""``lm-ortho new-task``: two files of rows as a folder of lm-eval tasks."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def new_task(
    name: Annotated[str, typer.Argument(help="The tasks are called NAME_forget and NAME_retain.")],
    forget: Annotated[str, typer.Option(help="Rows to forget: a JSONL file, or hub:name:config:split.")],
    retain: Annotated[str, typer.Option(help="Rows that should stay, of the same form.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the folder NAME is made.")] = Path(),
    source: Annotated[str, typer.Option(help="Where the rows come from (a paper), for the README.")] = "",
    licence: Annotated[str, typer.Option(help="Licence of the rows, for the README.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a summary.")] = False,
) -> None:
    """Write a folder of two lm-eval tasks from rows to forget and rows to keep.

    Rows are JSON lines with `question` and `answer`, or `text`; `secret`, `paraphrased_answer` and `perturbed_answer`
    add metrics. The rows are copied into the folder, which works wherever it is put.
    """
    from lm_ortho.harness.new_task import new_task as write
    from lm_ortho.plugin.bridges import tasks_dir

    done = write(name, forget, retain, output, source=source, licence=licence)
    if as_json:
        typer.echo(json.dumps(asdict(done) | {"folder": str(done.folder)}, indent=2))
        return
    told = ", ".join(f"{task} ({rows} rows)" for task, rows in zip(done.tasks, done.rows, strict=True))
    ours = tasks_dir().resolve() in done.folder.resolve().parents
    where = f"--tasks {','.join(done.tasks)}" + ("" if ours else f" --include_path {shlex.quote(str(done.folder))}")
    typer.echo(f"{done.folder}: {told}")
    typer.echo(f"check:   lm-eval validate {where}")
    typer.echo(f"measure: lm_eval --model libortho {where}")
