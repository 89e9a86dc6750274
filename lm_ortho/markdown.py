"""Markdown tables, the package versions to print below them, and atomic writing of text files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from lm_ortho.errors import UserError


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: a row of titles and the rows below it."""
    head = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in rows)])


def versions() -> str:
    """The versions of the packages that decide what is measured, as text."""
    import lm_eval
    import torch
    import transformers

    return f"torch {torch.__version__}, transformers {transformers.__version__}, lm-eval {lm_eval.__version__}"


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` under a temporary name and renames it to ``path``; leaves no partial file after an error.

    Raises:
        UserError: if the file cannot be written.
    """
    unfinished = path.with_name(path.name + ".partial")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"out={str(path)!r} cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()
