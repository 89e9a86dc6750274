"""Rows of the table: the seeds of a method at one alpha together, how far it is from either side, who is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lm_ortho.leaderboard.bootstrap import (
    Floats,
    Number,
    Resampler,
    Samples,
    around_value,
    dominating,
    of_seeds,
    worse_than,
)
from lm_ortho.leaderboard.config import Axis, Board, Frontier
from lm_ortho.leaderboard.store import DONE, FAILED, Record

TARGET, UNEDITED = "never_saw", "unedited"
"""Methods that are the ends of the scale."""
Column = tuple[str, str]
"""A task and a metric."""


@dataclass
class Row:
    """A method with settings at one alpha (None: no dial). ``mode`` says what it reads, ``cells`` by seed what it is.

    ``forget`` is the distance from the target, ``retain`` what it costs beside ``unedited``; lower is better, 0 the
    target's and the un-edited model's own. ``worse`` has the columns in which it is beyond chance worse than the best.
    """

    key: str
    label: str
    method: str
    mode: str
    model: str
    alpha: Any
    settings: Mapping[str, Any]
    numbers: dict[Column, Number] = field(default_factory=dict)
    forget: Number | None = None
    retain: Number | None = None
    better: list[str] = field(default_factory=list)
    worse: dict[str, bool] = field(default_factory=dict)
    best: list[str] = field(default_factory=list)
    cells: dict[int, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    checkpoints: dict[int, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    missing: int = 0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """What it is called in the table."""
        return self.label + ("" if self.alpha is None else f" alpha={self.alpha:g}" if _is_number(self.alpha) else
                             f" alpha={self.alpha}")  # fmt: skip

    @property
    def is_end(self) -> bool:
        return self.mode == "end"


@dataclass
class Results:
    """All rows of a board or sweep in the order of the plan, the columns they have, and the maps of ortho streams."""

    name: str
    title: str
    rows: list[Row]
    columns: list[Column]
    layers: dict[str, dict[str, float]]
    frontier: Frontier
    versions: Mapping[str, str]
    command: str = ""


class _Raw:
    """Values and samples of one row by seed."""

    def __init__(self) -> None:
        self.values: dict[Column, dict[int, tuple[float, float | None, float | None]]] = {}
        self.samples: dict[Column, dict[int, Samples]] = {}

    def add(self, seed: int, result: Mapping[str, Any]) -> None:
        for task, metrics in result["values"].items():
            for metric, (value, low, high, _) in metrics.items():
                self.values.setdefault((task, metric), {})[seed] = (value, low, high)
        for task, metrics in result["samples"].items():
            groups = tuple(result["groups"][task])
            for metric, numbers in metrics.items():
                found = Samples(np.array([math.nan if n is None else n for n in numbers], dtype=np.float64), groups)
                self.samples.setdefault((task, metric), {})[seed] = found


def collect(records: Sequence[Record], facts: Mapping[str, Any]) -> Results:
    """The table of what is finished; ``facts`` are those of the store (``name``, ``board``, ``command``)."""
    rows, raw = dict[str, Row](), dict[str, _Raw]()
    made = {record.piece.cell: record for record in records if record.piece.kind == "make"}
    for record in records:
        if record.piece.kind != "evaluate":
            continue
        row = _row_of(record, made.get(record.piece.cell), rows)
        if record.status == DONE:
            raw.setdefault(row.key, _Raw()).add(record.piece.config.get("seed", 0), record.result)
            row.seconds += record.seconds
        else:
            row.missing += 1
        if record.status == FAILED:
            row.failed.append(f"{record.piece.config['task']}: {(record.error.splitlines() or ['?'])[0]}")
    columns = list(dict.fromkeys(column for each in raw.values() for column in each.values))
    for key, each in raw.items():
        rows[key].numbers = {column: of_seeds(list(seeds.values()), column[1]) for column, seeds in each.values.items()}
    given = facts.get("board")
    board = Board(**given) if given else None
    frontier = board.frontier if board else Frontier()
    models = list(dict.fromkeys(row.model for row in rows.values()))
    for row in rows.values() if len(models) > 1 else ():
        row.label += f" of {row.model}" if row.label != row.model else ""
    for model in models:
        _Judge([row for row in rows.values() if row.model == model], raw, frontier).judge(columns)
    return Results(
        facts.get("name") or "", (board.title if board else "") or facts.get("name") or "", list(rows.values()),
        columns, _layers(made.values(), len(models) > 1), frontier, _versions(records), facts.get("command") or "",
    )  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _row_of(record: Record, made: Record | None, rows: dict[str, Row]) -> Row:
    config = record.piece.config
    key = config.get("row") or f"{record.piece.cell[:12]} {config['alpha']}"
    if key not in rows:
        mode = config.get("mode", "auto")
        rows[key] = Row(
            key, config["label"], config["method"], mode, config["model"], config["alpha"], config.get("settings", {})
        )
    row, seed = rows[key], config.get("seed", 0)
    if made is not None and made.result.get("settings") is not None and config.get("tuned"):
        row.settings = made.result["settings"]
        told = " ".join(f"{name}={value}" for name, value in row.settings.items())
        row.label = f"{row.method} {told} (tuned)".replace("  ", " ")
    row.cells[seed] = record.piece.cell
    row.commands.append(config["command"])
    of_make = made.result.get("checkpoint", "") if made is not None else ""
    row.checkpoints[seed] = record.result.get("checkpoint") or row.checkpoints.get(seed) or of_make
    return row


def _layers(made: Iterable[Record], several: bool) -> dict[str, dict[str, float]]:
    """By label of a cell with a dial, the share of each layer's weights in the ortho stream.

    Of ``several`` models each is named.
    What a method reports of itself may have the same name, and then it is something else.
    """
    return {
        f"{record.piece.config['label']} seed={record.piece.config['seed']}"
        + (f" of {record.piece.config['model']}" if several else ""): {
            name: kept / weights for name, (kept, weights) in record.result["layers"].items()
        }
        for record in made
        if isinstance(record.result.get("layers"), Mapping)
    }


def _versions(records: Iterable[Record]) -> Mapping[str, str]:
    found: Mapping[str, str] = next((r.piece.config["versions"] for r in records if "versions" in r.piece.config), {})
    return found


class _Judge:
    """Distances, the frontier and significance among the rows of one model."""

    def __init__(self, rows: Sequence[Row], raw: Mapping[str, _Raw], frontier: Frontier) -> None:
        self.rows = [row for row in rows if row.key in raw]
        self.raw, self.frontier = raw, frontier
        self.resampler = Resampler()
        self.ends = {row.method: row for row in self.rows if row.method in (TARGET, UNEDITED)}
        self.draws: dict[tuple[str, str], Floats | None] = {}

    def judge(self, columns: Sequence[Column]) -> None:
        for row in self.rows:
            row.forget = self._score(row, "forget", self.frontier.forget, TARGET, absolute=True)
            row.retain = self._score(row, "retain", self.frontier.retain, UNEDITED, absolute=False)
        both = [row for row in self.rows if row.forget and row.retain]
        points = {row.key: (row.forget.value, row.retain.value) for row in both if row.forget and row.retain}
        rivals = {row.key: [o.key for o in both if self._is_rival(o, row)] for row in both}
        names = {row.key: row.name for row in self.rows}
        found = dominating(points, rivals)
        for row in both:
            row.better = [names[key] for key in found[row.key]]
        for name in ("forget", "retain"):
            self._compare(name, {row.key: number.value for row in both if (number := getattr(row, name))})
        for column in columns:
            self._compare_column(column)

    @staticmethod
    def _is_rival(other: Row, row: Row) -> bool:
        """Another method that reads what this one may read; the ends are nobody's rivals."""
        return not other.is_end and not row.is_end and other.mode == row.mode and other.method != row.method

    def _score(self, row: Row, name: str, axes: Sequence[Axis], end: str, absolute: bool) -> Number | None:
        """Mean over the axes of the difference from the end of the scale; None where either lacks a number."""
        ground = self.ends.get(end)
        if ground is None or any((a.task, a.metric) not in r.numbers for a in axes for r in (row, ground)):
            return None
        parts = []
        for axis in axes:
            column = (axis.task, axis.metric)
            middle = _scaled(ground.numbers[column].value, axis)
            parts.append([_signed(_scaled(v, axis) - middle, axis, absolute) for v in row.numbers[column].seeds])
        seeds = np.mean(parts, axis=0).tolist() if len({len(part) for part in parts}) == 1 else []
        value = float(np.mean([np.mean(part) for part in parts]))
        draws = self._score_draws(row, ground, axes, absolute)
        self.draws[name, row.key] = None if draws is None else draws + (value - draws[0])
        return around_value(value, draws, seeds, floor=0.0 if absolute else -math.inf)

    def _score_draws(self, row: Row, ground: Row, axes: Sequence[Axis], absolute: bool) -> Floats | None:
        parts = []
        for axis in axes:
            own, theirs = (self._means(r, (axis.task, axis.metric)) for r in (row, ground))
            if own is None or theirs is None:
                return None
            middle = _level(np.mean(theirs, axis=0), axis)
            parts += [_signed(_level(each, axis) - middle, axis, absolute) / len(own) for each in own]
        return np.asarray(np.sum(parts, axis=0) / len(axes))

    def _means(self, row: Row, column: Column) -> list[Floats] | None:
        """Per seed the mean over documents and over resamples of them."""
        samples = self.raw[row.key].samples.get(column)
        return [self.resampler.means(each) for each in samples.values()] if samples else None

    def _compare(self, name: str, values: Mapping[str, float]) -> None:
        """Notes in each group of methods which row is best in ``name``, and which are worse beyond chance."""
        for mode in dict.fromkeys(row.mode for row in self.rows if not row.is_end):
            group = [
                row for row in self.rows if row.mode == mode and row.key in values and not math.isnan(values[row.key])
            ]
            if not group:
                continue
            best = min(group, key=lambda row: values[row.key])
            best.best.append(name)
            for row in group:
                if row is not best:
                    lie = worse_than(self.draws.get((name, row.key)), self.draws.get((name, best.key)), len(group) - 1)
                    row.worse |= {} if lie is None else {name: lie}

    def _compare_column(self, column: Column) -> None:
        """Best is the row nearest to the target, on whichever side."""
        target = self.ends.get(TARGET)
        if target is None or column not in target.numbers:
            return
        name, middle = " ".join(column), target.numbers[column].value
        theirs = self._means(target, column)
        for row in self.rows:
            own = self._means(row, column)
            if own is None or theirs is None:
                self.draws[name, row.key] = None
            else:
                self.draws[name, row.key] = np.abs(np.mean(own, axis=0) - np.mean(theirs, axis=0))
        self._compare(
            name, {row.key: abs(row.numbers[column].value - middle) for row in self.rows if column in row.numbers}
        )


_OF_LOGS = ("ppl", "truth_ratio")
"""Ends of the names of metrics whose documents have the logarithm of what the task reports."""


def _level(means: Floats, axis: Axis) -> Floats:
    """Means over documents on the scale of the axis; NaN where they have no logarithm."""
    if axis.metric.endswith(_OF_LOGS):
        return means if axis.scale == "log" else np.exp(means)
    if axis.scale == "linear":
        return means
    return np.log(means, out=np.full_like(means, np.nan), where=means > 0)


def _scaled(value: float, axis: Axis) -> float:
    if axis.scale == "linear":
        return value
    return math.log(value) if value > 0 else -math.inf


def _signed(difference: Any, axis: Axis, absolute: bool) -> Any:
    """Both sides count, or only what is worse than the end; then lower is better."""
    if absolute:
        return abs(difference)
    return difference if axis.better == "lower" else -difference
