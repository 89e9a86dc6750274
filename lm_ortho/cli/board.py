"""``lm-ortho board``: a matrix of models, methods, settings, seeds and tasks, and the page of what came out."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lm_ortho.errors import UserError

if TYPE_CHECKING:
    from lm_ortho.leaderboard.scheduler import Tally

app = typer.Typer(help="Compare methods: a matrix of models, methods, settings, seeds and tasks.", no_args_is_help=True)
Out = Annotated[Path, typer.Argument(help="The folder of a board or a sweep.", show_default=False)]


@app.command("run")
def run(
    board: Annotated[Path, typer.Argument(help="What to run: a file such as boards/quick.yaml.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the results; runs/NAME without it. A run goes on there."),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do pieces that failed again.")] = False,
    only: Annotated[str, typer.Option(help="A method, or the beginning of a hash of the table.")] = "",
    executor: Annotated[
        Literal["local", "ray"] | None, typer.Option(help="In the place of the one that the file names.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print how far it is as JSON.")] = False,
) -> None:
    """Make and measure every model of a board that is not finished, and write its page.

    Every piece is kept as soon as it is finished; a run that was interrupted, in whatever way, goes on there. A failing
    piece is recorded and does not stop the others. Under `torchrun --nproc_per_node 2 -m lm_ortho board run ...` the
    documents of each task are dealt out to the processes.
    """
    from rich.console import Console

    from lm_ortho.leaderboard.board import run_board, status
    from lm_ortho.leaderboard.config import read_board
    from lm_ortho.leaderboard.report.formats import write_pages

    asked = read_board(board)
    if executor:
        asked = asked.model_copy(update={"resources": asked.resources.model_copy(update={"executor": executor})})
    directory = out or Path("runs") / asked.name
    command = shlex.join(["lm-ortho", "board", "run", str(board), *(["-o", str(out)] if out else [])])
    tally = run_board(asked, directory, Console(stderr=True), command, retry_failed, only)
    if tally is None:
        return
    pages = write_pages(directory, directory)
    if as_json:
        typer.echo(json.dumps(status(directory), indent=2))
    else:
        typer.echo("\n".join(str(page) for page in pages))
    finish(tally, f"{directory}: ")


@app.command("status")
def status(
    out: Out, as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False
) -> None:
    """Say how far a board or sweep is: what is done, what failed and why, the time left, and its runs."""
    from rich.console import Console

    from lm_ortho.leaderboard.board import print_status
    from lm_ortho.leaderboard.board import status as status_of

    found = status_of(out)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_status(found, Console())


@app.command("page")
def page(
    out: Out,
    to: Annotated[Path | None, typer.Option(help="Folder for the files; the one of the results without it.")] = None,
) -> None:
    """Write leaderboard.html (one file, works offline), leaderboard.md and leaderboard.csv of what is finished."""
    from lm_ortho.leaderboard.report.formats import write_pages

    typer.echo("\n".join(str(page) for page in write_pages(out, to or out)))


def parse_json(text: str, argument: str) -> dict[str, Any]:
    """The object that a JSON option holds; {} for none."""
    if not text:
        return {}
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{argument}={text!r} is not JSON ({error.msg})") from None
    if not isinstance(given, dict):
        raise UserError(f'{argument}={text!r} must be an object such as {{"forget": "forget.jsonl"}}')
    return given


def parse_model_args(text: str) -> dict[str, Any]:
    """Model args as lm-eval reads them: ``a=1,b=2``, or JSON; alpha is not one of them here."""
    from lm_eval.utils import simple_parse_args_string

    if text.lstrip().startswith("{"):
        given = parse_json(text, "model_args")
    elif bad := [part for part in text.split(",") if part and "=" not in part]:
        raise UserError(f"model_args: {bad[0]!r} is not name=value")
    else:
        given = simple_parse_args_string(text) if text else {}
    if "alpha" in given:
        raise UserError("model_args: alpha is what is swept; use --alpha")
    return given


def finish(tally: Tally, where: str = "") -> None:
    """The last line, and exit code 1 for what failed."""
    parts = [f"{tally.done} of {tally.total} pieces done"]
    parts += [f"{tally.failed} failed (--retry-failed does them again)"] if tally.failed else []
    parts += [f"{tally.elsewhere} in the hands of another process"] if tally.elsewhere else []
    typer.echo(where + ", ".join(parts), err=True)
    if tally.failed:
        raise typer.Exit(1)
