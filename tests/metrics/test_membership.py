"""Membership scores and verbatim memorisation, against scikit-learn and against counting."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from lm_ortho.metrics import membership, memorisation
from lm_ortho.metrics.interval import draw_weights

logps = st.lists(st.floats(-30, 0), min_size=1, max_size=60)
scores = st.lists(st.integers(-5, 5), min_size=1, max_size=60)
flags = st.lists(st.booleans(), min_size=1, max_size=40)
fast = settings(max_examples=60)


@given(logps)
@fast
def test_loss_zlib_and_reference_scores(logp):
    assert membership.loss_score(logp) == pytest.approx(math.fsum(logp) / len(logp))
    text = "abc" * len(logp)
    assert membership.zlib_score(logp, text) == pytest.approx(math.fsum(logp) / len(zlib.compress(text.encode())))
    assert membership.reference_score(logp, logp) == 0.0
    assert membership.reference_score(logp, [x - 1 for x in logp]) == pytest.approx(1.0)


@given(logps, st.floats(0.01, 1))
@fast
def test_min_k_is_the_mean_of_the_lowest(logp, share):
    count = max(1, math.floor(share * len(logp) + 1e-9))
    assert membership.min_k_score(logp, share) == pytest.approx(sum(sorted(logp)[:count]) / count)
    assert membership.min_k_score(logp, 1.0) == pytest.approx(membership.loss_score(logp))
    assert membership.min_k_score(logp, share) <= membership.loss_score(logp) + 1e-9


@given(logps, st.floats(0.01, 1), st.floats(-5, 5), st.floats(0.1, 5))
@fast
def test_min_k_plus_plus_is_min_k_of_standardised_values(logp, share, mean, deviation):
    n = len(logp)
    result = membership.min_k_plus_plus_score(logp, [mean] * n, [deviation] * n, share)
    assert result == pytest.approx((membership.min_k_score(logp, share) - mean) / deviation, abs=1e-6)
    assert membership.min_k_plus_plus_score(logp, [mean] * n, [0.0] * n, share) == 0.0


def test_min_k_plus_plus_of_a_distribution_equals_its_definition():
    generator = np.random.default_rng(0)
    probs = generator.dirichlet(np.ones(50), size=8)
    tokens = generator.integers(0, 50, size=8)
    logs = np.log(probs)
    mean = (probs * logs).sum(1)
    deviation = np.sqrt((probs * logs**2).sum(1) - mean**2)
    standard = (logs[np.arange(8), tokens] - mean) / deviation
    result = membership.min_k_plus_plus_score(logs[np.arange(8), tokens], mean, deviation, 0.25)
    assert result == pytest.approx(np.sort(standard)[:2].mean())


@given(scores, scores, st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
@fast
def test_true_positive_rate_equals_that_of_the_roc_curve(members, non_members, fpr):
    labels = [1] * len(members) + [0] * len(non_members)
    false, true, _ = roc_curve(labels, [*members, *non_members], drop_intermediate=False)
    assert membership.tpr_at_fpr(members, non_members, fpr) == pytest.approx(true[false <= fpr + 1e-12].max())


@given(scores, scores)
@settings(max_examples=30)
def test_the_interval_contains_the_auc(members, non_members):
    groups = [i // 2 for i in range(len(members))], [i // 3 for i in range(len(non_members))]
    result = membership.auc_interval(members, non_members, groups, resamples=50)
    labels = [1] * len(members) + [0] * len(non_members)
    assert result.value == pytest.approx(roc_auc_score(labels, [*members, *non_members]))
    assert 0 <= result.low <= result.value <= result.high <= 1


def test_the_interval_covers_the_true_auc():
    generator = np.random.default_rng(1)
    n_covered = 0
    for trial in range(60):
        members, non_members = generator.normal(0.5, 1, 80), generator.normal(0, 1, 80)
        result = membership.auc_interval(members, non_members, (range(80), range(80)), resamples=300, seed=trial)
        n_covered += result.low <= 0.6381632 <= result.high  # Phi(0.5 / sqrt(2))
    assert 52 <= n_covered <= 60


def test_priv_leak():
    assert membership.priv_leak(0.5, 0.5) == 0.0
    assert membership.priv_leak(0.75, 0.5) == pytest.approx(-50.0)  # as ((1 - .75) - (1 - .5)) / (1 - .5)
    assert membership.priv_leak(0.25, 0.5) == pytest.approx(50.0)
    assert membership.priv_leak(1.0, 0.6) == pytest.approx(-100.0)  # memorised with certainty


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: membership.loss_score([]), "logp"),
        (lambda: membership.zlib_score([-1.0], ""), "text"),
        (lambda: membership.min_k_score([-1.0], 0), "share=0"),
        (lambda: membership.min_k_plus_plus_score([-1.0], [0.0, 1.0], [1.0]), "1 tokens with 2 means"),
        (lambda: membership.min_k_plus_plus_score([-1.0], [0.0], [-1.0]), "deviation"),
        (lambda: membership.tpr_at_fpr([1.0], [0.0], 2), "fpr=2"),
        (lambda: membership.priv_leak(0.5, 1.0), "AUC of 0.5 and 1.0"),
        (lambda: memorisation.exact_memorisation([]), "one bool per token"),
        (lambda: memorisation.extraction_strength([1, 0]), "one bool per token"),
        (lambda: memorisation.is_near_verbatim([1], []), "empty continuation"),
        (lambda: memorisation.is_near_verbatim([1], [1], 1.0), "tolerance=1.0"),
    ],
)
def test_invalid_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(flags)
@fast
def test_extraction_strength_equals_its_definition(correct):
    n = len(correct)
    shortest = next(k for k in range(n + 1) if all(correct[k:]))
    assert memorisation.extraction_strength(correct) == pytest.approx(1 - shortest / n)
    assert memorisation.exact_memorisation(correct) == pytest.approx(sum(correct) / n)
    assert memorisation.extraction_strength(correct) <= memorisation.exact_memorisation(correct) + 1e-12


words = st.lists(st.sampled_from("abc"), max_size=8)


def recursive_distance(one, other):
    if not one or not other:
        return len(one) + len(other)
    same = recursive_distance(one[1:], other[1:]) + (one[0] != other[0])
    return min(same, recursive_distance(one[1:], other) + 1, recursive_distance(one, other[1:]) + 1)


@given(st.lists(st.sampled_from("abc"), max_size=5), st.lists(st.sampled_from("abc"), max_size=5))
@fast
def test_edit_distance_equals_its_recursion(one, other):
    assert memorisation.edit_distance(one, other) == recursive_distance(one, other)


@given(words, words, words)
@fast
def test_edit_distance_is_a_metric(a, b, c):
    assert memorisation.edit_distance(a, b) == memorisation.edit_distance(b, a)
    assert (memorisation.edit_distance(a, b) == 0) == (a == b)
    assert memorisation.edit_distance(a, c) <= memorisation.edit_distance(a, b) + memorisation.edit_distance(b, c)


def test_near_verbatim():
    true = list("a continuation of thirty words")
    assert memorisation.is_near_verbatim(true, true, 0.0)
    assert memorisation.is_near_verbatim(true[:-2], true, 0.1)
    assert not memorisation.is_near_verbatim(true[:-2], true, 0.05)


def test_the_interval_of_the_true_positive_rate_contains_the_value_and_shrinks():
    rng = np.random.default_rng(0)
    widths = []
    for size in (50, 800):
        members, non_members = rng.normal(2, 1, size), rng.normal(0, 1, size)
        groups = (range(size), range(size))
        interval = membership.tpr_interval(members, non_members, groups, fpr=0.1)
        assert interval.value == membership.tpr_at_fpr(members, non_members, 0.1)
        assert 0 <= interval.low <= interval.value <= interval.high <= 1
        widths.append(interval.high - interval.low)
    assert widths[1] < widths[0]


def test_a_resample_of_the_true_positive_rate_is_the_rate_of_the_resample():
    members, non_members = np.array([0.1, 0.5, 0.9, 1.3]), np.array([0.0, 0.4, 0.8, 0.2, 0.7])
    groups = ([0, 0, 1, 1], [0, 1, 2, 3, 4])
    weights = [draw_weights(part, 200, i) for i, part in enumerate(groups)]
    again = [
        membership.tpr_at_fpr(np.repeat(members, one.astype(int)), np.repeat(non_members, two.astype(int)), 0.2)
        for one, two in zip(*weights, strict=True)
    ]
    interval = membership.tpr_interval(members, non_members, groups, fpr=0.2, resamples=200)
    low, high = np.quantile(again, [0.025, 0.975])
    assert (interval.low, interval.high) == (min(low, interval.value), max(high, interval.value))


def test_the_interval_of_privleak_with_samples_and_with_a_published_auc():
    rng = np.random.default_rng(3)
    model = rng.normal(0.5, 1, 80), rng.normal(0, 1, 80)
    other = rng.normal(0.1, 1, 80), rng.normal(0, 1, 80)
    groups = (np.arange(80) // 4, np.arange(80) // 4)
    aucs = [roc_auc_score([1] * 80 + [0] * 80, np.r_[pair]) for pair in (model, other)]
    both = membership.priv_leak_interval(model, other, groups)
    assert both.value == pytest.approx(membership.priv_leak(*aucs))
    alone = membership.priv_leak_interval(model, float(aucs[1]), groups)
    assert alone.value == pytest.approx(both.value)
    for interval in (both, alone):
        assert interval.low < interval.value < interval.high
    equal = membership.priv_leak_interval(other, other, groups)
    assert tuple(equal) == (0.0, 0.0, 0.0)


@fast
@given(st.lists(st.floats(-40, 0), min_size=1, max_size=5), st.integers(1, 500))
def test_the_probability_that_one_of_many_samples_is_the_text(logs, samples):
    interval = memorisation.extraction_probability(logs, samples)
    for value, log in zip(interval, logs, strict=True):
        expected = 1 - (1 - math.exp(log)) ** samples
        assert value == pytest.approx(expected, abs=1e-9)
    assert (memorisation.extraction_probability(logs, samples + 1) >= interval).all()


def test_log_probabilities_above_zero_are_refused():
    for logs, samples, message in (([0.5], 1, "one logarithm"), ([], 1, "one logarithm"), ([-1.0], 0, "samples=0")):
        with pytest.raises(ValueError, match=message):
            memorisation.extraction_probability(logs, samples)
