"""The verdict on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lm_ortho.verdict.measure import Measurement
from lm_ortho.verdict.run import Outcome

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
