"""The one error users see."""

from __future__ import annotations


class UserError(ValueError, SystemExit):
    """Bad input, told in one line: the argument, what was found, what to do.

    It is a ``ValueError``, so Python callers catch it as usual, and a ``SystemExit`` whose code is the
    message, so that a command line which knows nothing of us (``lm_eval``) prints that one line and exits
    with status 1 instead of a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message

    def __str__(self) -> str:
        return str(self.code)
