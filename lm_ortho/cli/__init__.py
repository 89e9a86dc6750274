"""The command ``lm-ortho``: one file per command, heavy imports only inside the command that runs."""

from __future__ import annotations

import io
import sys

from lm_ortho.errors import UserError


def main() -> None:
    """Runs the command line; bad input ends with one line ``error: ...`` and exit code 1.

    Characters that the encoding of the terminal lacks are printed as escapes.
    """
    from lm_ortho.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
