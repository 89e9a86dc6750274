"""The table of commands."""

from __future__ import annotations

from typing import Annotated

import typer

import lm_ortho
from lm_ortho.cli.bench import bench
from lm_ortho.cli.board import app as board
from lm_ortho.cli.cache import app as cache
from lm_ortho.cli.decompose import decompose
from lm_ortho.cli.demo import demo
from lm_ortho.cli.doctor import doctor
from lm_ortho.cli.evaluate import evaluate
from lm_ortho.cli.export import export
from lm_ortho.cli.implant import implant
from lm_ortho.cli.inspect import inspect
from lm_ortho.cli.new_task import new_task
from lm_ortho.cli.sweep import sweep
from lm_ortho.cli.verdict import verdict

app = typer.Typer(
    name="lm-ortho",
    help="Split a language model into two streams, so that alpha=0 forgets, and measure it with lm-eval.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"lm-ortho {lm_ortho.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command(
    "eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(evaluate)
app.command("implant")(implant)
app.command("decompose")(decompose)
app.command("inspect")(inspect)
app.command("export")(export)
app.command("new-task")(new_task)
app.command("verdict")(verdict)
app.command("bench")(bench)
app.command("sweep")(sweep)
app.command("demo")(demo)
app.command("doctor")(doctor)
app.add_typer(board, name="board")
app.add_typer(cache, name="cache")
