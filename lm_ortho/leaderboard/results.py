"""Rows of the table: averages the seeds of a method at one alpha, computes its distances, and compares the methods."""

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
    average_seeds,
    find_dominating,
    interval_around,
    is_significantly_worse,
)
from lm_ortho.leaderboard.config import Axis, Board, Frontier
from lm_ortho.leaderboard.retain_samples import explain_absence
from lm_ortho.leaderboard.store import DONE, FAILED, Record

TARGET, UNEDITED = "never_saw", "unedited"
"""Methods that are the ends of the scale."""
Column = tuple[str, str]
"""A task and a metric."""


@dataclass
class Row:
    """A method with settings at one alpha (None: it has no alpha). ``mode`` says what it reads.

    ``forget`` is the distance from the target, ``retain`` the loss against ``unedited``; lower is better, and 0 is the
    value of the target and of the un-edited model. ``dominated_by`` names the rows that are better on both sides.
    ``best_in`` are the columns in which the row is the best of its group, ``worse_in`` says by column whether it is
    significantly worse than the best. ``cells`` and ``checkpoints`` are hashes by seed.
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
    dominated_by: list[str] = field(default_factory=list)
    worse_in: dict[str, bool] = field(default_factory=dict)
    best_in: list[str] = field(default_factory=list)
    cells: dict[int, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    checkpoints: dict[int, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    missing: int = 0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The name of the row in the table."""
        if self.alpha is None:
            return self.label
        return f"{self.label} alpha={self.alpha:g}" if _is_number(self.alpha) else f"{self.label} alpha={self.alpha}"

    @property
    def is_end(self) -> bool:
        return self.mode == "end"


@dataclass
class Results:
    """All rows of a board or sweep in the order of the plan, their columns, and the layer shares of ortho streams.

    ``notes`` are sentences for the page: how the tasks asked, and why a metric has no column.
    """

    name: str
    title: str
    rows: list[Row]
    columns: list[Column]
    layers: dict[str, dict[str, float]]
    frontier: Frontier
    versions: Mapping[str, str]
    command: str = ""
    notes: tuple[str, ...] = ()


class _Measurements:
    """Values and samples of one row, by column and seed."""

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
                values = np.array([math.nan if n is None else n for n in numbers], dtype=np.float64)
                self.samples.setdefault((task, metric), {})[seed] = Samples(values, groups)


def collect(records: Sequence[Record], facts: Mapping[str, Any]) -> Results:
    """The table of the finished pieces; ``facts`` are those of the store (``name``, ``board``, ``command``)."""
    # 1. Gather the measurements of each row.
    rows, measurements = dict[str, Row](), dict[str, _Measurements]()
    make_records = {record.piece.cell: record for record in records if record.piece.kind == "make"}
    for record in records:
        if record.piece.kind != "evaluate":
            continue
        row = _find_row(record, make_records.get(record.piece.cell), rows)
        if record.status == DONE:
            measurements.setdefault(row.key, _Measurements()).add(record.piece.config.get("seed", 0), record.result)
            row.seconds += record.seconds
        else:
            row.missing += 1
        if record.status == FAILED:
            row.failures.append(f"{record.piece.config['task']}: {(record.error.splitlines() or ['?'])[0]}")
    # 2. Average over seeds.
    columns = list(dict.fromkeys(column for row_data in measurements.values() for column in row_data.values))
    for key, row_data in measurements.items():
        rows[key].numbers = {
            column: average_seeds(list(seeds.values()), column[1]) for column, seeds in row_data.values.items()
        }
    # 3. Compare the rows of each model.
    board = Board(**facts["board"]) if facts.get("board") else None
    frontier = board.frontier if board else Frontier()
    models = list(dict.fromkeys(row.model for row in rows.values()))
    for row in rows.values() if len(models) > 1 else ():
        row.label += f" of {row.model}" if row.label != row.model else ""
    for model in models:
        model_rows = [row for row in rows.values() if row.model == model]
        _Comparison(model_rows, measurements, frontier).compare_rows(columns)
    name = facts.get("name") or ""
    return Results(
        name=name,
        title=(board.title if board else "") or name,
        rows=list(rows.values()),
        columns=columns,
        layers=_collect_layers(make_records.values(), name_models=len(models) > 1),
        frontier=frontier,
        versions=_find_versions(records),
        command=facts.get("command") or "",
        notes=(*describe_chat(records), *explain_missing_columns(records, board, columns)),
    )


def describe_chat(records: Sequence[Record]) -> list[str]:
    """A sentence for each way in which the finished pieces asked in a chat template."""
    chats = [record.piece.config.get("chat") for record in records if record.status == DONE]
    sentences = []
    for chat in filter(None, chats):
        name = chat["apply_chat_template"]
        parts = [f"Questions are asked in the chat template {name if isinstance(name, str) else 'of the tokenizer'}"]
        parts += [f"after the system message {text!r}" if (text := chat.get("system_instruction")) else "as they are"]
        parts += [f"with {key}={value!r}" for key, value in chat.get("chat_template_args", {}).items()]
        sentences.append(f"{', '.join(parts)}.")
    return list(dict.fromkeys(sentences))


