"""``lm-ortho board``: runs a matrix of models, methods, settings, seeds and tasks, and writes a page of the results."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lm_ortho.errors import UserError
from lm_ortho.hub import first_line

if TYPE_CHECKING:
    from lm_ortho.leaderboard.config import Board
    from lm_ortho.leaderboard.scheduler import Tally

app = typer.Typer(help="Compare methods: a matrix of models, methods, settings, seeds and tasks.", no_args_is_help=True)
Out = Annotated[Path, typer.Argument(help="The folder of a board or a sweep.", show_default=False)]


@app.command("run")
def run(
    board: Annotated[
        Path, typer.Argument(help="The board to run: a file such as boards/quick.yaml.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder of the results, by default runs/NAME. An interrupted run resumes from it."
        ),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed pieces again.")] = False,
    only: Annotated[str, typer.Option(help="Run only this method, or the rows whose hash starts with this.")] = "",
    executor: Annotated[
        Literal["local", "ray"] | None, typer.Option(help="Executor that replaces the one of the board file.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the board names: its imports, and its models'.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the status as JSON.")] = False,
) -> None:
    """Build and measure every unfinished model of a board, and write its page.

    Each piece is stored as soon as it is finished; an interrupted run resumes from there. A failing piece is recorded
    and does not stop the others. Under `torchrun --nproc_per_node 2 -m lm_ortho board run ...` the documents of each
    task are distributed over the processes.
    """
    from rich.console import Console

    from lm_ortho.leaderboard.board import run_board, status
    from lm_ortho.leaderboard.config import read_board
    from lm_ortho.leaderboard.report.formats import write_pages

    config = read_board(board)
    if not trust_remote_code:
        _refuse_code(config, board)
    if executor:
        config = config.model_copy(update={"resources": config.resources.model_copy(update={"executor": executor})})
    directory = out or Path("runs") / config.name
    options = [*(["-o", str(out)] if out else []), *(["--trust-remote-code"] if trust_remote_code else [])]
    command = shlex.join(["lm-ortho", "board", "run", str(board), *options])
    console = Console(stderr=True)
    tally = run_board(config, directory, console, command, retry_failed=retry_failed, only=only)
    if tally is None:
        return
    pages = write_pages(directory, directory)
    if as_json:
        typer.echo(json.dumps(status(directory), indent=2))
    else:
        typer.echo("\n".join(str(page) for page in pages))
    report_tally(tally, f"{directory}: ")


def _refuse_code(board: Board, path: Path) -> None:
    """Raises ``UserError`` for a board that names code to run: a board may come from anybody."""
    keys = ["imports"] if board.imports else []
    keys += [f"models.{name}.trust_remote_code" for name, model in board.models.items() if model.trust_remote_code]
    keys += ["metadata.trust_remote_code"] if board.metadata.get("trust_remote_code") else []
    if keys:
        raise UserError(f"board={str(path)!r}: {keys[0]} runs code; read it, then pass --trust-remote-code")


@app.command("status")
def status(
    out: Out, as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False
) -> None:
    """Print the status of a board or sweep: finished and failed pieces with their errors, the time left, its runs."""
    from rich.console import Console

    from lm_ortho.leaderboard.board import print_status
    from lm_ortho.leaderboard.board import status as read_status

    _require_pieces(out)
    report = read_status(out)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        print_status(report, Console())


@app.command("page")
def page(
    out: Out,
    to: Annotated[Path | None, typer.Option(help="Folder of the files, by default that of the results.")] = None,
) -> None:
    """Write leaderboard.html (one file, works offline), leaderboard.md and leaderboard.csv of all finished pieces."""
    from lm_ortho.leaderboard.report.formats import write_pages

    _require_pieces(out)
    typer.echo("\n".join(str(page) for page in write_pages(out, to or out)))


def _require_pieces(directory: Path) -> None:
    """Raises ``UserError`` for a folder in which no board or sweep has begun."""
    from lm_ortho.leaderboard.store import Store

    if not Store(directory, create=False).statuses():
        raise UserError(f"{str(directory)!r}: its store is empty; no sweep or board was run with this --out")


def parse_metadata(text: str) -> dict[str, Any]:
    """Parses metadata as ``lm_eval --metadata`` does: ``a=1,b=2``, or a JSON object; empty text is ``{}``."""
    return _parse_pairs(text, "metadata", "retain=retain.jsonl")


def parse_model_args(text: str) -> dict[str, Any]:
    """Parses model args as lm-eval does: ``a=1,b=2``, or a JSON object. What has an option of its own is refused."""
    model_args = _parse_pairs(text, "model_args", "pretrained=my/model")
    for name in ("alpha", "device", "dtype", "batch_size", "parallelize"):
        if name in model_args:
            raise UserError(f"model_args: the sweep sets {name}; use --{name.replace('_', '-')}")
    pretrained = model_args.get("pretrained")
    if isinstance(pretrained, int) and not isinstance(pretrained, bool):
        model_args["pretrained"] = pretrained = str(pretrained)  # a directory may be named by a number
    if not isinstance(pretrained, str | None):
        raise UserError(f"model_args: pretrained={pretrained!r} must be the text of a name or a directory")
    return model_args


def _parse_pairs(text: str, argument: str, example: str) -> dict[str, Any]:
    from lm_eval._cli.utils import key_val_to_dict, split_top_level

    if text.lstrip().startswith(("{", "[")):
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "too many levels"
            raise UserError(f"{argument}={shorten(text)!r} is not JSON ({reason}); or give it as {example}") from None
        if not isinstance(values, dict):
            raise UserError(f"{argument}={shorten(text)!r} must be an object or {example}")
        return values
    pairs = [part.partition("=") for part in split_top_level(text) if part.strip()]
    for name, equals, value in pairs:
        if not (name.strip() and equals and value.strip()):
            raise UserError(f"{argument}: {shorten(name + equals + value)!r} is not name=value, as in {example}")
    names = [name.strip() for name, _, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{argument} names {twice[0]} twice")
    try:
        return dict(key_val_to_dict(",".join(f"{name.strip()}={value.strip()}" for name, _, value in pairs)))
    except ValueError as error:  # lm-eval takes some characters for digits that are none, such as ½
        raise UserError(f"{argument}={shorten(text)!r} cannot be read ({first_line(error)}); give it as JSON") from None


def shorten(text: str) -> str:
    """The text, cut after 80 characters."""
    return text if len(text) <= 80 else f"{text[:77]}..."


def report_tally(tally: Tally, prefix: str = "") -> None:
    """Prints the last line of a run; exits with code 1 if pieces failed."""
    parts = [f"{tally.done} of {tally.total} pieces done"]
    parts += [f"{tally.failed} failed (--retry-failed runs them again)"] if tally.failed else []
    parts += [f"{tally.running} running in another process"] if tally.running else []
    typer.echo(prefix + ", ".join(parts), err=True)
    if tally.failed:
        raise typer.Exit(1)
