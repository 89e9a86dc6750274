"""Metrics against independent formulas, and against the ways in which a metric can mislead."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lm_ortho import metrics
from lm_ortho.metrics.interval import draw_weights

losses = st.floats(0, 1e6)
small_losses = st.floats(0, 30)


@st.composite
def answers(draw, loss=small_losses):
    size = draw(st.integers(1, 30))
    nll = draw(st.lists(loss, min_size=size, max_size=size))
    tokens = draw(st.lists(st.integers(1, 40), min_size=size, max_size=size))
    groups = draw(st.lists(st.sampled_from("abcdef"), min_size=size, max_size=size))
    return nll, tokens, groups


@given(answers())
@settings(max_examples=40)
def test_token_perplexity_is_exp_of_the_mean_token_loss(case):
    """HISTORY 10: cross-entropy was once reported as perplexity."""
    nll, tokens, groups = case
    per_token = [loss / n for loss, n in zip(nll, tokens, strict=True) for _ in range(n)]
    result = metrics.token_perplexity(nll, tokens, groups, resamples=50)
    assert result.value == pytest.approx(math.exp(math.fsum(per_token) / len(per_token)), rel=1e-9)
    assert result.low <= result.value <= result.high


@given(answers(loss=losses))
@settings(max_examples=25)
def test_no_finite_loss_overflows(case):
    nll, tokens, groups = case
    assert all(math.isfinite(x) for x in metrics.token_perplexity(nll, tokens, groups, resamples=20))
    assert np.isfinite(metrics.answer_probability(nll, tokens)).all()


@given(small_losses, st.lists(small_losses, min_size=1, max_size=6))
def test_truth_ratio_is_a_ratio_of_probabilities(right, wrong):
    expected = stats.gmean(np.exp(-np.asarray(wrong))) / math.exp(-right)
    assert metrics.truth_ratio(right, wrong) == pytest.approx(expected, rel=1e-9)


@given(st.floats(0, 1e300), st.lists(st.floats(0, 1e300), min_size=1, max_size=6))
def test_truth_ratio_never_overflows(right, wrong):
    ratio = metrics.truth_ratio(right, wrong)
    assert 0 <= ratio <= sys.float_info.max


@given(answers())
@settings(max_examples=20)
def test_bootstrap_equals_a_plain_loop_over_clusters(case):
    nll, tokens, groups = case
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        names, groups = list(range(len(nll))), list(range(len(nll)))
    clusters = [[i for i, g in enumerate(groups) if g == name] for name in names]
    rng = np.random.default_rng(3)
    indices = rng.integers(0, len(clusters), size=(40, len(clusters)))
    ratios = []
    for sample in indices:
        rows = [i for c in sample for i in clusters[c]]
        ratios.append(sum(nll[i] for i in rows) / sum(tokens[i] for i in rows))
    value = sum(nll) / sum(tokens)
    low, high = np.quantile(ratios, [0.025, 0.975])
    result = metrics.clustered_ratio(nll, tokens, groups, resamples=40, seed=3)
    assert result == pytest.approx((value, min(low, value), max(high, value)), rel=1e-9, abs=1e-12)


def test_chunked_resampling_has_the_right_width():
    values = np.random.default_rng(0).normal(size=20_000)
    result = metrics.clustered_mean(values)
    assert result.high - result.low == pytest.approx(2 * 1.96 / math.sqrt(len(values)), rel=0.15)


def test_clusters_widen_the_interval():
    author = np.repeat(np.random.default_rng(0).normal(size=40), 10)
    groups = np.repeat(np.arange(40), 10)
    plain, clustered = metrics.clustered_mean(author), metrics.clustered_mean(author, groups)
    assert clustered.high - clustered.low > 2 * (plain.high - plain.low)


def test_clustered_interval_covers():
    """HISTORY 15: values were once reported without an interval."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        author = np.repeat(rng.normal(size=40), 5) + rng.normal(size=200)
        result = metrics.clustered_mean(author, np.repeat(np.arange(40), 5), resamples=300)
        covered += result.low <= 0 <= result.high
    assert 0.88 <= covered / 200 <= 0.99


def test_same_seed_same_interval():
    values, groups = np.arange(20.0), list("ababcdcdefefghghijij")
    assert metrics.clustered_mean(values, groups) == metrics.clustered_mean(values, groups)
    assert metrics.clustered_mean(values, groups, seed=1) != metrics.clustered_mean(values, groups)


