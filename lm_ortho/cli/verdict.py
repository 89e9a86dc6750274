"""``lm-ortho verdict``: does alpha=0 forget, and nothing else?"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lm_ortho.errors import UserError


def verdict(
    quick: Annotated[bool, typer.Option("--quick", help="base=auto only, one seed, fewer questions: minutes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed of a decomposition; may be given again (default: 0, 1 and 2).")
    ] = None,
    base: Annotated[list[str] | None, typer.Option(help="auto or none; may be given again (default: both).")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the tables to this Markdown file.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A folder with other base, memory, never_saw and never_saw_2.")
    ] = None,
) -> None:
    """Decompose the embedded model afresh and judge it against INT4 and a model that never saw the secrets.

    PASS, FAIL or INVALID from fixed bars; the exit code is 0 for PASS only. Finished parts are kept in the
    cache folder, so an interrupted run goes on where it stopped.
    """
    from rich.console import Console

    from lm_ortho import world
    from lm_ortho.config import make_recipe
    from lm_ortho.markdown import write_text
    from lm_ortho.verdict.report import markdown, print_outcome
    from lm_ortho.verdict.runner import run

    errors = Console(stderr=True)
    modes = tuple(base or (("auto",) if quick else ("auto", "none")))
    if unknown := [mode for mode in modes if mode not in ("auto", "none")]:
        raise UserError(f"base={unknown[0]!r}: the verdict knows auto and none")
    if out and not out.parent.is_dir():
        raise UserError(f"out={str(out)!r}: there is no folder {str(out.parent)!r}")
    if out and out.is_dir():
        raise UserError(f"out={str(out)!r} is a directory; name a file in it")
    seeds = tuple(seed or ((0,) if quick else (0, 1, 2)))
    for each in seeds:
        make_recipe(seed=each)  # refuses one that no recipe can have, before hours of work
    say = partial(errors.print, highlight=False)
    outcome = run(modes, seeds, quick, say=say, weights=weights or world.WEIGHTS)
    if as_json:
        typer.echo(json.dumps(outcome.as_json(), indent=2))
    else:
        print_outcome(outcome, Console())
    if out:
        write_text(out, markdown(outcome, " ".join(["lm-ortho", *sys.argv[1:]])))
    raise typer.Exit(0 if outcome.verdict == "PASS" else 1)
