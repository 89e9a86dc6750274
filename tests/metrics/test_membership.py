"""Membership scores and verbatim memory, against scikit-learn and against counting."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from lm_ortho.metrics import membership as mia
from lm_ortho.metrics import memorisation as memory
from lm_ortho.metrics.interval import drawn_weights

logps = st.lists(st.floats(-30, 0), min_size=1, max_size=60)
scores = st.lists(st.integers(-5, 5), min_size=1, max_size=60)
flags = st.lists(st.booleans(), min_size=1, max_size=40)
fast = settings(max_examples=60)


@given(logps)
@fast
def test_simple_scores(logp):
    assert mia.loss_score(logp) == pytest.approx(math.fsum(logp) / len(logp))
    text = "abc" * len(logp)
    assert mia.zlib_score(logp, text) == pytest.approx(math.fsum(logp) / len(zlib.compress(text.encode())))
    assert mia.reference_score(logp, logp) == 0.0
    assert mia.reference_score(logp, [x - 1 for x in logp]) == pytest.approx(1.0)


@given(logps, st.floats(0.01, 1))
@fast
def test_min_k_is_the_mean_of_the_lowest(logp, share):
    count = max(1, math.floor(share * len(logp) + 1e-9))
    assert mia.min_k_score(logp, share) == pytest.approx(sum(sorted(logp)[:count]) / count)
    assert mia.min_k_score(logp, 1.0) == pytest.approx(mia.loss_score(logp))
    assert mia.min_k_score(logp, share) <= mia.loss_score(logp) + 1e-9


@given(logps, st.floats(0.01, 1), st.floats(-5, 5), st.floats(0.1, 5))
@fast
def test_min_k_plus_plus_is_min_k_of_standardised_values(logp, share, mean, deviation):
    n = len(logp)
    found = mia.min_k_plus_plus_score(logp, [mean] * n, [deviation] * n, share)
    assert found == pytest.approx((mia.min_k_score(logp, share) - mean) / deviation, abs=1e-6)
    assert mia.min_k_plus_plus_score(logp, [mean] * n, [0.0] * n, share) == 0.0


def test_min_k_plus_plus_of_a_distribution_is_that_of_its_definition():
    generator = np.random.default_rng(0)
    probs = generator.dirichlet(np.ones(50), size=8)
    tokens = generator.integers(0, 50, size=8)
    logs = np.log(probs)
    mean = (probs * logs).sum(1)
    deviation = np.sqrt((probs * logs**2).sum(1) - mean**2)
    standard = (logs[np.arange(8), tokens] - mean) / deviation
    found = mia.min_k_plus_plus_score(logs[np.arange(8), tokens], mean, deviation, 0.25)
    assert found == pytest.approx(np.sort(standard)[:2].mean())


@given(scores, scores, st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
@fast
def test_the_rate_of_true_positives_is_that_of_the_curve(members, others, fpr):
    labels = [1] * len(members) + [0] * len(others)
    false, true, _ = roc_curve(labels, [*members, *others], drop_intermediate=False)
    assert mia.tpr_at_fpr(members, others, fpr) == pytest.approx(true[false <= fpr + 1e-12].max())


@given(scores, scores)
@settings(max_examples=30)
def test_the_interval_holds_the_auc(members, others):
    groups = [i // 2 for i in range(len(members))], [i // 3 for i in range(len(others))]
    found = mia.auc_interval(members, others, groups, resamples=50)
    labels = [1] * len(members) + [0] * len(others)
    assert found.value == pytest.approx(roc_auc_score(labels, [*members, *others]))
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_the_interval_is_about_as_wide_as_it_should_be():
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(60):
        members, others = generator.normal(0.5, 1, 80), generator.normal(0, 1, 80)
        found = mia.auc_interval(members, others, (range(80), range(80)), resamples=300, seed=trial)
        covered += found.low <= 0.6381632 <= found.high  # Phi(0.5 / sqrt(2))
    assert 52 <= covered <= 60


def test_priv_leak():
    assert mia.priv_leak(0.5, 0.5) == 0.0
    assert mia.priv_leak(0.75, 0.5) == pytest.approx(-50.0)  # as ((1 - .75) - (1 - .5)) / (1 - .5)
    assert mia.priv_leak(0.25, 0.5) == pytest.approx(50.0)
    assert mia.priv_leak(1.0, 0.6) == pytest.approx(-100.0)  # remembered without a doubt


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mia.loss_score([]), "logp"),
        (lambda: mia.zlib_score([-1.0], ""), "text"),
        (lambda: mia.min_k_score([-1.0], 0), "share=0"),
        (lambda: mia.min_k_plus_plus_score([-1.0], [0.0, 1.0], [1.0]), "1 tokens with 2 means"),
        (lambda: mia.min_k_plus_plus_score([-1.0], [0.0], [-1.0]), "deviation"),
        (lambda: mia.tpr_at_fpr([1.0], [0.0], 2), "fpr=2"),
        (lambda: mia.priv_leak(0.5, 1.0), "AUC of 0.5 and 1.0"),
        (lambda: memory.exact_memorisation([]), "one bool per token"),
        (lambda: memory.extraction_strength([1, 0]), "one bool per token"),
        (lambda: memory.near_verbatim([1], []), "empty continuation"),
        (lambda: memory.near_verbatim([1], [1], 1.0), "tolerance=1.0"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(flags)
@fast
def test_extraction_strength_is_the_definition(correct):
    n = len(correct)
    shortest = next(k for k in range(n + 1) if all(correct[k:]))
    assert memory.extraction_strength(correct) == pytest.approx(1 - shortest / n)
    assert memory.exact_memorisation(correct) == pytest.approx(sum(correct) / n)
    assert memory.extraction_strength(correct) <= memory.exact_memorisation(correct) + 1e-12


words = st.lists(st.sampled_from("abc"), max_size=8)


def slow_distance(one, other):
    if not one or not other:
        return len(one) + len(other)
    same = slow_distance(one[1:], other[1:]) + (one[0] != other[0])
    return min(same, slow_distance(one[1:], other) + 1, slow_distance(one, other[1:]) + 1)


@given(st.lists(st.sampled_from("abc"), max_size=5), st.lists(st.sampled_from("abc"), max_size=5))
@fast
def test_edit_distance_is_its_recursion(one, other):
    assert memory.edit_distance(one, other) == slow_distance(one, other)


@given(words, words, words)
@fast
def test_edit_distance_is_a_metric(a, b, c):
    assert memory.edit_distance(a, b) == memory.edit_distance(b, a)
    assert (memory.edit_distance(a, b) == 0) == (a == b)
    assert memory.edit_distance(a, c) <= memory.edit_distance(a, b) + memory.edit_distance(b, c)


def test_near_verbatim():
    true = list("a continuation of thirty words")
    assert memory.near_verbatim(true, true, 0.0)
    assert memory.near_verbatim(true[:-2], true, 0.1)
    assert not memory.near_verbatim(true[:-2], true, 0.05)


def test_the_interval_of_the_true_positive_rate_holds_the_value_and_shrinks():
    rng = np.random.default_rng(0)
    widths = []
    for size in (50, 800):
        members, others = rng.normal(2, 1, size), rng.normal(0, 1, size)
        groups = (range(size), range(size))
        interval = mia.tpr_interval(members, others, groups, fpr=0.1)
        assert interval.value == mia.tpr_at_fpr(members, others, 0.1)
        assert 0 <= interval.low <= interval.value <= interval.high <= 1
        widths.append(interval.high - interval.low)
    assert widths[1] < widths[0]


def test_a_resample_of_the_true_positive_rate_is_the_rate_of_the_resample():
    members, others = np.array([0.1, 0.5, 0.9, 1.3]), np.array([0.0, 0.4, 0.8, 0.2, 0.7])
    groups = ([0, 0, 1, 1], [0, 1, 2, 3, 4])
    drawn = [drawn_weights(part, 200, i) for i, part in enumerate(groups)]
    again = [
        mia.tpr_at_fpr(np.repeat(members, one.astype(int)), np.repeat(others, two.astype(int)), 0.2)
        for one, two in zip(*drawn, strict=True)
    ]
    got = mia.tpr_interval(members, others, groups, fpr=0.2, resamples=200)
    low, high = np.quantile(again, [0.025, 0.975])
    assert (got.low, got.high) == (min(low, got.value), max(high, got.value))


def test_the_interval_of_privleak_with_samples_and_with_a_published_auc():
    rng = np.random.default_rng(3)
    model = rng.normal(0.5, 1, 80), rng.normal(0, 1, 80)
    other = rng.normal(0.1, 1, 80), rng.normal(0, 1, 80)
    groups = (np.arange(80) // 4, np.arange(80) // 4)
    aucs = [roc_auc_score([1] * 80 + [0] * 80, np.r_[pair]) for pair in (model, other)]
    both = mia.priv_leak_interval(model, other, groups)
    assert both.value == pytest.approx(mia.priv_leak(*aucs))
    alone = mia.priv_leak_interval(model, float(aucs[1]), groups)
    assert alone.value == pytest.approx(both.value)
    for interval in (both, alone):
        assert interval.low < interval.value < interval.high
    equal = mia.priv_leak_interval(other, other, groups)
    assert tuple(equal) == (0.0, 0.0, 0.0)


@fast
@given(st.lists(st.floats(-40, 0), min_size=1, max_size=5), st.integers(1, 500))
def test_the_chance_of_one_sample_among_many(logs, samples):
    got = memory.discoverable(logs, samples)
    for value, log in zip(got, logs, strict=True):
        expected = 1 - (1 - math.exp(log)) ** samples
        assert value == pytest.approx(expected, abs=1e-9)
    assert (memory.discoverable(logs, samples + 1) >= got).all()


def test_a_likelihood_is_a_probability():
    for logs, samples, message in (([0.5], 1, "one logarithm"), ([], 1, "one logarithm"), ([-1.0], 0, "samples=0")):
        with pytest.raises(ValueError, match=message):
            memory.discoverable(logs, samples)
