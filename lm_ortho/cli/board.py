"""``lm-ortho board``: a matrix of models, methods, settings, seeds and tasks, and the page of what came out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from lm_ortho.errors import UserError

if TYPE_CHECKING:
    from lm_ortho.board.run import Tally


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
