"""From measurements to checks: a name, a value with its interval, a bar, and whether it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lm_ortho.metrics import Interval, paired_difference
from lm_ortho.verdict import thresholds
from lm_ortho.verdict.measure import REASONING_METRICS, REASONING_TASKS, Measurement


@dataclass(frozen=True)
class Check:
    """One line of the verdict. ``base`` and ``seed`` say which decomposition; ``bar`` is readable text."""

    name: str
    base: str
    value: float
    low: float
    high: float
    bar: str
    ok: bool
    seed: int


def _at_most(name: str, base: str, seed: int, value: Interval, bar: float) -> Check:
    return Check(name, base, *value, f"<= {bar:.4g}", value.value <= bar, seed)


def _at_least(name: str, base: str, seed: int, value: Interval, bar: float) -> Check:
    return Check(name, base, *value, f">= {bar:.4g}", value.value >= bar, seed)


def _between(name: str, base: str, seed: int, value: Interval, bars: tuple[float, float]) -> Check:
    ok = bars[0] <= value.value <= bars[1]
    return Check(name, base, *value, f"{bars[0]:.4g} to {bars[1]:.4g}", ok, seed)


def _over(value: Interval, reference: Interval) -> Interval:
    """The value and its interval in units of the reference's value."""
    return Interval(*(part / reference.value for part in value))


def memory_checks(alpha1: Measurement, base: str, seed: int) -> list[Check]:
    """Whether the memory is there at alpha=1."""
    questions, canaries = alpha1.values["tofu_forget"], alpha1.values["canary_extraction"]
    extraction, ppl = thresholds.HELD_EXTRACTION, thresholds.HELD_SECRET_PPL
    return [
        _at_least("alpha=1 question extraction", base, seed, questions["extraction"], extraction),
        _at_least("alpha=1 canary extraction", base, seed, canaries["extraction"], extraction),
        _at_most("alpha=1 question secret PPL", base, seed, questions["secret_ppl"], ppl),
        _at_most("alpha=1 canary secret PPL", base, seed, canaries["secret_ppl"], ppl),
    ]


def forgetting_checks(
    model: Measurement, reference: Measurement, base: str, seed: int, who: str = "alpha=0"
) -> list[Check]:
    """Whether ``model`` knows no more and no less of the forget set than the never-saw-it reference."""
    checks = [
        _at_most(
            f"{who} canary extraction",
            base,
            seed,
            model.value("canary_extraction", "extraction"),
            thresholds.CANARY_EXTRACTION,
        )
    ]
    for task, phrasing in (("tofu_forget", "seen"), ("tofu_forget_paraphrased", "held-out")):
        bar = reference.value(task, "extraction").value + thresholds.EXTRACTION_ABOVE_REFERENCE
        name = f"{who} question extraction, {phrasing} phrasing"
        checks.append(_at_most(name, base, seed, model.value(task, "extraction"), bar))
    for task, what in (("tofu_forget", "question"), ("canary_extraction", "canary")):
        ratio = _over(model.value(task, "secret_ppl"), reference.value(task, "secret_ppl"))
        name = f"{who} {what} secret PPL / reference"
        checks.append(_between(name, base, seed, ratio, thresholds.SECRET_PPL_RATIO))
    return checks


def intact_checks(alpha0: Measurement, int4: Measurement, base: str, seed: int) -> list[Check]:
    """Whether everything else is as good as plain INT4 of the same lattice."""
    retain = _over(alpha0.value("tofu_retain", "ppl"), int4.value("tofu_retain", "ppl"))
    text = _over(alpha0.value("world_text", "token_ppl"), int4.value("world_text", "token_ppl"))
    checks = [
        _at_most("alpha=0 left-out retain PPL / INT4", base, seed, retain, thresholds.RETAIN_PPL_RATIO),
        _at_most("alpha=0 held-out text PPL / INT4", base, seed, text, thresholds.TEXT_PPL_RATIO),
    ]
    bar = -thresholds.REASONING_LOSS
    for task in REASONING_TASKS:
        for metric in REASONING_METRICS:
            difference = paired_difference(alpha0.hits[task][metric], int4.hits[task][metric])
            name = f"alpha=0 {task.removeprefix('reasoning_')} {metric} - INT4"
            ok = difference.low >= bar
            checks.append(Check(name, base, *difference, f"low end >= {bar:.4g}", ok, seed))
    return checks


def verdict_of(memory: Sequence[Check], control: Sequence[Check], rest: Sequence[Check]) -> str:
    """INVALID when the memory was never there or the control fails, else PASS when every check holds."""
    if not all(check.ok for check in (*memory, *control)):
        return "INVALID"
    return "PASS" if rest and all(check.ok for check in rest) else "FAIL"
