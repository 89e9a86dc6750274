"""``lm-ortho new-task``: makes a folder of lm-eval tasks from two files of rows."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def new_task(
    name: Annotated[str, typer.Argument(help="Name of the folder; the tasks are NAME_forget and NAME_retain.")],
    forget: Annotated[str, typer.Option(help="Rows to forget: a file of rows, or hub:name:config:split.")],
    retain: Annotated[str, typer.Option(help="Rows to retain, in the same format.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory in which the folder NAME is created.")
    ] = Path(),
    source: Annotated[str, typer.Option(help="Source of the rows (a paper), for the README.")] = "",
    licence: Annotated[str, typer.Option(help="Licence of the rows, for the README.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a summary.")] = False,
) -> None:
    """Write a folder of two lm-eval tasks, from rows to forget and rows to retain.

    A row has `question` and `answer`, or `text`; `secret`, `paraphrased_answer` and `perturbed_answer` add metrics. A
    file of rows is JSON lines, JSON, CSV, TSV or Parquet. The rows are copied into the folder, which can be moved
    anywhere.
    """
    from lm_ortho.harness.new_task import new_task as write
    from lm_ortho.plugin.bridges import find_tasks_dir

    result = write(name, forget, retain, output, source=source, licence=licence)
    if as_json:
        typer.echo(json.dumps(asdict(result) | {"folder": str(result.folder)}, indent=2))
        return
    sizes = ", ".join(f"{task} ({rows} rows)" for task, rows in zip(result.tasks, result.rows, strict=True))
    options = f"--tasks {','.join(result.tasks)}"
    if find_tasks_dir().resolve() not in result.folder.resolve().parents:
        options += f" --include_path {shlex.quote(str(result.folder))}"
    typer.echo(f"{result.folder}: {sizes}")
    typer.echo(f"check:   lm-eval validate {options}")
    typer.echo(f"measure: lm_eval --model libortho {options}")