def explain_missing_columns(records: Sequence[Record], board: Board | None, columns: Sequence[Column]) -> list[str]:
    """A sentence for each reason why metrics of the tasks are missing in all rows."""
    measured = [record for record in records if record.piece.kind == "evaluate" and record.status == DONE]
    limits = {record.piece.config["task"]: record.piece.config.get("limit") for record in measured}
    sentences = explain_absence(board, limits) if board else []
    reasons: dict[Column, str] = {}
    for record in measured:
        for task, task_reasons in record.result.get("unavailable", {}).items():
            for metric, reason in task_reasons.items():
                # What needs the samples of the retain-only model is explained above.
                if (task, metric) not in columns and (board is None or "_retain_samples" not in reason):
                    reasons.setdefault((task, metric), reason)
    return sentences + [f"{task}: no {metric}: {reason}." for (task, metric), reason in reasons.items()]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _find_row(record: Record, make_record: Record | None, rows: dict[str, Row]) -> Row:
    """The row of a measurement, added to ``rows`` if it is new, with cell, command and checkpoint filled in."""
    config = record.piece.config
    key = config.get("row") or f"{record.piece.cell[:12]} {config['alpha']}"
    if key not in rows:
        mode = config.get("mode", "auto")
        rows[key] = Row(
            key=key,
            label=config["label"],
            method=config["method"],
            mode=mode,
            model=config["model"],
            alpha=config["alpha"],
            settings=config.get("settings", {}),
        )
    row, seed = rows[key], config.get("seed", 0)
    make_result = {} if make_record is None else make_record.result
    if make_result.get("settings") is not None and config.get("tuned"):
        row.settings = make_result["settings"]
        settings = " ".join(f"{name}={value}" for name, value in row.settings.items())
        row.label = f"{row.method} {settings} (tuned)".replace("  ", " ")
    row.cells[seed] = record.piece.cell
    row.commands.append(config["command"])
    checkpoints = (record.result.get("checkpoint"), row.checkpoints.get(seed), make_result.get("checkpoint"))
    row.checkpoints[seed] = next(filter(None, checkpoints), "")
    return row


def _collect_layers(make_records: Iterable[Record], *, name_models: bool) -> dict[str, dict[str, float]]:
    """The share of each layer's weights in the ortho stream, by label of a cell with an ortho stream.

    ``name_models`` adds the name of the model to the label. The report of a method may hold a number as ``layers``;
    such a record is skipped.
    """
    shares = {}
    for record in make_records:
        if not isinstance(record.result.get("layers"), Mapping):
            continue
        config = record.piece.config
        label = f"{config['label']} seed={config['seed']}" + (f" of {config['model']}" if name_models else "")
        shares[label] = {name: values / weights for name, (values, weights) in record.result["layers"].items()}
    return shares


def _find_versions(records: Iterable[Record]) -> Mapping[str, str]:
    configs = (record.piece.config for record in records)
    return next((config["versions"] for config in configs if "versions" in config), {})


