"""The columns of the table, and the bars that a model meets or misses; they were fixed before the first measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MEMBERSHIP = "tofu_1000_membership"


@dataclass(frozen=True)
class Column:
    """A column of the table: the metric of a task, or of the left-out rows of the utility task."""

    name: str
    task: str
    metric: str
    is_left_out: bool = False


COLUMNS = (
    Column("forget quality (KS p)", "tofu_forget10", "forget_quality"),
    Column("forget prob.", "tofu_forget10", "prob"),
    Column("forget ROUGE-L", "tofu_forget10", "rougel_recall"),
    Column("extraction strength", "tofu_forget10", "extraction_strength"),
    Column("AUC (loss)", MEMBERSHIP, "auc_loss"),
    Column("model utility", "tofu_model_utility", "model_utility"),
    Column("retain prob.", "tofu_model_utility", "retain_prob"),
    Column("retain ROUGE-L", "tofu_model_utility", "retain_rouge"),
    Column("left-out prob.", "tofu_model_utility", "retain_prob", is_left_out=True),
    Column("left-out ROUGE-L", "tofu_model_utility", "retain_rouge", is_left_out=True),
)
QUALITY, PROBABILITY, ROUGE, STRENGTH, AUC, UTILITY, RETAIN_PROBABILITY = (column.name for column in COLUMNS[:7])
Values = Mapping[str, Sequence[float | None]]
"""Value, lower and upper bound by the name of the column; bounds are None where a metric has none."""


@dataclass(frozen=True)
class Bar:
    """A condition on a model, the value it is about and whether it is met; a value that is missing is a miss."""

    name: str
    value: float
    is_met: bool


MIN_QUALITY, MAX_FACTOR, MAX_ROUGE, MAX_STRENGTH, MAX_AUC = 0.05, 1.5, 0.05, 0.03, 0.08
MIN_UTILITY, MIN_RETAIN, MAX_CHANGE = 0.97, 0.95, 0.02


def check_forgetting(values: Values, twin: Values, plain: Values) -> list[Bar]:
    """Returns the bars of a model that should have forgotten, against the twin and plain INT4.

    Those against the twin are two-sided: a model that avoids what it should not know is as far away as one that knows.
    """

    def get(table: Values, name: str) -> float:
        number = table[name][0]
        return math.nan if number is None else number

    def compare(name: str, limit: float) -> Bar:
        difference = get(values, name) - get(twin, name)
        return Bar(f"{name} within {limit:g} of twin", difference, abs(difference) <= limit + 1e-9)

    def divide(name: str, reference: Values) -> float:
        bottom = get(reference, name)
        return get(values, name) / bottom if bottom > 0 else math.nan

    factor, quality = divide(PROBABILITY, twin), get(values, QUALITY)
    utility, retain = divide(UTILITY, plain), divide(RETAIN_PROBABILITY, plain)
    return [
        Bar(f"{QUALITY} >= {MIN_QUALITY:g}", quality, quality >= MIN_QUALITY),
        Bar(f"{PROBABILITY} within {MAX_FACTOR:g}x of twin", factor, 1 / MAX_FACTOR <= factor <= MAX_FACTOR),
        compare(ROUGE, MAX_ROUGE),
        compare(STRENGTH, MAX_STRENGTH),
        compare(AUC, MAX_AUC),
        Bar(f"{UTILITY} >= {MIN_UTILITY:g} of INT4", utility, utility >= MIN_UTILITY),
        Bar(f"{RETAIN_PROBABILITY} >= {MIN_RETAIN:g} of INT4", retain, retain >= MIN_RETAIN),
    ]


def check_remembering(values: Values, plain: Values) -> list[Bar]:
    """Returns the bar of alpha=1: within .02 of plain INT4 on every column but the p-value, at the worst of them."""
    changes = dict[str, float]()
    for column in COLUMNS:
        if column.name == QUALITY:
            continue
        after, before = values[column.name][0], plain[column.name][0]
        changes[column.name] = math.inf if after is None or before is None else after - before
    worst = max(changes, key=lambda name: abs(changes[name]))
    limit = f"within {MAX_CHANGE:g} of INT4 on everything, worst: {worst}"
    return [Bar(limit, changes[worst], abs(changes[worst]) <= MAX_CHANGE + 1e-9)]
