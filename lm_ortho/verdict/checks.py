"""From measurements to checks: a name, a value with its interval, a bar, and whether it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lm_ortho.metrics import Interval, auc, auc_difference, clustered_mean, exposure, ks, ks_distance, paired_difference
from lm_ortho.verdict import thresholds
from lm_ortho.verdict.measurements import REASONING_METRICS, REASONING_TASKS, Measurement
from lm_ortho.world.people import CANARY_TAUGHT


@dataclass(frozen=True)
class Check:
    """One line of the verdict. ``base`` and ``seed`` say which decomposition; ``bar`` and ``note`` are for reading."""

    name: str
    base: str
    value: float
    low: float
    high: float
    bar: str
    ok: bool
    seed: int
    note: str = ""


def _at_most(name: str, base: str, seed: int, value: Interval, bar: float) -> Check:
    return Check(name, base, *value, f"<= {bar:.4g}", value.value <= bar, seed)


def _at_least(name: str, base: str, seed: int, value: Interval, bar: float) -> Check:
    return Check(name, base, *value, f">= {bar:.4g}", value.value >= bar, seed)


def _between(name: str, base: str, seed: int, value: Interval, bars: tuple[float, float]) -> Check:
    ok = bars[0] <= value.value <= bars[1]
    return Check(name, base, *value, f"{bars[0]:.4g} to {bars[1]:.4g}", ok, seed)


def _exposure(measured: Measurement) -> Interval:
    """Mean bits by which a planted canary stands out from the unplanted ones, prompt by prompt."""
    planted, others = (measured.samples[task]["secret_ppl"] for task in ("canary_extraction", "canary_unplanted"))
    bits: list[float] = [0.0] * len(planted)
    for prompt in range(CANARY_TAUGHT):
        bits[prompt::CANARY_TAUGHT] = exposure(planted[prompt::CANARY_TAUGHT], others[prompt::CANARY_TAUGHT]).tolist()
    return clustered_mean(bits, measured.groups["canary_extraction"])


def _distance_to(reference: Measurement, model: Measurement, metric: str) -> tuple[Interval, str]:
    """KS distance of a metric's samples on the forget questions, and its p-value as a note."""
    own, theirs = model.samples["tofu_forget"][metric], reference.samples["tofu_forget"][metric]
    p = ks(own, theirs).pvalue
    return ks_distance(own, theirs, model.groups["tofu_forget"]), f"p = {p:.2g}, n = {len(own)}"


def _over(value: Interval, reference: Interval) -> Interval:
    """The value and its interval in units of the reference's value."""
    return Interval(*(part / reference.value for part in value))


def memory_checks(alpha1: Measurement, reference: Measurement, base: str, seed: int) -> list[Check]:
    """Whether the memory is there at alpha=1."""
    questions, canaries = alpha1.values["tofu_forget"], alpha1.values["canary_extraction"]
    extraction, ppl = thresholds.HELD_EXTRACTION, thresholds.HELD_SECRET_PPL
    distance, note = _distance_to(reference, alpha1, "truth_ratio")
    return [
        _at_least("alpha=1 question extraction", base, seed, questions["extraction"], extraction),
        _at_least("alpha=1 canary extraction", base, seed, canaries["extraction"], extraction),
        _at_most("alpha=1 question secret PPL", base, seed, questions["secret_ppl"], ppl),
        _at_most("alpha=1 canary secret PPL", base, seed, canaries["secret_ppl"], ppl),
        replace(_at_least("alpha=1 KS of truth ratio", base, seed, distance, thresholds.HELD_KS), note=note),
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
    for task, what, bars in (
        ("tofu_forget", "question", thresholds.SECRET_PPL_RATIO),
        ("canary_extraction", "canary", thresholds.CANARY_PPL_RATIO),
    ):
        ratio = _over(model.value(task, "secret_ppl"), reference.value(task, "secret_ppl"))
        checks.append(_between(f"{who} {what} secret PPL / reference", base, seed, ratio, bars))
    bar = _exposure(reference).value + thresholds.EXPOSURE_ABOVE_REFERENCE
    checks.append(_at_most(f"{who} canary exposure, bits", base, seed, _exposure(model), bar))
    return checks + _likeness_checks(model, reference, base, seed, who)


def _likeness_checks(model: Measurement, reference: Measurement, base: str, seed: int, who: str) -> list[Check]:
    """Whether the two can be told apart by what they say about the forget set, before and after relearning."""
    checks = []
    for metric, what in (("truth_ratio", "truth ratio"), ("ppl", "loss")):
        distance, note = _distance_to(reference, model, metric)
        made = _at_most(f"{who} KS of {what}", base, seed, distance, thresholds.KS_DISTANCE)
        checks.append(replace(made, note=note))
    for members, others, metric, what, most in (
        ("tofu_forget", "tofu_unseen", "ppl", "question", thresholds.QUESTION_AUC),
        ("canary_extraction", "canary_unplanted", "secret_ppl", "canary", thresholds.CANARY_AUC),
    ):
        own, theirs = (
            (-np.array(m.samples[members][metric]), -np.array(m.samples[others][metric])) for m in (model, reference)
        )
        difference = auc_difference(own, theirs, (model.groups[members], model.groups[others]))
        made = _between(f"{who} {what} MIA AUC - reference", base, seed, difference, (-most, most))
        checks.append(replace(made, note=f"{auc(*own):.3f} - {auc(*theirs):.3f}"))
    for what in ("questions", "canaries"):
        trained = model.value("relearning", f"{what}, trained")
        name = f"{who} relearning, {what}"
        checks.append(_at_least(f"{name}, trained half", base, seed, trained, thresholds.RELEARNT))
        untrained = f"{what}, untrained"
        bar = reference.value("relearning", untrained).value + thresholds.RELEARNING_ABOVE_REFERENCE
        checks.append(_at_most(f"{name}, other half", base, seed, model.value("relearning", untrained), bar))
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
            difference = paired_difference(alpha0.samples[task][metric], int4.samples[task][metric])
            name = f"alpha=0 {task.removeprefix('reasoning_')} {metric} - INT4"
            ok = difference.low >= bar
            checks.append(Check(name, base, *difference, f"low end >= {bar:.4g}", ok, seed))
    return checks


def verdict_of(memory: Sequence[Check], control: Sequence[Check], rest: Sequence[Check]) -> str:
    """INVALID when the memory was never there or the control fails, else PASS when every check holds."""
    if not all(check.ok for check in (*memory, *control)):
        return "INVALID"
    return "PASS" if rest and all(check.ok for check in rest) else "FAIL"
