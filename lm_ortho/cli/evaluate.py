"""``lm-ortho eval``: lm-eval's own command line, with our model and tasks in it whatever the hook did."""

from __future__ import annotations

import sys

import typer


def evaluate(context: typer.Context) -> None:
    """Run lm_eval with the libortho model and our tasks added; takes the arguments of lm_eval."""
    from lm_ortho.plugin.bridges import bridge_now

    bridge_now()
    from lm_eval.__main__ import cli_evaluate

    given = sys.argv
    sys.argv = ["lm-ortho eval", *context.args]
    try:
        cli_evaluate()
    finally:
        sys.argv = given
