"""``lm-ortho verdict``: does alpha=0 forget, and nothing else?"""

from __future__ import annotations

import json
from typing import Annotated

import typer


def verdict(
    quick: Annotated[bool, typer.Option("--quick", help="base=auto only, one seed, fewer questions: minutes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of the decomposition; may be given again.")] = None,
) -> None:
    """Decompose the embedded model afresh and judge it against INT4 and a model that never saw the secrets.

    PASS, FAIL or INVALID from fixed bars; the exit code is 0 for PASS only. Finished parts are kept in the
    cache folder, so an interrupted run goes on where it stopped.
    """
    from rich.console import Console

    from lm_ortho.verdict.run import run
    from lm_ortho.verdict.table import print_outcome

    errors = Console(stderr=True)
    modes = ("auto",) if quick else ("auto", "none")
    outcome = run(modes, tuple(seed or (0,)), quick, say=lambda text: errors.print(text, highlight=False))
    if as_json:
        typer.echo(json.dumps(outcome.as_json(), indent=2))
    else:
        print_outcome(outcome, Console())
    raise typer.Exit(0 if outcome.verdict == "PASS" else 1)
