"""The table as Markdown and CSV, and all three files of a leaderboard."""

from __future__ import annotations

import csv
import datetime
import io
from pathlib import Path

from lm_ortho.errors import UserError
from lm_ortho.leaderboard.report.page import render_html
from lm_ortho.leaderboard.report.text import EXPLANATION, READS, format_number
from lm_ortho.leaderboard.results import Results, Row, collect
from lm_ortho.leaderboard.store import Store
from lm_ortho.markdown import markdown_table, write_text
from lm_ortho.markup import csv_text, markdown_code, markdown_text


def read_results(directory: Path) -> Results:
    """The results in the store of ``directory``."""
    store = Store(directory, create=False)
    return collect(store.records(), {name: store.get_fact(name) for name in ("name", "board", "command")})


def write_pages(directory: Path, to: Path) -> list[Path]:
    """Writes HTML page, Markdown and CSV of the store in ``directory`` into ``to``, each file atomically."""
    results = read_results(directory)
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"to={str(to)!r} cannot be made ({error.strerror})") from None
    texts = {"html": render_html(results), "md": render_markdown(results), "csv": render_csv(results)}
    paths = [to / f"leaderboard.{ending}" for ending in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_text(path, text)
    return paths


def mark_text(row: Row, name: str, text: str) -> str:
    """The text in bold where the row is the best of its group, with a star where it is significantly worse."""
    if not text:
        return ""
    return f"**{text}**" if name in row.best_in else f"{text} *" if row.worse_in.get(name) else text


def render_markdown(results: Results) -> str:
    """The table in Markdown: forget and retain distance first, then every metric."""
    titles = [
        "method",
        "reads",
        "seeds",
        "forget",
        "retain",
        "frontier",
        *(markdown_text(f"{t} {m}") for t, m in results.columns),
    ]
    lines = []
    for row in results.rows:
        numbers = [mark_text(row, f"{t} {m}", format_number(row.numbers.get((t, m)))) for t, m in results.columns]
        sides = [mark_text(row, name, format_number(getattr(row, name))) for name in ("forget", "retain")]
        if row.is_end or row.forget is None:
            frontier = ""
        else:
            frontier = f"no: {markdown_text(row.dominated_by[0])}" if row.dominated_by else "yes"
        name = markdown_text(row.name) + (" (unfinished)" if row.missing else "")
        lines.append(
            [name, markdown_text(READS.get(row.mode, row.mode)), str(len(row.cells)), *sides, frontier, *numbers]
        )
    versions = markdown_text(", ".join(f"{name} {version}" for name, version in results.versions.items()))
    parts = [
        f"# {markdown_text(results.title)}",
        f"{EXPLANATION} Written on {datetime.date.today().isoformat()}; {versions}.",
        *map(markdown_text, results.notes),
        markdown_table(titles, lines),
        "## Cells and commands of each row",
        markdown_table(
            ["row", "cells by seed", "command"],
            [
                [
                    markdown_text(row.name),
                    " ".join(f"{seed}: {markdown_code(key[:12])}" for seed, key in row.cells.items()),
                    markdown_code(row.commands[0]),
                ]
                for row in results.rows
            ],
        ),
    ]
    return (
        "\n\n".join([*parts, f"Made by {markdown_code(results.command)}." if results.command else ""]).rstrip() + "\n"
    )


def render_csv(results: Results) -> str:
    """The table as CSV, for programs: one line per row and number."""
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
            alpha = "" if row.alpha is None else str(row.alpha)
            start = [row.name, row.method, row.mode, row.model, alpha, settings, task, metric]
            marks = [name in row.best_in, row.worse_in.get(name, "")]
            seeds = " ".join(f"{value:.9g}" for value in number.seeds)
            cells = " ".join(key[:12] for key in row.cells.values())
            numbers = [*map(_format_value, number[:3]), seeds, *marks]
            writer.writerow([*map(csv_text, start), *numbers, csv_text(cells), csv_text(row.commands[0])])
    return stream.getvalue()


def _format_value(value: float | None) -> str:
    return "" if value is None else f"{value:.9g}"
