"""Words and numbers that the pages of a leaderboard share."""

from __future__ import annotations

from lm_ortho.leaderboard.bootstrap import Number

READS = {"auto": "also the base model", "none": "merged weights", "end": "end of the scale"}
"""What a method reads, by mode."""

EXPLANATION = (
    "*Forget* is the distance from the model that never saw the forget set (0: no difference; remembering and breaking "
    "both raise it), *retain* the loss against the un-edited model (0: no loss); both are means of log ratios or "
    "differences over the metrics that the board names. Brackets are 95 % confidence intervals: a bootstrap over "
    "documents clustered by subject, and the spread over seeds, added in quadrature. Bold is the best of the methods "
    "that read the same; for a single metric that is the row nearest to the model that never saw the forget set. A "
    "star marks a row that is significantly worse than the best (paired by document, one-sided 5 %, Bonferroni over "
    "the rows). On the *frontier* is a row that no other method of its group beats on both sides."
)


def format_number(number: Number | None) -> str:
    """A value with its confidence interval; empty for None."""
    if number is None:
        return ""
    value, low, high = (None if part is None else f"{round(part, 9) + 0.0:.3g}" for part in number[:3])
    return f"{value}" if low is None or high is None else f"{value} [{low}, {high}]"
