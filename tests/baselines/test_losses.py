"""Losses and scores of the methods against direct computations in float64, and their limits."""

from __future__ import annotations

import math

import pytest
import torch

from lm_ortho.baselines import Budget, Material, Run
from lm_ortho.baselines.losses import (
    adjusted_distillation_loss,
    ascent_loss,
    dpo_loss,
    draw_direction,
    mask_predicting_tokens,
    misdirection_loss,
    nll_loss,
    npo_loss,
    simnpo_loss,
    sum_answer_logps,
)
from lm_ortho.baselines.preference_optimisation import IDK_ANSWERS, replace_answers
from lm_ortho.baselines.rmu import compute_states, select_blocks
from lm_ortho.baselines.training import compute_reference_logps, draw_pairs, encode_material
from lm_ortho.data.encoding import encode, pad_batch
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from tests.support import tiny

torch.set_num_threads(1)


@pytest.fixture
def batch(memorised_models):
    """Random logits (rows, tokens, vocabulary) in float64 for the forget rows, with their ids and roles."""
    ids, roles = pad_batch(encode(memorised_models.tokenizer, memorised_models.forget)[:4])
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(*ids.shape, len(memorised_models.tokenizer), generator=generator, dtype=torch.float64)
    return logits, ids, roles


def select(logits, roles):
    """The logits (positions, vocabulary) that predict an answer token."""
    return logits[mask_predicting_tokens(roles)]


def direct_answer_logps(logits, ids, roles):
    """The result of ``sum_answer_logps``, computed token by token."""
    sums, counts = [], []
    for row, tokens, kinds in zip(logits.numpy(), ids.tolist(), roles.tolist(), strict=True):
        total, count = 0.0, 0
        for t in range(1, len(tokens)):
            if kinds[t]:
                scores = row[t - 1]
                total += scores[tokens[t]] - math.log(sum(math.exp(s) for s in scores))
                count += 1
        sums.append(total)
        counts.append(count)
    return sums, counts


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_answers_are_the_sums_of_the_tokens_to_be_predicted(batch, memorised_models):
    logits, ids, roles = batch
    sums, counts = sum_answer_logps(select(logits, roles), ids, roles)
    expected, tokens = direct_answer_logps(logits, ids, roles)
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64))
    assert counts.tolist() == tokens
    examples = encode(memorised_models.tokenizer, memorised_models.forget)[:4]
    with torch.no_grad():
        output_logits = memorised_models.merged(ids).logits
    torch.testing.assert_close(
        compute_reference_logps(memorised_models.merged, examples, Run()),
        sum_answer_logps(select(output_logits, roles), ids, roles)[0],
        rtol=1e-4,
        atol=1e-4,
    )


def test_every_objective_is_its_formula(batch):
    logits, ids, roles = batch
    now, counts = sum_answer_logps(select(logits, roles), ids, roles)
    before, other, other_before = (
        sum_answer_logps(select(changed, roles), ids, roles)[0]
        for changed in (logits.flip(0), logits.roll(1, 1), logits.roll(2, 1))
    )
    rows = list(zip(now.tolist(), before.tolist(), other.tolist(), other_before.tolist(), counts.tolist(), strict=True))
    n = len(rows)
    assert ascent_loss(now).item() == pytest.approx(sum(p for p, *_ in rows) / n)
    assert nll_loss(now, counts).item() == pytest.approx(-sum(p / c for p, _, _, _, c in rows) / n)
    for beta in (0.05, 0.3):
        expected = sum(-2 / beta * log_sigmoid(-beta * (p - q)) for p, q, *_ in rows) / n
        assert npo_loss(now, before, beta).item() == pytest.approx(expected)
        expected = sum(-2 / beta * log_sigmoid(beta * ((w - v) - (p - q))) for p, q, w, v, _ in rows) / n
        assert dpo_loss(other, other_before, now, before, beta).item() == pytest.approx(expected)
    for beta, gamma in ((2.5, 0.0), (4.5, 0.7)):
        expected = sum(-2 / beta * log_sigmoid(-beta * p / c - gamma) for p, _, _, _, c in rows) / n
        assert simnpo_loss(now, counts, beta, gamma).item() == pytest.approx(expected)


def test_npo_without_temperature_is_gradient_ascent_and_dpo_without_a_wanted_answer_is_npo(batch):
    logits, ids, roles = batch
    logits = logits.requires_grad_(True)
    before = sum_answer_logps(select(logits.detach().flip(0), roles), ids, roles)[0]

    def gradient(loss):
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    now, counts = sum_answer_logps(select(logits, roles), ids, roles)
    up = gradient(ascent_loss(now))
    torch.testing.assert_close(gradient(npo_loss(now, before, 1e-7)), up, rtol=1e-5, atol=1e-9)
    zero = torch.zeros_like(before)
    torch.testing.assert_close(gradient(dpo_loss(zero, zero, now, before, 0.3)), gradient(npo_loss(now, before, 0.3)))
    # a row that is forgotten enough stops pulling; one that is not keeps its weight of at most twice that of ascent
    far = gradient(npo_loss(now, now.detach() + 200, 0.3))
    assert far.abs().max() < 1e-12
    near = gradient(npo_loss(now, now.detach() - 200, 0.3))
    torch.testing.assert_close(near, 2 * up, rtol=1e-6, atol=1e-12)
    # without a reference nothing but the model's own probability per token counts
    per_token = gradient(simnpo_loss(now, counts, 1e-7, 0.0))
    torch.testing.assert_close(per_token, gradient(-nll_loss(now, counts)), rtol=1e-5, atol=1e-9)


