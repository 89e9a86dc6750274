"""The error class for everything that a user can cause, and text of any origin in a form that a terminal prints."""

from __future__ import annotations

import re

MESSAGE_LIMIT = 2000
"""Characters of an error message; what lies between its head and its tail is left out."""

ACCESS_TOKEN = re.compile(r"\bhf_\w{10,}")
"""An access token of the hub."""
_LINE_BREAKS = re.compile(r"[\t\n\r][\t\n\r ]*")


class UserError(ValueError, SystemExit):
    """Bad input, described in one line: the argument, what was found, what to do.

    It is a ``ValueError``, so Python callers catch it as usual, and a ``SystemExit`` whose code is the message, so that
    a command line that does not handle it (``lm_eval``) prints that one line and exits with status 1 instead of a
    traceback. The message may quote files of any origin: it is passed through ``printable``, and access tokens of the
    hub are left out.
    """

    def __init__(self, message: str) -> None:
        message = printable(ACCESS_TOKEN.sub("hf_...", str(message)), MESSAGE_LIMIT)
        super().__init__(message)
        self.code = message

    def __str__(self) -> str:
        return str(self.code)


def printable(text: object, limit: int = 200) -> str:
    """``text`` in one line of at most ``limit`` characters that is safe to print on any terminal and in any log.

    Line breaks become a space. Every other character that is not printable (control characters, among them the start
    of an escape sequence; marks that reverse the direction of text; halves of surrogate pairs) is written as in a
    Python string, such as ``\\x1b``. Text that is too long keeps its head and its tail, with `[...]` between them.
    """
    line = _LINE_BREAKS.sub(" ", _cut(str(text), limit))
    if line.isprintable():
        return line
    return _cut("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line), limit)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    gap = " [...] "
    tail = max(0, limit - len(gap)) // 3
    return f"{text[: max(0, limit - len(gap) - tail)]}{gap}{text[len(text) - tail :]}"
