"""Objectives of the methods against direct computations in float64, and their limits."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lm_ortho.baselines import Budget, Material, Run
from lm_ortho.baselines.kfac import factors, keep_mass, late_feed_forward
from lm_ortho.baselines.losses import answers, ascent, direction, dpo, likelihood, misdirection, npo, simnpo
from lm_ortho.baselines.preference_optimisation import IGNORANT, without_answers
from lm_ortho.baselines.pruning import by_matrix, by_row, made_up_for, obs_scores, wanda_scores, zeroed
from lm_ortho.baselines.rmu import chosen_blocks, speaking, states_of
from lm_ortho.baselines.training import answers_before, encoded, pairs
from lm_ortho.calibration.activations import damped_inverse
from lm_ortho.data.encoding import encode, pad
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from tests.support import tiny

torch.set_num_threads(1)


@pytest.fixture
def batch(memorised):
    """Random logits (rows, tokens, vocabulary) in float64 for the forget rows, with their ids and roles."""
    ids, roles = pad(encode(memorised.tokenizer, memorised.forget)[:4])
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(*ids.shape, len(memorised.tokenizer), generator=generator, dtype=torch.float64)
    return logits, ids, roles


def direct(logits, ids, roles):
    """The same as ``answers``, token by token."""
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


def test_answers_are_the_sums_of_the_tokens_to_be_predicted(batch, memorised):
    logits, ids, roles = batch
    sums, counts = answers(logits, ids, roles)
    expected, tokens = direct(logits, ids, roles)
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64))
    assert counts.tolist() == tokens
    examples = encode(memorised.tokenizer, memorised.forget)[:4]
    with torch.no_grad():
        said = memorised.merged(ids).logits
    torch.testing.assert_close(
        answers_before(memorised.merged, examples), answers(said, ids, roles)[0], rtol=1e-4, atol=1e-4
    )


def test_every_objective_is_its_formula(batch):
    logits, ids, roles = batch
    now, counts = answers(logits, ids, roles)
    before = answers(logits.flip(0), ids, roles)[0]
    other, other_before = answers(logits.roll(1, 1), ids, roles)[0], answers(logits.roll(2, 1), ids, roles)[0]
    rows = list(zip(now.tolist(), before.tolist(), other.tolist(), other_before.tolist(), counts.tolist(), strict=True))
    n = len(rows)
    assert ascent(now).item() == pytest.approx(sum(p for p, *_ in rows) / n)
    assert likelihood(now, counts).item() == pytest.approx(-sum(p / c for p, _, _, _, c in rows) / n)
    for beta in (0.05, 0.3):
        wanted = sum(-2 / beta * log_sigmoid(-beta * (p - q)) for p, q, *_ in rows) / n
        assert npo(now, before, beta).item() == pytest.approx(wanted)
        wanted = sum(-2 / beta * log_sigmoid(beta * ((w - v) - (p - q))) for p, q, w, v, _ in rows) / n
        assert dpo(other, other_before, now, before, beta).item() == pytest.approx(wanted)
    for beta, gamma in ((2.5, 0.0), (4.5, 0.7)):
        wanted = sum(-2 / beta * log_sigmoid(-beta * p / c - gamma) for p, _, _, _, c in rows) / n
        assert simnpo(now, counts, beta, gamma).item() == pytest.approx(wanted)


def test_npo_without_temperature_is_gradient_ascent_and_dpo_without_a_wanted_answer_is_npo(batch):
    logits, ids, roles = batch
    logits = logits.requires_grad_(True)
    before = answers(logits.detach().flip(0), ids, roles)[0]

    def gradient(loss):
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    now, counts = answers(logits, ids, roles)
    up = gradient(ascent(now))
    torch.testing.assert_close(gradient(npo(now, before, 1e-7)), up, rtol=1e-5, atol=1e-9)
    zero = torch.zeros_like(before)
    torch.testing.assert_close(gradient(dpo(zero, zero, now, before, 0.3)), gradient(npo(now, before, 0.3)))
    # a row that is forgotten enough stops pulling; one that is not keeps its weight of at most twice that of ascent
    far = gradient(npo(now, now.detach() + 200, 0.3))
    assert far.abs().max() < 1e-12
    near = gradient(npo(now, now.detach() - 200, 0.3))
    torch.testing.assert_close(near, 2 * up, rtol=1e-6, atol=1e-12)
    # without a reference nothing but the model's own probability per token counts
    per_token = gradient(simnpo(now, counts, 1e-7, 0.0))
    torch.testing.assert_close(per_token, gradient(-likelihood(now, counts)), rtol=1e-5, atol=1e-9)


def test_dpo_and_npo_begin_at_the_model_itself():
    same = torch.tensor([-3.0, -8.0], dtype=torch.float64)
    for beta in (0.1, 1.0):
        assert npo(same, same, beta).item() == pytest.approx(2 / beta * math.log(2))
        assert dpo(same - 1, same - 1, same, same, beta).item() == pytest.approx(2 / beta * math.log(2))


def test_misdirection_is_the_mean_distance_over_real_tokens():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    frozen = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    real = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]], dtype=torch.bool)
    u = 3.0 * direction(8, seed=4).double()
    for towards in (u, frozen):
        wanted = 0.0
        for i in range(3):
            found = []
            for t in range(5):
                if real[i, t]:
                    goal = towards if towards.dim() == 1 else towards[i, t]
                    found.append(float(((states[i, t] - goal) ** 2).sum()))
            wanted += sum(found) / len(found) / 3
        assert misdirection(states, towards, real).item() == pytest.approx(wanted)
    assert misdirection(states, states, real).item() == 0
    assert direction(8, 4).norm().item() == pytest.approx(1)
    assert (direction(8, 4) >= 0).all()
    assert not torch.equal(direction(8, 4), direction(8, 5))


def test_rmu_looks_at_the_states_a_whole_model_would_have(memorised):
    model = memorised.merged
    ids, roles = pad(encode(memorised.tokenizer, memorised.forget)[:3])
    with torch.no_grad():
        whole = model(ids, output_hidden_states=True).hidden_states
        for at, depth in enumerate((0.5, 1.0)):
            blocks = chosen_blocks(model, depth)
            assert blocks == list(model.model.layers[: at + 1])
            assert blocks[-1] is model.model.layers[at]
        torch.testing.assert_close(states_of(model, model.model.layers[0], ids), whole[1])
    examples = encode(memorised.tokenizer, memorised.forget)[:3]
    for row, example in zip(speaking(roles), examples, strict=True):
        assert row.nonzero()[:, 0].tolist() == list(range(example.start - 1, len(example.ids) - 1))
    with pytest.raises(UserError, match="Linear has no list of blocks"):
        chosen_blocks(torch.nn.Linear(2, 2), 0.5)


def test_rmu_trains_the_block_and_two_before_it():
    model = tiny.llama(num_hidden_layers=8)
    layers = list(model.model.layers)
    for depth, expected in ((0.1, layers[:1]), (0.25, layers[:2]), (0.5, layers[1:4]), (1.0, layers[5:])):
        assert chosen_blocks(model, depth) == expected


def test_the_unknowing_answer_takes_the_place_of_the_true_one(memorised):
    rows = without_answers([*memorised.forget, Row(prompt="The code of Ada is", answer="123456.", secret="123456")], 0)
    assert {row.answer for row in rows} <= set(IGNORANT)
    assert [row.context for row in rows[:-1]] == [row.context for row in memorised.forget]
    assert len({row.answer for row in rows}) > 2
    assert rows == without_answers([*memorised.forget, Row(prompt="The code of Ada is", answer="1.", secret="1")], 0)
    assert len(encode(memorised.tokenizer, rows)) == len(rows)
    with pytest.raises(UserError, match="plain text among the forget rows"):
        without_answers([Row(text="Once.")], 0)


def test_batches_of_a_seed_are_the_same_for_every_method(memorised):
    sets = encoded(Material(memorised.tokenizer, memorised.merged, memorised.forget, memorised.retain))
    run = Run(3, Budget(4, 2, 5))
    one, again = ([next(order) for _ in range(9)] for order in (pairs(sets, run), pairs(sets, run)))
    assert one == again
    assert {(len(forget), len(retain)) for forget, retain in one} == {(2, 5)}
    assert sorted(i for forget, _ in one[:5] for i in forget) == list(range(10))


# Pruning


def moment_of(width, seed=0):
    x = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / len(x)


def test_scores_of_pruning_are_those_of_the_papers():
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    moment = moment_of(9)
    inverse = damped_inverse(moment)
    for i in range(6):
        for j in range(9):
            w = float(weight[i, j])
            assert wanda_scores(weight, moment)[i, j].item() == pytest.approx(
                abs(w) * math.sqrt(moment[j, j]), rel=1e-5
            )
            assert obs_scores(weight, moment)[i, j].item() == pytest.approx(w * w / float(inverse[j, j]), rel=1e-5)


def test_ranks_follow_the_scores_within_a_row_and_within_a_matrix():
    scores = torch.rand(5, 40, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 10, 100, 1, 1])[:, None]
    rows, matrix = by_row(scores), by_matrix(scores)
    for i in range(5):
        assert rows[i].argsort().tolist() == scores[i].argsort().tolist()
    assert matrix.flatten().argsort().tolist() == scores.flatten().argsort().tolist()
    top = rows >= rows.flatten().topk(10).values.min()
    assert top.sum(1).tolist() == [2] * 5
    for ranks in (rows, matrix):
        assert ranks.min() >= 0
        assert ranks.max() < 1


def test_what_is_removed_is_made_up_for_on_the_rows_to_be_kept():
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(4))
    moment = moment_of(40, 5) + 5 * torch.ones(40, 40)
    mask = torch.rand(8, 40, generator=torch.Generator().manual_seed(6)) < 0.1

    def error(pruned):
        off = (pruned - weight).double()
        return float(((off @ moment.double()) * off).sum())

    plain, made_up = (remove(weight, mask, moment) for remove in (zeroed, made_up_for))
    assert (made_up[mask] == 0).all()
    assert (plain[mask] == 0).all()
    assert torch.equal(plain[~mask], weight[~mask])
    assert error(made_up) < 0.7 * error(plain)
    nothing = torch.zeros_like(mask)
    torch.testing.assert_close(made_up_for(weight, nothing, moment), weight)


def test_one_removed_weight_is_made_up_for_as_optimal_brain_surgeon_says():
    """The first column of a row: delta = -w / [H^-1]_00 * [H^-1]_0 over all columns after it (Frantar 2023, eq. 3)."""
    weight, moment = torch.randn(1, 12, generator=torch.Generator().manual_seed(7)), moment_of(12, 8)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, 0] = True
    inverse = damped_inverse(moment)
    expected = weight.double() - weight[0, 0] / inverse[0, 0] * inverse[0][None]
    torch.testing.assert_close(made_up_for(weight, mask, moment).double(), expected, rtol=1e-5, atol=1e-6)


# K-FAC


def test_curvature_that_is_kept_whole_changes_nothing_and_less_of_it_changes_more():
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(9))
    outputs, inputs = moment_of(6, 1), moment_of(10, 2)
    torch.testing.assert_close(keep_mass(weight, outputs, inputs, 1.0), weight, rtol=1e-5, atol=1e-6)
    lost = [float((keep_mass(weight, outputs, inputs, kept) - weight).norm()) for kept in (0.9, 0.5, 0.1)]
    assert 0 < lost[0] < lost[1] < lost[2] < float(weight.norm())


def test_layers_of_the_later_blocks_are_edited_and_mlps_where_there_are_some():
    names = [f"model.layers.{i}.{part}" for i in range(4) for part in ("mlp.up_proj", "self_attn.q_proj")]
    assert late_feed_forward(names, 0.5) == ["model.layers.2.mlp.up_proj", "model.layers.3.mlp.up_proj"]
    assert late_feed_forward(["h.0.c_attn", "h.1.c_attn"], 0.5) == ["h.1.c_attn"]
    assert late_feed_forward(["first", "second"], 0.5) == ["first", "second"]


def test_factors_are_those_of_the_layers_that_are_asked_about(memorised):
    model = copy.deepcopy(memorised.merged)
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    inputs, outputs = factors(model, {name: layer}, encode(memorised.tokenizer, memorised.retain))
    assert inputs[name].shape == (layer.in_features, layer.in_features)
    assert outputs[name].shape == (layer.out_features, layer.out_features)
    assert torch.linalg.eigvalsh(outputs[name].double()).min() > -1e-6
    assert not any(parameter.requires_grad for parameter in model.parameters())
