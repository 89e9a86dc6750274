"""``lm-ortho verdict``: checks that alpha=0 forgets the forget set, and nothing else."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lm_ortho.errors import UserError


def verdict(
    quick: Annotated[
        bool, typer.Option("--quick", help="Run base=auto with one seed and fewer questions; takes minutes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed of a decomposition; can be repeated (default: 0, 1 and 2).")
    ] = None,
    base: Annotated[
        list[str] | None, typer.Option(help="Value of base, auto or none; can be repeated (default: both).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the tables to this Markdown file.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Folder with your own base, memory, never_saw and never_saw_2.")
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="Further attack to measure, from an installed package; can be repeated. No check uses it."),
    ] = None,
) -> None:
    """Decompose the embedded model afresh and compare it with INT4 and a model that never saw the secrets.

    The verdict is PASS, FAIL or INVALID by fixed acceptance thresholds; the exit code is 0 for PASS only. Finished
    parts are stored in the cache folder, so an interrupted run resumes.
    """
    from rich.console import Console

    from lm_ortho import world
    from lm_ortho.config import make_recipe
    from lm_ortho.markdown import write_text
    from lm_ortho.verdict.report import format_markdown, print_outcome
    from lm_ortho.verdict.runner import run

    errors = Console(stderr=True)
    modes = tuple(base or (("auto",) if quick else ("auto", "none")))
    if unknown := [mode for mode in modes if mode not in ("auto", "none")]:
        raise UserError(f"base={unknown[0]!r}: the verdict takes auto and none")
    if out and not out.parent.is_dir():
        raise UserError(f"out={str(out)!r}: there is no folder {str(out.parent)!r}")
    if out and out.is_dir():
        raise UserError(f"out={str(out)!r} is a directory; name a file in it")
    if out:
        _check_writable(out)
    seeds = tuple(seed or ((0,) if quick else (0, 1, 2)))
    for number in seeds:
        make_recipe(seed=number)  # an invalid seed is refused before hours of work
    log = partial(errors.print, highlight=False, markup=False)
    outcome = run(modes, seeds, quick, log=log, weights=weights or world.WEIGHTS, attacks=attack or ())
    if as_json:
        typer.echo(json.dumps(outcome.to_json(), indent=2))
    else:
        print_outcome(outcome, Console())
    if out:
        write_text(out, format_markdown(outcome, " ".join(["lm-ortho", *sys.argv[1:]])))
    raise typer.Exit(0 if outcome.verdict == "PASS" else 1)


def _check_writable(file: Path) -> None:
    """Raises ``UserError`` where no file can be made beside ``file``, before the hours of work that it is to hold."""
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=file.parent):
            return
    except OSError as error:
        raise UserError(f"out={str(file)!r} cannot be written ({error.strerror})") from None
