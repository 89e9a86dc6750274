"""Pruning: scores, ranks and the compensation of removed weights."""

from __future__ import annotations

import math

import pytest
import torch

from lm_ortho.baselines.pruning import (
    compute_obs_scores,
    compute_wanda_scores,
    rank_in_matrix,
    rank_in_rows,
    zero_and_compensate,
    zero_weights,
)
from lm_ortho.calibration.activations import damped_inverse
from tests.support.moments import draw_moment

torch.set_num_threads(1)


def test_scores_of_pruning_are_those_of_the_papers():
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    moment = draw_moment(9)
    inverse = damped_inverse(moment)
    for i in range(6):
        for j in range(9):
            w = float(weight[i, j])
            assert compute_wanda_scores(weight, moment)[i, j].item() == pytest.approx(
                abs(w) * math.sqrt(moment[j, j]), rel=1e-5
            )
            assert compute_obs_scores(weight, moment)[i, j].item() == pytest.approx(
                w * w / float(inverse[j, j]), rel=1e-5
            )


def test_ranks_follow_the_scores_within_a_row_and_within_a_matrix():
    scores = torch.rand(5, 40, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 10, 100, 1, 1])[:, None]
    rows, matrix = rank_in_rows(scores), rank_in_matrix(scores)
    for i in range(5):
        assert rows[i].argsort().tolist() == scores[i].argsort().tolist()
    assert matrix.flatten().argsort().tolist() == scores.flatten().argsort().tolist()
    top = rows >= rows.flatten().topk(10).values.min()
    assert top.sum(1).tolist() == [2] * 5
    for ranks in (rows, matrix):
        assert ranks.min() >= 0
        assert ranks.max() < 1


def test_removed_weights_are_compensated_on_the_retain_rows():
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(4))
    moment = draw_moment(40, 5) + 5 * torch.ones(40, 40)
    mask = torch.rand(8, 40, generator=torch.Generator().manual_seed(6)) < 0.1

    def output_error(pruned_weight):
        difference = (pruned_weight - weight).double()
        return float(((difference @ moment.double()) * difference).sum())

    plain, compensated = (remove(weight, mask, moment) for remove in (zero_weights, zero_and_compensate))
    assert (compensated[mask] == 0).all()
    assert (plain[mask] == 0).all()
    assert torch.equal(plain[~mask], weight[~mask])
    assert output_error(compensated) < 0.7 * output_error(plain)
    nothing = torch.zeros_like(mask)
    torch.testing.assert_close(zero_and_compensate(weight, nothing, moment), weight)


def test_the_compensation_of_one_removed_weight_is_that_of_optimal_brain_surgeon():
    """The first column of a row: delta = -w / [H^-1]_00 * [H^-1]_0 over all columns after it (Frantar 2023, eq. 3)."""
    weight, moment = torch.randn(1, 12, generator=torch.Generator().manual_seed(7)), draw_moment(12, 8)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, 0] = True
    inverse = damped_inverse(moment)
    expected = weight.double() - weight[0, 0] / inverse[0, 0] * inverse[0][None]
    torch.testing.assert_close(zero_and_compensate(weight, mask, moment).double(), expected, rtol=1e-5, atol=1e-6)
