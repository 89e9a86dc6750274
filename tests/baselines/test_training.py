"""Training of methods: micro-batches within a budget of tokens, and the tokens that a budget pays for."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lm_ortho.baselines import Budget, Run
from lm_ortho.baselines.interface import TokenCount
from lm_ortho.baselines.losses import npo_loss
from lm_ortho.baselines.training import (
    Term,
    accumulate_gradients,
    answer_passes,
    compute_answer_logps,
    compute_reference_logps,
    count_steps,
    make_retain_term,
    split_rows,
)
from lm_ortho.errors import UserError

torch.set_num_threads(1)


# Micro-batches


def make_terms(sets):
    """A loss that is a mean over rows but no mean over tokens, of two sets of examples, and the retain loss."""

    def forget_loss(model, rows):
        rejected, preferred = (
            compute_answer_logps(model, examples, rows)[0] for examples in (sets.forget, sets.forget[::-1])
        )
        return npo_loss(rejected, preferred.detach() - 1, 0.3)

    return Term(forget_loss, (sets.forget, sets.forget[::-1])), make_retain_term(sets, 4.0)


@pytest.mark.parametrize("tokens", [1, 60, 150])
def test_the_gradient_does_not_depend_on_the_size_of_micro_batches(sets, memorised_models, tokens):
    """In float64, but for the logits, which are float32 in every pass."""
    model = copy.deepcopy(memorised_models.merged).double().requires_grad_(True)
    terms, pair = make_terms(sets), ([0, 3, 4, 8, 9], [7, 1, 1, 5])
    whole = terms[0].loss(model, pair[0]) + 4.0 * terms[1].loss(model, pair[1])
    expected = torch.autograd.grad(whole, list(model.parameters()))
    total = accumulate_gradients(model, terms, pair, tokens)
    total.backward()
    assert total.item() == pytest.approx(whole.item(), rel=1e-6)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7 * float(gradient.abs().max()))


def test_a_micro_batch_holds_no_more_tokens_than_the_budget(sets):
    rows = [0, 3, 3, 4, 8, 9]
    inputs = (sets.forget, sets.forget[::-1])
    lengths = {i: sum(len(examples[i].ids) for examples in inputs) for i in rows}
    for tokens in (1, max(lengths.values()), 3 * max(lengths.values()), 10**6):
        parts = split_rows(rows, inputs, tokens)
        assert sorted(i for part in parts for i in part) == sorted(rows)
        for part in parts:
            padded = len(part) * sum(max(len(examples[i].ids) for i in part) for examples in inputs)
            assert padded <= tokens or len(part) == 1
    assert len(parts) == 1


def test_the_output_embedding_computes_answers_only_and_a_term_without_weight_nothing(sets, memorised_models):
    """The number of positions whose logits a training pass holds is the number of tokens to be predicted."""
    model = copy.deepcopy(memorised_models.merged).requires_grad_(True)
    sizes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[:-1].numel()))
    terms = (None, make_retain_term(sets))
    with answer_passes(model, sets.max_length):
        accumulate_gradients(model, terms, ([0], [1, 2]))
        assert sizes == [sum(role != 0 for i in (1, 2) for role in sets.retain[i].roles)]
        compute_reference_logps(model, sets.forget, Run())
        assert sum(sizes[1:]) == sum(role != 0 for example in sets.forget for role in example.roles)
        sizes.clear()
        accumulate_gradients(model, (None, make_retain_term(sets, 0.0)), ([0], [1, 2]))
        assert not sizes


# Tokens


def test_tokens_are_counted_per_pass_without_padding_and_paid_from_the_budget(sets):
    forget, retain = Term(None, (sets.forget, sets.forget[::-1]), has_teacher=True, depth=0.5), make_retain_term(sets)
    lengths = [len(example.ids) for example in sets.forget]
    for row in range(10):
        assert forget.count_tokens(row) == pytest.approx(0.5 * 4 / 3 * (lengths[row] + lengths[9 - row]))
        assert retain.count_tokens(row) == len(sets.retain[row].ids)
        assert make_retain_term(sets, 0.0).count_tokens(row) == 0
    count = TokenCount()
    count.add(30)
    count.add_forward(30, depth=0.5)
    assert count.total == pytest.approx(35)
    # a step of 2 forget and 5 retain rows, at the mean cost of a row, after what was spent before
    step = 2 * (4 / 3 * sum(lengths) / 10) + 5 * sum(len(example.ids) for example in sets.retain) / 10
    for tokens, spent in ((step * 7 + 1, 0.0), (step * 7 + 1, step * 2), (step + 1, 0.0)):
        run = Run(budget=Budget(tokens=math.ceil(tokens), forget_rows=2, retain_rows=5), tokens=TokenCount(spent))
        assert count_steps((forget, retain), run) == int((math.ceil(tokens) - spent) / step)
    run = Run(budget=Budget(tokens=10, forget_rows=2, retain_rows=5), tokens=TokenCount(4.0))
    with pytest.raises(UserError, match=r"budget: tokens=10 do not suffice for one step of \d+ tokens after 4 of"):
        count_steps((forget, retain), run)
    assert count_steps((forget, retain), Run(budget=Budget(steps=3))) == 3


def test_a_budget_has_steps_or_tokens():
    assert (Budget().steps, Budget().tokens) == (400, None)
    by_tokens = Budget(tokens=5000)
    assert by_tokens.steps is None
    assert Budget(**by_tokens.model_dump()) == by_tokens
    for numbers, message in (
        ({"steps": 3, "tokens": 5}, "give steps or tokens, not both"),
        ({"steps": None}, "give steps or tokens"),
        ({"tokens": 0}, "tokens=0: Input should be greater than or equal to 1"),
        ({"tokens": 1.5}, "tokens=1.5: "),
    ):
        with pytest.raises(UserError, match=message):
            Budget(**numbers)
