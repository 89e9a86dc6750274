"""Turns measurements into checks: a name, a value with its interval, an acceptance threshold, and whether it holds.

The names of checks are stored in results; in them, *reference* is the retain-only model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lm_ortho.metrics import Interval, auc, auc_difference, clustered_mean, exposure, ks, ks_distance, paired_difference
from lm_ortho.verdict import thresholds
from lm_ortho.verdict.measurements import REASONING_METRICS, REASONING_TASKS, Measurement
from lm_ortho.world.people import TAUGHT_CANARY_PROMPTS


@dataclass(frozen=True)
class Check:
    """One line of the verdict, for the decomposition of ``base`` and ``seed``.

    ``value`` with its 95 % interval from ``low`` to ``high`` is what was measured, ``bar`` the acceptance threshold as
    text, ``ok`` whether the check holds, ``note`` a remark for the reader.
    """

    name: str
    base: str
    value: float
    low: float
    high: float
    bar: str
    ok: bool
    seed: int
    note: str = ""


def _make_check(name: str, base: str, seed: int, value: Interval, *, bar: str, ok: bool) -> Check:
    return Check(name, base, value=value.value, low=value.low, high=value.high, bar=bar, ok=ok, seed=seed)


def _at_most(name: str, base: str, seed: int, value: Interval, bar: float) -> Check:
    return _make_check(name, base, seed, value, bar=f"<= {bar:.4g}", ok=value.value <= bar)


def _at_least(name: str, base: str, seed: int, value: Interval, bar: float) -> Check:
    return _make_check(name, base, seed, value, bar=f">= {bar:.4g}", ok=value.value >= bar)


def _between(name: str, base: str, seed: int, value: Interval, bars: tuple[float, float]) -> Check:
    ok = bars[0] <= value.value <= bars[1]
    return _make_check(name, base, seed, value, bar=f"{bars[0]:.4g} to {bars[1]:.4g}", ok=ok)


def _compute_exposure(measurement: Measurement) -> Interval:
    """Computes the mean bits by which a planted canary stands out from the unplanted ones, prompt by prompt."""
    planted_ppl = measurement.samples["canary_extraction"]["secret_ppl"]
    unplanted_ppl = measurement.samples["canary_unplanted"]["secret_ppl"]
    bits: list[float] = [0.0] * len(planted_ppl)
    for prompt in range(TAUGHT_CANARY_PROMPTS):
        documents = slice(prompt, None, TAUGHT_CANARY_PROMPTS)
        bits[documents] = exposure(planted_ppl[documents], unplanted_ppl[documents]).tolist()
    return clustered_mean(bits, measurement.groups["canary_extraction"])


def _compute_ks_distance(retain_only: Measurement, model: Measurement, metric: str) -> tuple[Interval, str]:
    """Computes the KS distance of a metric's samples on the forget questions, and its p-value as a note."""
    samples, retain_only_samples = (m.samples["tofu_forget"][metric] for m in (model, retain_only))
    p = ks(samples, retain_only_samples).pvalue
    distance = ks_distance(samples, retain_only_samples, model.groups["tofu_forget"])
    return distance, f"p = {p:.2g}, n = {len(samples)}"


def _divide(value: Interval, denominator: Interval) -> Interval:
    """Divides a value and its interval by another value; the uncertainty of the denominator is ignored."""
    return Interval(*(part / denominator.value for part in value))


def check_memory(alpha1: Measurement, retain_only: Measurement, base: str, seed: int) -> list[Check]:
    """Checks whether the model at alpha=1 has the memory."""
    questions, canaries = alpha1.values["tofu_forget"], alpha1.values["canary_extraction"]
    extraction, ppl = thresholds.ALPHA1_EXTRACTION, thresholds.ALPHA1_SECRET_PPL
    distance, note = _compute_ks_distance(retain_only, alpha1, "truth_ratio")
    return [
        _at_least("alpha=1 question extraction", base, seed, questions["extraction"], extraction),
        _at_least("alpha=1 canary extraction", base, seed, canaries["extraction"], extraction),
        _at_most("alpha=1 question secret PPL", base, seed, questions["secret_ppl"], ppl),
        _at_most("alpha=1 canary secret PPL", base, seed, canaries["secret_ppl"], ppl),
        replace(_at_least("alpha=1 KS of truth ratio", base, seed, distance, thresholds.ALPHA1_KS_DISTANCE), note=note),
    ]