@given(st.integers(1, 300), st.data())
def test_wilson_bounds_solve_the_score_equation(size, data):
    hits = data.draw(st.integers(0, size))
    share, low, high = metrics.wilson(hits, size)
    z = stats.norm.ppf(0.975)
    for bound in (low, high):
        if 0 < bound < 1 and bound != share:
            assert abs(share - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / size), rel=1e-6)
    assert 0 <= low <= share <= high <= 1
    assert low < high


@pytest.mark.parametrize("hits", [[0] * 12, [1] * 12])
def test_rate_at_the_ends_counts_clusters(hits):
    groups = [i // 4 for i in range(12)]
    assert metrics.rate(hits, groups) == metrics.wilson(3 * hits[0], 3)
    assert metrics.rate(hits) == metrics.wilson(12 * hits[0], 12)


def test_rate_of_one_cluster_counts_answers():
    assert metrics.rate([1, 0, 0, 1], ["a"] * 4) == metrics.wilson(2, 4)


def test_rate_with_the_same_share_in_every_cluster_has_a_width():
    result = metrics.rate([1, 0] * 4, list("aabbccdd"))
    assert result == metrics.wilson(2, 4)


def test_a_single_group_resamples_its_values():
    """With an interval of zero width, any difference would count as significant."""
    single_group, own_groups = draw_weights(["a"] * 30, 500, 0), draw_weights(list(range(30)), 500, 0)
    assert (single_group == own_groups).all()
    assert single_group.std() > 0.5
    assert (draw_weights("ab" * 15, 500, 0)[:, 0] == draw_weights("ab" * 15, 500, 0)[:, 2]).all()


def test_rate_between_0_and_1_is_the_clustered_bootstrap():
    hits, groups = [1, 1, 0, 0, 1, 0], list("aabbcc")
    assert metrics.rate(hits, groups) == metrics.clustered_mean(hits, groups)


def test_answer_probability():
    assert metrics.answer_probability([2.0, 0.0], [4, 3]) == pytest.approx([math.exp(-0.5), 1.0])


def test_geometric_mean_matches_scipy():
    logs = np.random.default_rng(0).normal(size=50)
    assert metrics.geometric_mean(logs).value == pytest.approx(stats.gmean(np.exp(logs)))


@given(st.lists(small_losses, min_size=2, max_size=30), st.lists(small_losses, min_size=2, max_size=30))
@settings(max_examples=30)
def test_ks_statistic_is_the_largest_gap(first, second):
    grid = np.array([*first, *second])
    gap = max(abs(np.mean(np.array(first) <= x) - np.mean(np.array(second) <= x)) for x in grid)
    result = metrics.ks(first, second)
    assert result.statistic == pytest.approx(gap, abs=1e-12)
    assert 0 <= result.pvalue <= 1


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.lists(st.integers(0, 5), min_size=1, max_size=20))
@settings(max_examples=30)
def test_auc_is_the_probability_of_a_correct_ranking(members, non_members):
    wins = [(m > o) + 0.5 * (m == o) for m in members for o in non_members]
    assert metrics.auc(members, non_members) == pytest.approx(np.mean(wins))


equal_length_pairs = st.integers(1, 12).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 5), min_size=n, max_size=n)] * 2)
)


@given(equal_length_pairs)
def test_the_distance_of_two_models_equals_the_statistic_of_scipy(case):
    first, second = case
    groups = [i // 2 for i in range(len(first))]
    result = metrics.ks_distance(first, second, groups, resamples=20)
    assert result.value == pytest.approx(stats.ks_2samp(first, second).statistic)
    assert result.low <= result.value <= result.high


def test_the_distance_of_two_models_is_resampled_over_groups():
    """Against a plain loop that draws the documents of the same groups."""
    rng = np.random.default_rng(3)
    first, second = rng.normal(0, 1, 60), rng.normal(0.7, 1, 60)
    groups = [i // 5 for i in range(60)]
    result = metrics.ks_distance(first, second, groups, resamples=4000)
    resampled = []
    for _ in range(4000):
        at = np.concatenate([np.arange(5 * g, 5 * g + 5) for g in rng.integers(0, 12, 12)])
        resampled.append(stats.ks_2samp(first[at], second[at], method="asymp").statistic)
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), abs=0.03)
    assert metrics.ks_distance(first, first, groups) == (0, 0, 0)


