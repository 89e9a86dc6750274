"""TOFU's aggregates against formulas written a second time and against scipy."""

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
def test_the_truth_ratio_is_that_of_probabilities(case):
    perturbed, paraphrased = case
    found = tofu.truth_ratio(perturbed, paraphrased)
    for r, wrong, right in zip(found, perturbed, paraphrased, strict=True):
        likely = math.prod(math.exp(-loss) for loss in wrong) ** (1 / len(wrong))
        if likely > 1e-250:
            assert r == pytest.approx(likely / math.exp(-right), rel=1e-6)
    assert found == pytest.approx(stats.gmean(np.exp(-np.array(perturbed)), axis=1) / np.exp(-np.array(paraphrased)))


def test_one_wrong_answer_may_be_a_plain_list():
    assert tofu.truth_ratio([1.0, 2.0], [1.0, 1.0]) == pytest.approx([1.0, math.exp(-1)])
    assert np.array_equal(tofu.truth_ratio([1.0, 2.0], [1.0, 1.0]), tofu.truth_ratio([[1.0], [2.0]], [1.0, 1.0]))


ratios = st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=60)


@given(ratios, ratios)
@settings(max_examples=60)
def test_forget_quality_is_the_p_value_of_the_test(one, other):
    found = tofu.forget_quality(one, other)
    assert isinstance(found, float)
    assert found == pytest.approx(stats.ks_2samp(one, other).pvalue)
    assert found == pytest.approx(tofu.forget_quality(other, one))
    assert tofu.forget_quality(one, one) == 1.0
    # the test looks at order only
    assert found == pytest.approx(tofu.forget_quality(np.log(one), np.log(other)))


def test_forget_quality_tells_apart_what_is_apart():
    near, far = np.linspace(0.5, 1.0, 300), np.linspace(5.0, 9.0, 300)
    assert tofu.forget_quality(near, near * 1.0001) > 0.99
    assert tofu.forget_quality(near, far) < 1e-100


@given(ratios)
@settings(max_examples=60)
def test_truth_ratios_of_both_sides(given_ratios):
    each = [min(r, 1 / r) for r in given_ratios]
    assert tofu.forget_truth_ratio(given_ratios) == pytest.approx(sum(each) / len(each))
    assert 0 <= tofu.forget_truth_ratio(given_ratios) <= 1
    kept = [max(0.0, 1 - r) for r in given_ratios]
    assert tofu.kept_truth_ratio(given_ratios) == pytest.approx(sum(kept) / len(kept))


def test_ratios_at_the_ends():
    assert tofu.forget_truth_ratio([0.0, 1.0]) == 0.5
    with pytest.raises(ValueError, match="negative"):
        tofu.forget_truth_ratio([-1.0])


@given(questions())
@settings(max_examples=60)
def test_the_probability_among_choices(case):
    wrong, right = case
    found = tofu.choice_probability(right, wrong)
    for p, true, others in zip(found, right, wrong, strict=True):
        top = math.exp(-true)
        assert p == pytest.approx(top / (top + sum(math.exp(-loss) for loss in others)), rel=1e-9)
    assert ((found > 0) & (found < 1)).all()


means = st.fixed_dictionaries(
    {name: st.fixed_dictionaries({part: st.floats(1e-3, 1) for part in tofu.PARTS}) for name in tofu.SETS}
)


@given(means)
@settings(max_examples=60)
def test_utility_is_the_harmonic_mean_of_nine(given_means):
    nine = [given_means[name][part] for name in tofu.SETS for part in tofu.PARTS]
    found = tofu.model_utility(given_means)
    assert found == pytest.approx(stats.hmean(nine))
    assert min(nine) - 1e-9 <= found <= max(nine) + 1e-9
    same = {name: dict.fromkeys(tofu.PARTS, 0.25) for name in tofu.SETS}
    assert tofu.model_utility(same) == pytest.approx(0.25)


def whole(**changed):
    made = {name: dict.fromkeys(tofu.PARTS, 0.5) for name in tofu.SETS}
    made["retain"].update(changed)
    return made


def test_one_part_that_is_gone_leaves_nothing():
    assert tofu.model_utility(whole(rouge=0.0)) == 0.0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"retain": {}}, "needed are retain, real_authors, world_facts"),
        (whole(bleu=1.0), "needed are prob, rouge, truth_ratio"),
        (whole(prob=1.5), "between 0 and 1"),
        (whole(prob=math.nan), "means"),
    ],
)
def test_what_is_no_utility(bad, message):
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
def test_losses_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_losses_of_a_broken_model_overflow_nothing():
    assert np.isfinite(tofu.truth_ratio([[0.0]], [1e6])).all()
    assert tofu.choice_probability([1e6], [[0.0, 0.0]]) == pytest.approx([0.0])


def test_the_interval_of_model_utility_holds_the_value():
    rng = np.random.default_rng(1)
    values = {name: rng.uniform(0.2, 0.9, size=(60, 3)) for name in tofu.SETS}
    groups = {name: np.arange(60) // 20 for name in tofu.SETS}
    means = {name: dict(zip(tofu.PARTS, table.mean(0), strict=True)) for name, table in values.items()}
    found = tofu.utility_interval(values, groups)
    assert found.value == pytest.approx(tofu.model_utility(means))
    assert found.low < found.value < found.high
    same = tofu.utility_interval({name: np.full((5, 3), 0.5) for name in tofu.SETS}, {n: range(5) for n in tofu.SETS})
    assert same == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_of_model_utility_needs_three_columns():
    groups = {name: range(4) for name in tofu.SETS}
    with pytest.raises(ValueError, match=r"values\['retain'\] of shape \(4, 2\)"):
        tofu.utility_interval({name: np.ones((4, 2)) for name in tofu.SETS}, groups)
