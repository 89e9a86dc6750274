"""The objective, against a slow implementation of its formula, token by token; its batches, parts and threads."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm_ortho.data.encoding import ANSWER, CONTEXT, SECRET, Example, pad_batch
from lm_ortho.objective import DEEPER, GENTLE, Penalty
from lm_ortho.objective.batches import Batches, split_by_length
from lm_ortho.objective.distribution import stack
from lm_ortho.objective.loss import forget_loss, mask_answer_positions
from lm_ortho.runtime.threads import ParallelRunner
from tests.support.targets import predict_forget

# The objective


def slow_forget_loss(target, examples, rows, logits, penalty):
    """docs/method.md, step 4, in plain float64: mean over examples of the mean KL plus the one-sided penalties."""
    losses = []
    for number, i in enumerate(rows):
        example = examples[i]
        divergence, excess = [], []
        for t in range(example.start, len(example.ids)):
            token_logits = logits[number, t - 1].double()
            log_p = (token_logits - token_logits.logsumexp(0)).tolist()
            target_p = target.probs[i, t - example.start].tolist()
            divergence.append(sum(p * (math.log(p) - q) for p, q in zip(target_p, log_p, strict=True) if p > 0))
            y = example.ids[t]
            excess.append(log_p[y] - math.log(max(target_p[y], 1e-9)))
        n = len(excess)
        per_token = sum(max(0.0, e + penalty.token_margin) for e in excess) / n
        per_answer = max(0.0, sum(excess) * min(1.0, 16 / n) + penalty.answer_margin)
        losses.append(sum(divergence) / n + penalty.weight * per_token + penalty.weight / 4 * per_answer)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("penalty", [GENTLE, DEEPER, Penalty(0.0, 0.0, 0.0)])
@pytest.mark.parametrize("rows", [[3], [4, 0, 2], [1, 4, 3, 2, 0]])
def test_the_forget_loss_is_its_formula(penalty, rows):
    draw = random.Random(len(rows))
    vocabulary = 11
    examples = []
    for context, answer in ((3, 4), (1, 1), (5, 2), (2, 7), (0, 45)):
        ids = tuple(draw.randrange(vocabulary) for _ in range(context + answer))
        examples.append(Example(ids, (CONTEXT,) * context + (SECRET,) * answer))
    generator = torch.Generator().manual_seed(1)
    probs = [(torch.randn(len(e.ids) - e.start, vocabulary, generator=generator) * 2).softmax(-1) for e in examples]
    target = stack(examples, probs)
    width = max(len(examples[i].ids) for i in rows)
    logits = torch.randn(len(rows), width, vocabulary, generator=generator) * 3
    fast = forget_loss(target, rows, logits[mask_answer_positions([examples[i] for i in rows])], penalty)
    assert fast.shape == (len(rows),)
    assert fast.mean().item() == pytest.approx(slow_forget_loss(target, examples, rows, logits, penalty), rel=1e-5)


def test_the_forget_loss_is_zero_at_the_target(memorised_models):
    examples, own_distributions = predict_forget(memorised_models)
    ids, _ = pad_batch(examples)
    with torch.no_grad():
        logits = memorised_models.merged(input_ids=ids).logits[mask_answer_positions(examples)]
    loss = forget_loss(stack(examples, own_distributions), range(len(examples)), logits, GENTLE)
    assert loss.abs().max() < 1e-3


def test_the_retain_loss_is_zero_at_the_unedited_model_and_its_formula_elsewhere(forgetting_setup, memorised_models):
    unedited_forget_loss, unedited_retain_loss = forgetting_setup.losses()
    assert unedited_forget_loss > 0.5
    assert abs(unedited_retain_loss) < 2e-3  # the teacher is stored in float16
    with torch.no_grad():
        forgetting_setup.layers["model.layers.1.mlp.down_proj"].weight.mul_(0.5)
    _, retain_loss = forgetting_setup.losses()
    _, retain = memorised_models.examples()
    divergence, tokens = 0.0, 0
    for example in retain:
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            before = memorised_models.merged(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            after = forgetting_setup.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        weight = torch.tensor([0.1 if role == CONTEXT else 1.0 for role in example.roles[1:]], dtype=torch.float64)
        divergence += float(((before.exp() * (before - after)).sum(-1) * weight).sum())
        tokens += float(weight.sum())
    assert retain_loss > 0.01
    assert retain_loss == pytest.approx(divergence / tokens, rel=0.02)


def test_gradients_are_those_of_forget_plus_lambda_times_retain(forgetting_setup):
    name = "model.layers.0.mlp.up_proj"
    weight = forgetting_setup.layers[name].weight
    with torch.no_grad():  # away from the point where the retain loss is flat
        for layer in forgetting_setup.layers.values():
            layer.weight.mul_(0.9)
    gradients, _, _ = forgetting_setup.objective.gradients()
    assert list(gradients) == list(forgetting_setup.layers)
    direction = gradients[name] / gradients[name].norm()
    with torch.no_grad():
        weight.add_(direction, alpha=1e-2)
    _, *losses_above = forgetting_setup.objective.gradients()
    with torch.no_grad():
        weight.sub_(direction, alpha=2e-2)
    _, *losses_below = forgetting_setup.objective.gradients()
    factor = forgetting_setup.objective.weights.retain
    assert factor == 4
    total_above, total_below = (forget + factor * retain for forget, retain in (losses_above, losses_below))
    slope = (total_above - total_below) / 2e-2
    assert slope == pytest.approx(float(gradients[name].norm()), rel=0.05)


def test_half_of_a_batch_is_from_shuffled_passes_and_half_drawn_by_loss():
    def draw_batches(seed):
        batches = Batches(40, 8, seed)
        batches.record_losses(range(40), [5.0 if i in (7, 11) else 0.0 for i in range(40)])
        return [batches.next() for _ in range(50)]

    batches = draw_batches(4)
    assert batches == draw_batches(4) != draw_batches(5)
    assert all(len(batch) == len(set(batch)) == 8 for batch in batches)
    for start in range(0, 50, 10):
        assert {i for batch in batches[start : start + 10] for i in batch} == set(range(40))
    counts = [sum(i in batch for batch in batches) for i in range(40)]
    assert min(counts[7], counts[11]) > 45  # all but certain with weights of 5.01 against 0.01
    assert max(count for i, count in enumerate(counts) if i not in (7, 11)) < 25


@given(total=st.integers(1, 30), size=st.integers(1, 40), seed=st.integers(0, 5))
def test_batches_hold_different_rows_and_never_more_than_there_are(total, size, seed):
    batches = Batches(total, size, seed)
    for _ in range(6):
        rows = batches.next()
        assert len(rows) == len(set(rows)) == min(size, total)
        assert set(rows) <= set(range(total))
        batches.record_losses(rows, [float(i) for i in rows])


def test_a_restart_repeats_the_order(forgetting_setup):
    def next_batches():
        forgetting_setup.objective.restart(4)
        return forgetting_setup.objective._forget_batches.next(), forgetting_setup.objective._retain_batches.next()

    assert next_batches() == next_batches()


def test_tokens_of_a_prompt_weigh_less_in_the_retain_loss(forgetting_setup, memorised_models):
    objective = forgetting_setup.objective
    with torch.no_grad():
        forgetting_setup.layers["model.layers.1.mlp.down_proj"].weight.mul_(0.5)
    part = objective._retain_part([0, 1, 2], 20.0)
    total = 0.0
    for i, row_loss in zip(part.rows, part.row_losses, strict=True):
        example = objective.retain[i]
        with torch.no_grad():
            before = (
                memorised_models.merged(input_ids=torch.tensor([example.ids])).logits[0, :-1].double().log_softmax(-1)
            )
            after = (
                forgetting_setup.model(input_ids=torch.tensor([example.ids])).logits[0, :-1].double().log_softmax(-1)
            )
        kl = (before.exp() * (before - after)).sum(-1)
        weight = torch.tensor([0.1 if role == CONTEXT else 1.0 for role in example.roles[1:]], dtype=torch.float64)
        assert row_loss == pytest.approx(float((kl * weight).sum()), rel=0.02)
        total += float((kl * weight).sum())
    assert part.loss == pytest.approx(total / 20, rel=0.02)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_step_does_not_depend_on_the_number_of_threads(forgetting_setup, threads):
    def step(number):
        before = torch.get_num_threads()
        torch.set_num_threads(number)
        try:
            forgetting_setup.objective.restart(1)
            result = forgetting_setup.objective.gradients()
            assert torch.get_num_threads() == number
            return result
        finally:
            torch.set_num_threads(before)

    with torch.no_grad():
        for layer in forgetting_setup.layers.values():
            layer.weight.mul_(0.9)
    gradients, *losses = step(threads)
    reference, *reference_losses = step(1)
    assert losses == pytest.approx(reference_losses, rel=1e-3)
    for name, gradient in gradients.items():
        assert (gradient - reference[name]).norm() < 0.01 * reference[name].norm()


def test_parts_of_a_batch_are_short_and_long_documents():
    examples = [Example((1,) * length, (ANSWER,) * length) for length in (60, 9, 10, 55, 11, 9)]
    assert split_by_length([0, 1, 2, 3, 4, 5], examples) == [[1, 5, 2, 4], [3, 0]]
    assert split_by_length([1, 5], examples) == [[1], [5]]
    assert split_by_length([3], examples) == [[3]]


# Threads


def test_jobs_share_the_threads_and_give_them_back():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        side_by_side = ParallelRunner(torch.device("cpu"))
        results = side_by_side([lambda i=i: (i, torch.get_num_threads()) for i in range(2)])
        assert list(results) == [(0, 2), (1, 2)]
        with pytest.raises(ZeroDivisionError):
            list(side_by_side([lambda: 1, lambda: 1 / 0]))
        assert torch.get_num_threads() == 4
        assert list(ParallelRunner(torch.device("meta"))([torch.get_num_threads] * 2)) == [4, 4]
    finally:
        torch.set_num_threads(before)
