"""The verdict on the terminal and as a page."""

from __future__ import annotations

import datetime

from rich.console import Console
from rich.table import Table

from lm_ortho.markdown import markdown_table, versions
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
    """What each model scored, then every check with its bar."""
    scores = Table(title="Measured")
    scores.add_column("model")
    for title, _, _ in _COLUMNS:
        scores.add_column(title, justify="right")
    for name, measured in outcome.tables.items():
        scores.add_row(name, *(_cell(measured, task, metric) for _, task, metric in _COLUMNS))
    console.print(scores)
    checks = Table(title="Checks")
    for title in ("check", "base", "seed", "value", "95 % interval", "bar", ""):
        checks.add_column(title, justify="right" if title in ("value", "seed") else "left")
    for c in outcome.checks:
        interval = f"[{c.low:.4g}, {c.high:.4g}]".replace("[", "\\[")
        ok = "[green]ok[/]" if c.ok else "[bold red]miss[/]"
        checks.add_row(c.name, c.base, str(c.seed), f"{c.value:.4g}", interval, c.bar, ok)
    console.print(checks)
    missed = sum(not check.ok for check in outcome.checks)
    console.print(f"[bold]{outcome.verdict}[/]: {len(outcome.checks) - missed} of {len(outcome.checks)} checks hold")


def _cell(measured: Measurement, task: str, metric: str) -> str:
    found = measured.values.get(task, {}).get(metric)
    return "" if found is None else f"{found.value:.4g}"


def markdown(outcome: Outcome, command: str) -> str:
    """The same as a page: what was measured, then the checks, one column per seed."""
    held = sum(check.ok for check in outcome.checks)
    titles = ["model", *(title.replace("\n", " ") for title, _, _ in _COLUMNS)]
    measured = [
        [name, *(_cell(found, task, metric) for _, task, metric in _COLUMNS)] for name, found in outcome.tables.items()
    ]
    parts = [
        f"# Verdict: {outcome.verdict}, {held} of {len(outcome.checks)} checks hold",
        f"Made by `{command}` on {datetime.date.today().isoformat()} ({versions()}).",
        markdown_table(titles, measured),
    ]
    for base in dict.fromkeys(check.base for check in outcome.checks):
        mine = [check for check in outcome.checks if check.base == base]
        seeds = list(dict.fromkeys(check.seed for check in mine))
        lines = list[list[str]]()
        for name in dict.fromkeys(check.name for check in mine):
            by_seed = {check.seed: check for check in mine if check.name == name}
            bars = ", ".join(dict.fromkeys(check.bar for check in by_seed.values()))
            lines.append([name, bars, *(_judged(by_seed[seed]) for seed in seeds)])
        columns = [f"seed {seed}" for seed in seeds] if base != "-" else ["second reference"]
        title = f"base={base}" if base != "-" else "Control: the second reference in the place of alpha=0"
        parts += [f"## {title}", markdown_table(["check", "bar", *columns], lines)]
    return "\n\n".join(parts) + "\n"


def _judged(check: Check) -> str:
    note = f" ({check.note})" if check.note else ""
    return f"{'' if check.ok else '**miss** '}{check.value:.4g} [{check.low:.4g}, {check.high:.4g}]{note}"