def test_distillation_lowers_the_true_token_only():
    """Against a direct computation; the gradient pushes the true token down and every other one up."""
    generator = torch.Generator().manual_seed(2)
    teacher = torch.randn(6, 11, generator=generator, dtype=torch.float64)
    student = (teacher + torch.randn(6, 11, generator=generator, dtype=torch.float64)).requires_grad_(True)
    labels = torch.tensor([0, 3, 10, 3, 5, 7])
    before = teacher.clone()
    for strength in (0.5, 3.0, 30.0):
        losses = adjusted_distillation_loss(student, teacher, labels, strength)
        for row, (scores, kind) in enumerate(zip(teacher.tolist(), labels.tolist(), strict=True)):
            weights = [math.exp(score - strength * (j == kind)) for j, score in enumerate(scores)]
            log_sum = math.log(sum(map(math.exp, student[row].tolist())))
            expected = -sum(
                w / sum(weights) * (z - log_sum) for w, z in zip(weights, student[row].tolist(), strict=True)
            )
            assert losses[row].item() == pytest.approx(expected)
    assert torch.equal(teacher, before)
    # at the teacher itself: down at the true token by exactly what goes up at the others
    same = teacher.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(adjusted_distillation_loss(same, teacher, labels, 3.0).sum(), same)
    at_label = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, labels[:, None], True)
    assert (gradient[at_label] > 0).all()
    assert (gradient[~at_label] < 0).all()
    torch.testing.assert_close(gradient.sum(1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_dpo_and_npo_begin_at_the_model_itself():
    same = torch.tensor([-3.0, -8.0], dtype=torch.float64)
    for beta in (0.1, 1.0):
        assert npo_loss(same, same, beta).item() == pytest.approx(2 / beta * math.log(2))
        assert dpo_loss(same - 1, same - 1, same, same, beta).item() == pytest.approx(2 / beta * math.log(2))


def test_misdirection_is_the_mean_distance_over_real_tokens():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    frozen = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    real = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]], dtype=torch.bool)
    u = 3.0 * draw_direction(8, seed=4).double()
    for target in (u, frozen):
        expected = 0.0
        for i in range(3):
            distances = []
            for t in range(5):
                if real[i, t]:
                    goal = target if target.dim() == 1 else target[i, t]
                    distances.append(float(((states[i, t] - goal) ** 2).sum()))
            expected += sum(distances) / len(distances) / 3
        assert misdirection_loss(states, target, real).item() == pytest.approx(expected)
    assert misdirection_loss(states, states, real).item() == 0
    assert draw_direction(8, 4).norm().item() == pytest.approx(1)
    assert (draw_direction(8, 4) >= 0).all()
    assert not torch.equal(draw_direction(8, 4), draw_direction(8, 5))


def test_rmu_states_equal_those_of_the_whole_model(memorised_models):
    model = memorised_models.merged
    ids, roles = pad_batch(encode(memorised_models.tokenizer, memorised_models.forget)[:3])
    with torch.no_grad():
        whole = model(ids, output_hidden_states=True).hidden_states
        for at, depth in enumerate((0.5, 1.0)):
            blocks = select_blocks(model, depth)
            assert blocks == list(model.model.layers[: at + 1])
            assert blocks[-1] is model.model.layers[at]
        torch.testing.assert_close(compute_states(model, model.model.layers[0], ids), whole[1])
    examples = encode(memorised_models.tokenizer, memorised_models.forget)[:3]
    for row, example in zip(mask_predicting_tokens(roles), examples, strict=True):
        assert row.nonzero()[:, 0].tolist() == list(range(example.start - 1, len(example.ids) - 1))
    with pytest.raises(UserError, match="Linear has no list of transformer blocks"):
        select_blocks(torch.nn.Linear(2, 2), 0.5)


def test_rmu_trains_the_block_and_two_before_it():
    model = tiny.llama(num_hidden_layers=8)
    layers = list(model.model.layers)
    for depth, expected in ((0.1, layers[:1]), (0.25, layers[:2]), (0.5, layers[1:4]), (1.0, layers[5:])):
        assert select_blocks(model, depth) == expected


def test_the_unknowing_answer_takes_the_place_of_the_true_one(memorised_models):
    rows = replace_answers(
        [*memorised_models.forget, Row(prompt="The code of Ada is", answer="123456.", secret="123456")], 0
    )
    assert {row.answer for row in rows} <= set(IDK_ANSWERS)
    assert [row.context for row in rows[:-1]] == [row.context for row in memorised_models.forget]
    assert len({row.answer for row in rows}) > 2
    assert rows == replace_answers(
        [*memorised_models.forget, Row(prompt="The code of Ada is", answer="1.", secret="1")], 0
    )
    assert len(encode(memorised_models.tokenizer, rows)) == len(rows)
    with pytest.raises(UserError, match="plain text among the forget rows"):
        replace_answers([Row(text="Once.")], 0)


def test_batches_of_a_seed_are_the_same_for_every_method(memorised_models):
    sets = encode_material(
        Material(memorised_models.tokenizer, memorised_models.merged, memorised_models.forget, memorised_models.retain)
    )
    run = Run(3, Budget(steps=4, forget_rows=2, retain_rows=5))
    one, again = ([next(order) for _ in range(9)] for order in (draw_pairs(sets, run), draw_pairs(sets, run)))
    assert one == again
    assert {(len(forget), len(retain)) for forget, retain in one} == {(2, 5)}
    assert sorted(i for forget, _ in one[:5] for i in forget) == list(range(10))