@given(equal_length_pairs, equal_length_pairs)
def test_a_difference_of_two_aucs(model, reference):
    members, non_members = model[0], reference[0]
    pairs = (members, non_members), (model[1], reference[1])
    groups = [i // 2 for i in range(len(members))], list(range(len(non_members)))
    result = metrics.auc_difference(*pairs, groups, resamples=20)
    assert result.value == pytest.approx(metrics.auc(*pairs[0]) - metrics.auc(*pairs[1]))
    assert result.low <= result.value <= result.high
    assert metrics.auc_difference(pairs[0], pairs[0], groups, resamples=20) == (0, 0, 0)


def test_a_difference_of_two_aucs_is_resampled_over_both_kinds_of_groups():
    rng = np.random.default_rng(4)
    scores = [(rng.normal(shift, 1, 60), rng.normal(0, 1, 40)) for shift in (1.0, 0.2)]
    groups = [i // 5 for i in range(60)], [i // 4 for i in range(40)]
    result = metrics.auc_difference(scores[0], scores[1], groups, resamples=4000)
    resampled = []
    for _ in range(2000):
        members = np.concatenate([np.arange(5 * g, 5 * g + 5) for g in rng.integers(0, 12, 12)])
        non_members = np.concatenate([np.arange(4 * g, 4 * g + 4) for g in rng.integers(0, 10, 10)])
        one, two = (metrics.auc(m[members], o[non_members]) for m, o in scores)
        resampled.append(one - two)
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), abs=0.03)


def test_exposure_by_rank():
    pool = np.arange(1.0, 8.0)
    assert metrics.exposure([0.5, 3.5, 9.0], pool) == pytest.approx([3.0, 1.0, 0.0])
    assert metrics.exposure([1.0], pool) == pytest.approx([3 - math.log2(1.5)])


def test_exposure_of_an_unknown_canary_is_about_one_and_a_half_bits():
    rng = np.random.default_rng(0)
    assert metrics.exposure(rng.random(4000), rng.random(999)).mean() == pytest.approx(1 / math.log(2), abs=0.1)


def test_paired_difference_is_one_sided_and_tighter_than_unpaired():
    rng = np.random.default_rng(0)
    first = (rng.random(1000) < 0.8).astype(float)
    second = first.copy()
    second[:20] = 1 - second[:20]
    result = metrics.paired_difference(first, second)
    z = stats.norm.ppf(0.95) * (first - second).std() / math.sqrt(1000)
    assert result.value == pytest.approx(first.mean() - second.mean())
    assert result.low == pytest.approx(result.value - z, abs=0.002)
    assert result.high == pytest.approx(result.value + z, abs=0.002)


def test_paired_difference_of_equal_models_has_a_width():
    result = metrics.paired_difference([1, 0, 1] * 20, [1, 0, 1] * 20)
    assert result.value == 0
    assert (1 - result.high) ** 60 == pytest.approx(0.05)
    assert result.low == -result.high


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "call",
    [
        lambda bad: metrics.token_perplexity([1.0, bad], [1, 1]),
        lambda bad: metrics.answer_probability([bad], [1]),
        lambda bad: metrics.log_truth_ratio(bad, [1.0]),
        lambda bad: metrics.log_truth_ratio(1.0, [bad]),
        lambda bad: metrics.clustered_mean([bad]),
        lambda bad: metrics.rate([bad]),
        lambda bad: metrics.ks([bad], [1.0]),
        lambda bad: metrics.auc([1.0], [bad]),
        lambda bad: metrics.exposure([bad], [1.0]),
        lambda bad: metrics.paired_difference([bad], [1.0]),
        lambda bad: metrics.geometric_mean([bad]),
    ],
)
def test_nan_and_infinity_are_errors(call, bad):
    with pytest.raises(ValueError, match="not finite"):
        call(bad)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.token_perplexity([], []),
        lambda: metrics.token_perplexity([1.0], [0]),
        lambda: metrics.token_perplexity([1.0], [1, 2]),
        lambda: metrics.clustered_mean([1.0, 2.0], ["a"]),
        lambda: metrics.rate([0.5]),
        lambda: metrics.wilson(3, 2),
        lambda: metrics.paired_difference([1.0], [1.0, 2.0]),
    ],
)
def test_inconsistent_arguments_are_errors(call):
    with pytest.raises(ValueError):  # noqa: PT011 - every call has another message
        call()