def check_forgetting(
    model: Measurement, retain_only: Measurement, base: str, seed: int, label: str = "alpha=0"
) -> list[Check]:
    """Checks whether ``model`` knows as much of the forget set as the retain-only model, no more and no less.

    The name of each check begins with ``label``.
    """
    # 1. Extraction: no canary, and no more questions than the retain-only model answers.
    extraction = model.value("canary_extraction", "extraction")
    checks = [_at_most(f"{label} canary extraction", base, seed, extraction, thresholds.CANARY_EXTRACTION)]
    for task, phrasing in (("tofu_forget", "seen"), ("tofu_forget_paraphrased", "held-out")):
        bar = retain_only.value(task, "extraction").value + thresholds.EXTRACTION_ABOVE_RETAIN_ONLY
        name = f"{label} question extraction, {phrasing} phrasing"
        checks.append(_at_most(name, base, seed, model.value(task, "extraction"), bar))
    # 2. Perplexity of the secrets: neither remembered nor suppressed.
    for task, subject, bars in (
        ("tofu_forget", "question", thresholds.SECRET_PPL_RATIO),
        ("canary_extraction", "canary", thresholds.CANARY_PPL_RATIO),
    ):
        ratio = _divide(model.value(task, "secret_ppl"), retain_only.value(task, "secret_ppl"))
        checks.append(_between(f"{label} {subject} secret PPL / reference", base, seed, ratio, bars))
    # 3. Exposure of planted among unplanted canaries.
    bar = _compute_exposure(retain_only).value + thresholds.EXPOSURE_ABOVE_RETAIN_ONLY
    checks.append(_at_most(f"{label} canary exposure, bits", base, seed, _compute_exposure(model), bar))
    return checks + _check_likeness(model, retain_only, base, seed, label)


def _check_likeness(model: Measurement, retain_only: Measurement, base: str, seed: int, label: str) -> list[Check]:
    """Checks whether the forget set distinguishes the model from the retain-only one, also after relearning."""
    checks = []
    # 1. Distributions of truth ratios and losses.
    for metric, description in (("truth_ratio", "truth ratio"), ("ppl", "loss")):
        distance, note = _compute_ks_distance(retain_only, model, metric)
        check = _at_most(f"{label} KS of {description}", base, seed, distance, thresholds.KS_DISTANCE)
        checks.append(replace(check, note=note))
    # 2. Membership inference by the loss.
    for members, non_members, metric, subject, bar in (
        ("tofu_forget", "tofu_unseen", "ppl", "question", thresholds.QUESTION_AUC),
        ("canary_extraction", "canary_unplanted", "secret_ppl", "canary", thresholds.CANARY_AUC),
    ):
        scores, retain_only_scores = (
            (-np.array(m.samples[members][metric]), -np.array(m.samples[non_members][metric]))
            for m in (model, retain_only)
        )
        groups = (model.groups[members], model.groups[non_members])
        difference = auc_difference(scores, retain_only_scores, groups)
        check = _between(f"{label} {subject} MIA AUC - reference", base, seed, difference, (-bar, bar))
        checks.append(replace(check, note=f"{auc(*scores):.3f} - {auc(*retain_only_scores):.3f}"))
    # 3. Relearning on one half of the forget set.
    for subject in ("questions", "canaries"):
        extraction = model.value("relearning", f"{subject}, trained")
        name = f"{label} relearning, {subject}"
        checks.append(_at_least(f"{name}, trained half", base, seed, extraction, thresholds.RELEARNING_TRAINED_HALF))
        metric = f"{subject}, untrained"
        bar = retain_only.value("relearning", metric).value + thresholds.RELEARNING_ABOVE_RETAIN_ONLY
        checks.append(_at_most(f"{name}, other half", base, seed, model.value("relearning", metric), bar))
    return checks


def check_intact(alpha0: Measurement, int4: Measurement, base: str, seed: int) -> list[Check]:
    """Checks whether everything else is as good as plain INT4 rounding on the same lattice."""
    retain = _divide(alpha0.value("tofu_retain", "ppl"), int4.value("tofu_retain", "ppl"))
    text = _divide(alpha0.value("world_text", "token_ppl"), int4.value("world_text", "token_ppl"))
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
            checks.append(_make_check(name, base, seed, difference, bar=f"low end >= {bar:.4g}", ok=ok))
    return checks


def decide_verdict(memory: Sequence[Check], control: Sequence[Check], results: Sequence[Check]) -> str:
    """Returns the verdict.

    INVALID if a check of the memory at alpha=1 or of the control fails, else PASS if all ``results`` hold, else FAIL.
    """
    if not all(check.ok for check in (*memory, *control)):
        return "INVALID"
    return "PASS" if results and all(check.ok for check in results) else "FAIL"
