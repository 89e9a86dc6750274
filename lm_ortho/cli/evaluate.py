"""``lm-ortho eval``: the command line of lm-eval with our model and tasks, even where the start-up hook is off."""

from __future__ import annotations

import sys

import typer


def evaluate(context: typer.Context) -> None:
    """Run lm_eval with the libortho model and our tasks added; takes the arguments of lm_eval."""
    from lm_ortho.plugin.bridges import bridge_lm_eval
    from lm_ortho.plugin.startup import install

    bridge_lm_eval()
    install(force=True)  # transformers is bridged when it is imported
    from lm_eval.__main__ import cli_evaluate

    arguments = sys.argv
    sys.argv = ["lm-ortho eval", *context.args]
    try:
        cli_evaluate()
    finally:
        sys.argv = arguments
