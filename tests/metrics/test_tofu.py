"""TOFU's aggregate metrics against independent formulas and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lm_ortho.metrics import tofu

losses = st.floats(0, 30)


@st.composite
def questions(draw):
    size, wrong = draw(st.integers(1, 20)), draw(st.integers(1, 5))
    row = st.lists(losses, min_size=wrong, max_size=wrong)
    return (
        draw(st.lists(row, min_size=size, max_size=size)),
        draw(st.lists(losses, min_size=size, max_size=size)),
    )


@given(questions())
@settings(max_examples=60)
def test_the_truth_ratio_is_a_ratio_of_probabilities(case):
    perturbed, paraphrased = case
    result = tofu.truth_ratio(perturbed, paraphrased)
    for r, wrong, right in zip(result, perturbed, paraphrased, strict=True):
        probability = math.prod(math.exp(-loss) for loss in wrong) ** (1 / len(wrong))
        if probability > 1e-250:
            assert r == pytest.approx(probability / math.exp(-right), rel=1e-6)
    assert result == pytest.approx(stats.gmean(np.exp(-np.array(perturbed)), axis=1) / np.exp(-np.array(paraphrased)))


def test_one_wrong_answer_may_be_a_plain_list():
    assert tofu.truth_ratio([1.0, 2.0], [1.0, 1.0]) == pytest.approx([1.0, math.exp(-1)])
    assert np.array_equal(tofu.truth_ratio([1.0, 2.0], [1.0, 1.0]), tofu.truth_ratio([[1.0], [2.0]], [1.0, 1.0]))


ratios = st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=60)


@given(ratios, ratios)
@settings(max_examples=60)
def test_forget_quality_is_the_p_value_of_the_test(one, other):
    result = tofu.forget_quality(one, other)
    assert isinstance(result, float)
    assert result == pytest.approx(stats.ks_2samp(one, other).pvalue)
    assert result == pytest.approx(tofu.forget_quality(other, one))
    assert tofu.forget_quality(one, one) == 1.0
    # the test looks at order only
    assert result == pytest.approx(tofu.forget_quality(np.log(one), np.log(other)))


def test_forget_quality_separates_different_distributions():
    near, far = np.linspace(0.5, 1.0, 300), np.linspace(5.0, 9.0, 300)
    assert tofu.forget_quality(near, near * 1.0001) > 0.99
    assert tofu.forget_quality(near, far) < 1e-100


@given(ratios)
@settings(max_examples=60)
def test_truth_ratios_of_forget_and_retain_sets(sample):
    forget_terms = [min(r, 1 / r) for r in sample]
    assert tofu.forget_truth_ratio(sample) == pytest.approx(sum(forget_terms) / len(forget_terms))
    assert 0 <= tofu.forget_truth_ratio(sample) <= 1
    retain_terms = [max(0.0, 1 - r) for r in sample]
    assert tofu.retain_truth_ratio(sample) == pytest.approx(sum(retain_terms) / len(retain_terms))


def test_ratios_at_the_ends():
    assert tofu.forget_truth_ratio([0.0, 1.0]) == 0.5
    with pytest.raises(ValueError, match="negative"):
        tofu.forget_truth_ratio([-1.0])


@given(questions())
@settings(max_examples=60)
def test_the_probability_among_choices(case):
    wrong, right = case
    result = tofu.choice_probability(right, wrong)
    for p, true, wrong_losses in zip(result, right, wrong, strict=True):
        top = math.exp(-true)
        assert p == pytest.approx(top / (top + sum(math.exp(-loss) for loss in wrong_losses)), rel=1e-9)
    assert ((result > 0) & (result < 1)).all()


means = st.fixed_dictionaries(
    {name: st.fixed_dictionaries({part: st.floats(1e-3, 1) for part in tofu.PARTS}) for name in tofu.SETS}
)


@given(means)
@settings(max_examples=60)
def test_utility_is_the_harmonic_mean_of_nine(means_per_set):
    nine = [means_per_set[name][part] for name in tofu.SETS for part in tofu.PARTS]
    result = tofu.model_utility(means_per_set)
    assert result == pytest.approx(stats.hmean(nine))
    assert min(nine) - 1e-9 <= result <= max(nine) + 1e-9
    same = {name: dict.fromkeys(tofu.PARTS, 0.25) for name in tofu.SETS}
    assert tofu.model_utility(same) == pytest.approx(0.25)


def make_means(**retain_means):
    means_per_set = {name: dict.fromkeys(tofu.PARTS, 0.5) for name in tofu.SETS}
    means_per_set["retain"].update(retain_means)
    return means_per_set


def test_one_mean_of_zero_makes_the_utility_zero():
    assert tofu.model_utility(make_means(rouge=0.0)) == 0.0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"retain": {}}, "needed are retain, real_authors, world_facts"),
        (make_means(bleu=1.0), "needed are prob, rouge, truth_ratio"),
        (make_means(prob=1.5), "between 0 and 1"),
        (make_means(prob=math.nan), "means"),
    ],
)
def test_invalid_means_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        tofu.model_utility(bad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tofu.truth_ratio([[1.0, 2.0]], [1.0, 1.0]), "for 2 paraphrased answers"),
        (lambda: tofu.truth_ratio(np.zeros((2, 0)), [1.0, 1.0]), "for 2 paraphrased answers"),
        (lambda: tofu.truth_ratio([[math.nan]], [1.0]), "perturbed_loss"),
        (lambda: tofu.truth_ratio([[1.0]], [math.inf]), "paraphrased_loss"),
        (lambda: tofu.choice_probability([1.0], [1.0]), "for 1 answers"),
        (lambda: tofu.choice_probability([1.0], [[math.inf]]), "wrong_loss"),
        (lambda: tofu.forget_quality([], [1.0]), "first"),
    ],
)
def test_invalid_losses_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_large_losses_do_not_overflow():
    assert np.isfinite(tofu.truth_ratio([[0.0]], [1e6])).all()
    assert tofu.choice_probability([1e6], [[0.0, 0.0]]) == pytest.approx([0.0])


def test_the_interval_of_model_utility_contains_the_value():
    rng = np.random.default_rng(1)
    values = {name: rng.uniform(0.2, 0.9, size=(60, 3)) for name in tofu.SETS}
    groups = {name: np.arange(60) // 20 for name in tofu.SETS}
    means = {name: dict(zip(tofu.PARTS, table.mean(0), strict=True)) for name, table in values.items()}
    result = tofu.utility_interval(values, groups)
    assert result.value == pytest.approx(tofu.model_utility(means))
    assert result.low < result.value < result.high
    same = tofu.utility_interval({name: np.full((5, 3), 0.5) for name in tofu.SETS}, {n: range(5) for n in tofu.SETS})
    assert same == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_of_model_utility_needs_three_columns():
    groups = {name: range(4) for name in tofu.SETS}
    with pytest.raises(ValueError, match=r"values\['retain'\] of shape \(4, 2\)"):
        tofu.utility_interval({name: np.ones((4, 2)) for name in tofu.SETS}, groups)
