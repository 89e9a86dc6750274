"""Retain rows that a calibration does not read, so that they can be measured afterwards."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lm_ortho.data.row import Row
from lm_ortho.data.rows import read_rows
from lm_ortho.errors import UserError

SHARE = 0.1
"""Share of the retain rows that are held out."""
MOST_ROWS = 100
"""Largest number of rows that are held out: intervals become narrower slowly, and the calibration needs the others."""
FEWEST_RETAIN_ROWS = 100
"""Smallest number of retain rows of which any are held out; with fewer each one counts more in the calibration."""


GroupName = tuple[str, str]
"""``group`` or ``text``, and the group or text itself."""


class RetainSplit(NamedTuple):
    """The retain rows of a decomposition, and those that it does not read; both in the order of the file."""

    calibration: list[Row]
    held_out: list[Row]


def split_retain_rows(rows: Sequence[Row], held_out: str | Sequence[Row] = "auto") -> RetainSplit:
    """Splits retain rows into those for the calibration and those that are held out of it.

    Args:
        rows: the retain rows.
        held_out: ``auto`` holds out ``SHARE`` of the rows, ``MOST_ROWS`` at most, of ``FEWEST_RETAIN_ROWS`` or more.
            Rows with the same group, subject or context stay together, and a group that is larger than what is still
            missing is not held out. The choice depends on the texts of the rows alone, neither on their order nor on
            the seed of a recipe. ``none`` holds out no row. Anything else is a source of rows (``read_rows``), or rows,
            which the calibration does not read where they are among ``rows``.

    Raises:
        UserError: for a source that cannot be read, and one that holds all retain rows.
    """
    if held_out == "none":
        return RetainSplit(list(rows), [])
    if held_out == "auto":
        names = _draw_groups(rows)
        return RetainSplit(
            [row for row in rows if _group_name(row) not in names], [row for row in rows if _group_name(row) in names]
        )
    own_rows = read_rows(held_out, "held_out") if isinstance(held_out, str) else list(held_out)
    texts = {(row.context, row.target) for row in own_rows}
    calibration = [row for row in rows if (row.context, row.target) not in texts]
    if rows and not calibration:
        raise UserError("held_out: it holds all rows of retain; the calibration needs rows of its own")
    return RetainSplit(calibration, own_rows)


def describe_split(split: RetainSplit, held_out: str | Sequence[Row]) -> str:
    """One line about the rows that are held out, and how to change that."""
    number, total = len(split.held_out), len(split.held_out) + len(split.calibration)
    if held_out == "none":
        return f"none; the calibration reads all {total} retain rows"
    if held_out != "auto":
        return f"{number} rows of your own, which the calibration of {len(split.calibration)} rows does not read"
    if number:
        return f"{number} of {total} retain rows, which the calibration does not read; held_out=none keeps all"
    reason = f"fewer than {FEWEST_RETAIN_ROWS}" if total < FEWEST_RETAIN_ROWS else "in groups that are too large"
    return f"none of {total} retain rows, which are {reason}; held_out=FILE names rows that calibration does not read"


def _group_name(row: Row) -> GroupName:
    """What rows that stay together have in common."""
    group = row.group or row.subject
    return ("group", group) if group else ("text", row.context or row.target)


def _draw_groups(rows: Sequence[Row]) -> set[GroupName]:
    """The names of the groups that are held out, in the order of their hashes as long as they fit."""
    if len(rows) < FEWEST_RETAIN_ROWS:
        return set()
    sizes = Counter(_group_name(row) for row in rows)
    missing, drawn = min(MOST_ROWS, int(SHARE * len(rows))), set[GroupName]()
    for name in sorted(sizes, key=lambda name: hashlib.sha256("\0".join(name).encode()).digest()):
        if sizes[name] <= missing:
            drawn.add(name)
            missing -= sizes[name]
    return drawn
