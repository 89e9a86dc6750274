"""Text of any origin in the syntax of an output: a name, title or error never becomes markup, a link or a formula.

HTML pages escape by the autoescape of jinja2; this module has the other kinds of output, one function each.
"""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

from lm_ortho.errors import printable

if TYPE_CHECKING:
    from rich.text import Text

TEXT_LIMIT = 5000
"""Characters of one text in an output."""

_MARKDOWN_MARKS = re.compile(r"[\\`*~|\[\]]|(?<![^\W_])_|_(?![^\W_])|(?<=:)//|(?<!\S)#|(?<=www)\.|@", re.IGNORECASE)
"""Characters that begin something in Markdown; an underscore inside a word does not."""
_CODE_MARKS = re.compile(r"[`|\\<>&]")
_FORMULA_STARTS = "=+-@\t\r＝＋－＠"


def terminal_text(text: object, style: str = "", limit: int = TEXT_LIMIT) -> Text:
    """A cell of a rich table, or a line that rich prints; brackets are no markup, control characters are escaped."""
    from rich.text import Text

    return Text(printable(text, limit), style=style)


def markdown_text(text: object) -> str:
    """``text`` for a heading, a paragraph or a cell of a table in Markdown, rendered as it is."""
    return _MARKDOWN_MARKS.sub(r"\\\g<0>", escape(printable(text, TEXT_LIMIT), quote=False))


def markdown_code(text: object) -> str:
    """``text`` as code in Markdown, also in a cell of a table."""
    code = printable(text, TEXT_LIMIT)
    if not code.strip():
        return ""
    return f"<code>{markdown_text(code)}</code>" if _CODE_MARKS.search(code) else f"`{code}`"


def xml_text(text: object) -> str:
    """``text`` for an element of SVG, and for plotly, whose labels are a small HTML."""
    return escape(printable(text, TEXT_LIMIT))


def csv_text(text: object) -> str:
    """``text`` for a cell of a CSV file, which no spreadsheet takes for a formula; a number stays as it is."""
    cell = printable(text, TEXT_LIMIT)
    return f"'{cell}" if cell.lstrip()[:1] in _FORMULA_STARTS and cell.strip() and not _is_number(cell) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
