"""Prints the verdict on the terminal and formats it as a Markdown page."""

from __future__ import annotations

import datetime

from rich.console import Console
from rich.table import Table

from lm_ortho.markdown import markdown_table, versions
from lm_ortho.markup import markdown_code, markdown_text, terminal_text
from lm_ortho.verdict.checks import Check
from lm_ortho.verdict.measurements import Measurement
from lm_ortho.verdict.runner import Outcome

_COLUMNS = (
    ("forget\nextraction", "tofu_forget", "extraction"),
    ("held-out\nphrasing", "tofu_forget_paraphrased", "extraction"),
    ("forget\nsecret PPL", "tofu_forget", "secret_ppl"),
    ("canary\nextraction", "canary_extraction", "extraction"),
    ("canary\nsecret PPL", "canary_extraction", "secret_ppl"),
    ("retain\nPPL", "tofu_retain", "ppl"),
    ("text\nPPL", "world_text", "token_ppl"),
)


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Prints the scores of each model, then every check with its acceptance threshold."""
    scores = Table(title="Measured")
    scores.add_column("model")
    for title, _, _ in _COLUMNS:
        scores.add_column(title, justify="right")
    for name, measurement in outcome.tables.items():
        scores.add_row(terminal_text(name), *(_format_value(measurement, task, metric) for _, task, metric in _COLUMNS))
    console.print(scores)
    checks = Table(title="Checks")
    for title in ("check", "base", "seed", "value", "95 % interval", "bar", ""):
        checks.add_column(title, justify="right" if title in ("value", "seed") else "left")
    for c in outcome.checks:
        interval = f"[{c.low:.4g}, {c.high:.4g}]"
        cells = map(terminal_text, (c.name, c.base, c.seed, f"{c.value:.4g}", interval, c.bar))
        checks.add_row(*cells, terminal_text("ok", "green") if c.ok else terminal_text("miss", "bold red"))
    console.print(checks)
    passed_count = sum(check.ok for check in outcome.checks)
    console.print(f"[bold]{outcome.verdict}[/]: {passed_count} of {len(outcome.checks)} checks hold")


def _format_value(measurement: Measurement, task: str, metric: str) -> str:
    value = measurement.values.get(task, {}).get(metric)
    return "" if value is None else f"{value.value:.4g}"


def format_markdown(outcome: Outcome, command: str) -> str:
    """Formats the same as a Markdown page: the measurements, then the checks, one column per seed."""
    passed_count = sum(check.ok for check in outcome.checks)
    titles = ["model", *(title.replace("\n", " ") for title, _, _ in _COLUMNS)]
    scores = [
        [markdown_text(name), *(_format_value(measurement, task, metric) for _, task, metric in _COLUMNS)]
        for name, measurement in outcome.tables.items()
    ]
    parts = [
        f"# Verdict: {outcome.verdict}, {passed_count} of {len(outcome.checks)} checks hold",
        f"Made by {markdown_code(command)} on {datetime.date.today().isoformat()} ({versions()}).",
        markdown_table(titles, scores),
    ]
    for base in dict.fromkeys(check.base for check in outcome.checks):
        checks = [check for check in outcome.checks if check.base == base]
        seeds = list(dict.fromkeys(check.seed for check in checks))
        lines = list[list[str]]()
        for name in dict.fromkeys(check.name for check in checks):
            by_seed = {check.seed: check for check in checks if check.name == name}
            bars = ", ".join(dict.fromkeys(check.bar for check in by_seed.values()))
            lines.append([name, bars, *(_format_check(by_seed[seed]) for seed in seeds)])
        columns = [f"seed {seed}" for seed in seeds] if base != "-" else ["second retain-only model"]
        title = f"base={base}" if base != "-" else "Control: the second retain-only model in the place of alpha=0"
        parts += [f"## {title}", markdown_table(["check", "bar", *columns], lines)]
    return "\n\n".join(parts) + "\n"


def _format_check(check: Check) -> str:
    note = f" ({check.note})" if check.note else ""
    return f"{'' if check.ok else '**miss** '}{check.value:.4g} [{check.low:.4g}, {check.high:.4g}]{note}"