class _Comparison:
    """Computes distances, the frontier and significance among the rows of one model."""

    def __init__(self, rows: Sequence[Row], measurements: Mapping[str, _Measurements], frontier: Frontier) -> None:
        self.rows = [row for row in rows if row.key in measurements]
        self.measurements, self.frontier = measurements, frontier
        self.resampler = Resampler()
        self.ends = {row.method: row for row in self.rows if row.method in (TARGET, UNEDITED)}
        self.draws: dict[tuple[str, str], Floats | None] = {}

    def compare_rows(self, columns: Sequence[Column]) -> None:
        """Fills in the fields of the rows that compare them with others."""
        # 1. Distances from the two ends of the scale.
        for row in self.rows:
            row.forget = self._score(row, "forget", self.frontier.forget, end=TARGET, absolute=True)
            row.retain = self._score(row, "retain", self.frontier.retain, end=UNEDITED, absolute=False)
        # 2. The frontier.
        scored_rows = [row for row in self.rows if row.forget and row.retain]
        points = {row.key: (row.forget.value, row.retain.value) for row in scored_rows if row.forget and row.retain}
        rivals = {row.key: [other.key for other in scored_rows if self._is_rival(other, row)] for row in scored_rows}
        names = {row.key: row.name for row in self.rows}
        dominating_keys = find_dominating(points, rivals)
        for row in scored_rows:
            row.dominated_by = [names[key] for key in dominating_keys[row.key]]
        # 3. The best row in each column, and the rows that are significantly worse.
        for name in ("forget", "retain"):
            self._compare(name, {row.key: number.value for row in scored_rows if (number := getattr(row, name))})
        for column in columns:
            self._compare_column(column)

    @staticmethod
    def _is_rival(other: Row, row: Row) -> bool:
        """Whether ``other`` is another method that reads the same; the ends of the scale do not compete."""
        return not other.is_end and not row.is_end and other.mode == row.mode and other.method != row.method

    def _score(self, row: Row, name: str, axes: Sequence[Axis], *, end: str, absolute: bool) -> Number | None:
        """Mean over the axes of the difference from the end of the scale; None where either lacks a number."""
        end_row = self.ends.get(end)
        columns = [(axis.task, axis.metric) for axis in axes]
        if end_row is None or any(column not in r.numbers for column in columns for r in (row, end_row)):
            return None
        differences = []
        for axis, column in zip(axes, columns, strict=True):
            origin = _scale_value(end_row.numbers[column].value, axis)
            seed_values = [_scale_value(value, axis) for value in row.numbers[column].seeds]
            differences.append([_orient(value - origin, axis, absolute) for value in seed_values])
        seed_counts = {len(axis_differences) for axis_differences in differences}
        seeds = np.mean(differences, axis=0).tolist() if len(seed_counts) == 1 else []
        value = float(np.mean([np.mean(axis_differences) for axis_differences in differences]))
        draws = self._score_draws(row, end_row, axes, absolute)
        self.draws[name, row.key] = None if draws is None else draws + (value - draws[0])
        return interval_around(value, draws, seeds, floor=0.0 if absolute else -math.inf)

    def _score_draws(self, row: Row, end_row: Row, axes: Sequence[Axis], absolute: bool) -> Floats | None:
        """The score over all documents, then in every resample; None without numbers of single documents."""
        terms = []
        for axis in axes:
            row_means, end_means = (self._means(r, (axis.task, axis.metric)) for r in (row, end_row))
            if row_means is None or end_means is None:
                return None
            origin = _scale_means(np.mean(end_means, axis=0), axis)
            differences = [_scale_means(seed_means, axis) - origin for seed_means in row_means]
            terms += [_orient(difference, axis, absolute) / len(row_means) for difference in differences]
        return np.asarray(np.sum(terms, axis=0) / len(axes))

    def _means(self, row: Row, column: Column) -> list[Floats] | None:
        """For each seed the mean over documents, then over every resample of them."""
        samples = self.measurements[row.key].samples.get(column)
        return [self.resampler.means(seed_samples) for seed_samples in samples.values()] if samples else None

    def _compare(self, name: str, values: Mapping[str, float]) -> None:
        """Marks in each group of methods the row that is best in ``name``, and the significantly worse ones."""
        for mode in dict.fromkeys(row.mode for row in self.rows if not row.is_end):
            group = [
                row for row in self.rows if row.mode == mode and row.key in values and not math.isnan(values[row.key])
            ]
            if not group:
                continue
            best = min(group, key=lambda row: values[row.key])
            best.best_in.append(name)
            for row in group:
                if row is best:
                    continue
                draws, best_draws = (self.draws.get((name, key)) for key in (row.key, best.key))
                is_worse = is_significantly_worse(draws, best_draws, len(group) - 1)
                if is_worse is not None:
                    row.worse_in[name] = is_worse

    def _compare_column(self, column: Column) -> None:
        """Compares the rows in one metric; the best is the row nearest to the target, on either side."""
        target = self.ends.get(TARGET)
        if target is None or column not in target.numbers:
            return
        name, target_value = " ".join(column), target.numbers[column].value
        target_means = self._means(target, column)
        for row in self.rows:
            row_means = self._means(row, column)
            if row_means is None or target_means is None:
                self.draws[name, row.key] = None
            else:
                self.draws[name, row.key] = np.abs(np.mean(row_means, axis=0) - np.mean(target_means, axis=0))
        rows = [row for row in self.rows if column in row.numbers]
        self._compare(name, {row.key: abs(row.numbers[column].value - target_value) for row in rows})


_LOG_METRICS = ("ppl", "truth_ratio")
"""Suffixes of metrics whose documents store the logarithm of the value that the task reports."""


def _scale_means(means: Floats, axis: Axis) -> Floats:
    """Means over documents on the scale of the axis; NaN where the logarithm does not exist."""
    if axis.metric.endswith(_LOG_METRICS):
        return means if axis.scale == "log" else np.exp(means)
    if axis.scale == "linear":
        return means
    return np.log(means, out=np.full_like(means, np.nan), where=means > 0)


def _scale_value(value: float, axis: Axis) -> float:
    if axis.scale == "linear":
        return value
    return math.log(value) if value > 0 else -math.inf


def _orient(difference: Any, axis: Axis, absolute: bool) -> Any:
    """A difference as a distance (``absolute``), or signed so that lower is better."""
    if absolute:
        return abs(difference)
    return difference if axis.better == "lower" else -difference
