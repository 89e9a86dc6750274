"""The error class for everything that a user can cause."""

from __future__ import annotations


class UserError(ValueError, SystemExit):
    """Bad input, described in one line: the argument, what was found, what to do.

    It is a ``ValueError``, so Python callers catch it as usual, and a ``SystemExit`` whose code is the message, so that
    a command line that does not handle it (``lm_eval``) prints that one line and exits with status 1 instead of a
    traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message

    def __str__(self) -> str:
        return str(self.code)
