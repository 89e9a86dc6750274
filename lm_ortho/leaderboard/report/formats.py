"""The table as Markdown and CSV, and all three files of a leaderboard."""

from __future__ import annotations

import csv
import datetime
import io
from pathlib import Path

from lm_ortho.errors import UserError
from lm_ortho.leaderboard.bootstrap import Number
from lm_ortho.leaderboard.results import Results, Row, collect
from lm_ortho.leaderboard.store import Store
from lm_ortho.markdown import markdown_table, write_text

READS = {"auto": "also the base model", "none": "merged weights", "end": "end of the scale"}
"""Modes in words."""


def results_of(directory: Path) -> Results:
    """The table of what a folder holds."""
    store = Store(directory, create=False)
    return collect(store.records(), {name: store.fact(name) for name in ("name", "board", "command")})


def write_pages(directory: Path, to: Path) -> list[Path]:
    """Writes the HTML page, Markdown and CSV of the store in ``directory``; each is there as a whole or not at all."""
    from lm_ortho.leaderboard.report.page import html

    results = results_of(directory)
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"to={str(to)!r} cannot be made ({error.strerror})") from None
    made = {"html": html(results), "md": markdown(results), "csv": comma_separated(results)}
    paths = [to / f"leaderboard.{ending}" for ending in made]
    for path, text in zip(paths, made.values(), strict=True):
        write_text(path, text)
    return paths


def shown(number: Number | None) -> str:
    """A value with its interval."""
    if number is None:
        return ""
    value, low, high = (None if part is None else f"{round(part, 9) + 0.0:.3g}" for part in number[:3])
    return f"{value}" if low is None or high is None else f"{value} [{low}, {high}]"


def marked(row: Row, name: str, text: str) -> str:
    """Bold where the row is the best of its group; a star where it is worse than that one beyond chance."""
    if not text:
        return ""
    return f"**{text}**" if name in row.best else f"{text} *" if row.worse.get(name) else text


def markdown(results: Results) -> str:
    """The table for reading: both sides first, then every metric."""
    titles = ["method", "reads", "seeds", "forget", "retain", "frontier", *(f"{t} {m}" for t, m in results.columns)]
    lines = []
    for row in results.rows:
        numbers = [marked(row, f"{t} {m}", shown(row.numbers.get((t, m)))) for t, m in results.columns]
        sides = [marked(row, name, shown(getattr(row, name))) for name in ("forget", "retain")]
        place = "" if row.is_end or row.forget is None else "yes" if not row.better else f"no: {row.better[0]}"
        name = f"{row.name} (unfinished)" if row.missing else row.name
        lines.append([name, READS[row.mode], str(len(row.cells)), *sides, place, *numbers])
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    parts = [
        f"# {results.title}",
        f"{EXPLAINED} Written on {datetime.date.today().isoformat()}; {versions}.",
        markdown_table(titles, lines),
        "## What is behind each row",
        markdown_table(
            ["row", "cells by seed", "command"],
            [[row.name, " ".join(f"{s}: `{k[:12]}`" for s, k in row.cells.items()), f"`{row.commands[0]}`"]
             for row in results.rows],
        ),
    ]  # fmt: skip
    return "\n\n".join([*parts, f"Made by `{results.command}`." if results.command else ""]).rstrip() + "\n"


EXPLAINED = (
    "*Forget* is the distance from the model that never saw the forget set (0 is like it, either side is worse), "
    "*retain* what is lost beside the un-edited model (0 is nothing); both are means over the metrics that the board "
    "names, of log ratios or differences. Brackets are 95 % intervals: documents resampled by whom they are about, and "
    "seeds, added in quadrature. Bold is the best of those that read the same; for a single metric that is the one "
    "nearest to the model that never saw it. A star is worse than that beyond chance (paired by document, one-sided "
    "5 %, Bonferroni over the rows). On the *frontier* is a row that no other method of its group beats on both sides."
)


def comma_separated(results: Results) -> str:
    """The table for programs: one line per row and number."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        "row,method,reads,model,alpha,settings,task,metric,value,low,high,seeds,best,worse,cells,command".split(",")
    )
    for row in results.rows:
        sides = {("", name): getattr(row, name) for name in ("forget", "retain")}
        for (task, metric), number in {**sides, **row.numbers}.items():
            if number is None:
                continue
            name = f"{task} {metric}".strip()
            settings = " ".join(f"{key}={value}" for key, value in row.settings.items())
            alpha = "" if row.alpha is None else row.alpha
            start = [row.name, row.method, row.mode, row.model, alpha, settings, task, metric]
            marks = [name in row.best, row.worse.get(name, "")]
            seeds = " ".join(f"{value:.9g}" for value in number.seeds)
            cells = " ".join(key[:12] for key in row.cells.values())
            writer.writerow([*start, *map(_plain, number[:3]), seeds, *marks, cells, row.commands[0]])
    return stream.getvalue()


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.9g}"
