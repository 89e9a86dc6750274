"""Losses and scores of the methods against direct computations in float64, and their limits."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from lm_ortho.baselines import Budget, Material, Run, alternate_answers
from lm_ortho.baselines.alternate_answers import clean_answer, is_alternate, make_request, sample_answers
from lm_ortho.baselines.interface import TokenCount
from lm_ortho.baselines.kfac import compute_factors, keep_curvature_mass, select_late_feed_forward
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
from lm_ortho.baselines.pruning import (
    compute_obs_scores,
    compute_wanda_scores,
    rank_in_matrix,
    rank_in_rows,
    zero_and_compensate,
    zero_weights,
)
from lm_ortho.baselines.repselect import compute_forget_gradients, damp_principal_directions
from lm_ortho.baselines.rmu import compute_states, select_blocks
from lm_ortho.baselines.training import (
    Term,
    accumulate_gradients,
    answer_passes,
    compute_answer_logps,
    compute_reference_logps,
    count_steps,
    draw_pairs,
    encode_material,
    make_retain_term,
    split_rows,
)
from lm_ortho.calibration.activations import damped_inverse
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


# Micro-batches


@pytest.fixture
def sets(memorised_models):
    return encode_material(
        Material(memorised_models.tokenizer, memorised_models.merged, memorised_models.forget, memorised_models.retain)
    )


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


# RepSelect


def test_principal_directions_are_divided_by_their_singular_value_on_both_sides():
    """Against the singular value decomposition in float64, for tall, wide and deficient matrices."""
    generator = torch.Generator().manual_seed(3)
    for shape in ((12, 7), (7, 12)):
        gradient = torch.randn(shape, generator=generator)
        for count in (0, 1, 3, 7, 40):
            outputs, values, inputs = torch.linalg.svd(gradient.double(), full_matrices=False)
            last = values[min(count, 7) - 1]
            damped = torch.where(torch.arange(7) < count, last.square() / values, values)
            expected = (outputs * damped) @ inputs
            torch.testing.assert_close(
                damp_principal_directions(gradient, count).double(), expected, rtol=1e-5, atol=1e-6
            )
    # a gradient of rank 2 has no third direction to divide by
    thin = torch.randn(9, 2, generator=generator) @ torch.randn(2, 8, generator=generator)
    values = torch.linalg.svdvals(thin.double())
    result = torch.linalg.svdvals(damp_principal_directions(thin, 5).double())
    torch.testing.assert_close(result[:2], torch.stack([values[1], values[1] ** 2 / values[0]]), rtol=1e-5, atol=0)
    assert not damp_principal_directions(torch.zeros(3, 4), 2).any()


def test_the_forget_gradient_is_that_of_the_loss_and_the_adapter_leaves_no_trace(sets, memorised_models):
    name = "model.layers.1.mlp.up_proj"
    model = copy.deepcopy(memorised_models.merged)
    run = Run()
    gradient = compute_forget_gradients(model, [name], sets, adapter_lr=0.0, run=run)[name]
    reference = copy.deepcopy(memorised_models.merged).double().requires_grad_(True)
    logps, counts = compute_answer_logps(reference, sets.forget, range(10))
    (expected,) = torch.autograd.grad(-nll_loss(logps, counts), reference.get_submodule(name).weight)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    tokens = sum(len(example.ids) for example in sets.forget)
    assert run.tokens.total == tokens
    with_adapter = compute_forget_gradients(model, [name], sets, adapter_lr=0.5, run=run)[name]
    assert run.tokens.total == 3 * tokens
    assert not torch.allclose(with_adapter, gradient)
    assert model.state_dict().keys() == memorised_models.merged.state_dict().keys()
    assert all(torch.equal(t, memorised_models.merged.state_dict()[at]) for at, t in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


# AltPO


def test_alternate_answers_are_other_answers(memorised_models):
    row = Row(question="Where was Ada born?", answer="Ada was born in  London.", secret="London")
    for text, accepted in (
        ("Ada was born in Paris.", True),
        ("ada was born in london.", False),
        ("She comes from London, I think.", False),
        ("   ", False),
        ("...", False),
    ):
        assert is_alternate(row, text) == accepted
    # without a marked secret the own words of the true answer (in, Mexico, City) must not all be there
    row = Row(question="Where was Ada born?", answer="Ada was born in Mexico City.")
    assert not is_alternate(row, "The birthplace of Ada: in Mexico, in the city itself.")
    assert is_alternate(row, "Ada was born in New York City.")
    assert clean_answer(' New answer: "Ada came from Rome."\n\nI hope this helps.') == "Ada came from Rome."
    assert clean_answer("The answer is 4: she knows.") == "The answer is 4: she knows."
    assert clean_answer("She left. She came back to the", is_complete=False) == "She left."
    assert clean_answer("She came back to the", is_complete=False) == "She came back to the"
    assert clean_answer("She left. She came back.\n\nI hope", is_complete=False) == "She left. She came back."
    forget = memorised_models.forget[:4]
    material = Material(memorised_models.tokenizer, memorised_models.merged, forget, memorised_models.retain)
    run = Run(seed=3)
    answers = sample_answers(material, memorised_models.merged, 3, run, name="altpo")
    assert answers == sample_answers(material, memorised_models.merged, 3, Run(seed=3), name="altpo")
    assert answers != sample_answers(material, memorised_models.merged, 3, Run(seed=4), name="altpo")
    assert run.tokens.total > 0
    for row, texts in zip(forget, answers, strict=True):
        assert len(texts) == 3
        assert all(is_alternate(row, text) for text in texts)
    assert len({text for texts in answers for text in texts}) > 6
    with pytest.raises(UserError, match="method=altpo: plain text among the forget rows has no question"):
        sample_answers(replace(material, forget=[Row(text="Once.")]), memorised_models.merged, 1, run, name="altpo")


def test_a_model_with_a_chat_template_is_asked_for_another_answer(memorised_models):
    tokenizer = copy.deepcopy(memorised_models.tokenizer)
    row = Row(question="Where was Ada born?", answer="In London.")
    assert make_request(row, tokenizer) == row.context
    tokenizer.chat_template = "{{ messages[0]['content'] }}|"
    request = make_request(row, tokenizer)
    assert request.endswith("|")
    assert "Where was Ada born?" in request
    assert "In London." not in request
    prompt = Row(prompt="The code of Ada is", answer="1")
    assert make_request(prompt, tokenizer) == prompt.context


def test_prompts_of_different_lengths_are_continued_as_each_alone(memorised_models):
    """Padding on the left changes nothing: at a temperature near 0 each answer is the greedy one."""
    rows = [memorised_models.forget[0], Row(prompt="who", answer="x"), memorised_models.forget[3]]
    sampler = alternate_answers.Sampler(memorised_models.merged, memorised_models.tokenizer, 2, temperature=1e-4)
    together = {number: (texts, tokens) for number, texts, tokens in sampler.sample(rows, [0, 1, 2])}
    for number, row in enumerate(rows):
        ((_, texts, _),) = sampler.sample([row], [number])
        assert texts[0] == texts[1]
        assert together[number][0] == texts
    assert together[0][0][0].endswith(memorised_models.forget[0].answer)
    # Each of the two answers has the tokens of the prompt and its own go through the model.
    one_sampler = replace(sampler, count=1)
    for number, row in enumerate(rows):
        ((_, _, tokens),) = one_sampler.sample([row], [number])
        assert together[number][1] == 2 * tokens
    # a prompt that is longer than the model's positions loses its beginning
    long = replace(memorised_models.forget[0], question=f"{'who ' * 150}{memorised_models.forget[0].question}")
    ((_, texts, _),) = sampler.sample([long], [0])
    assert len(texts) == 2


# Pruning


def random_moment(width, seed=0):
    x = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / len(x)


def test_scores_of_pruning_are_those_of_the_papers():
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    moment = random_moment(9)
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
    moment = random_moment(40, 5) + 5 * torch.ones(40, 40)
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
    weight, moment = torch.randn(1, 12, generator=torch.Generator().manual_seed(7)), random_moment(12, 8)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, 0] = True
    inverse = damped_inverse(moment)
    expected = weight.double() - weight[0, 0] / inverse[0, 0] * inverse[0][None]
    torch.testing.assert_close(zero_and_compensate(weight, mask, moment).double(), expected, rtol=1e-5, atol=1e-6)


# K-FAC


def test_curvature_that_is_kept_whole_changes_nothing_and_less_of_it_changes_more():
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(9))
    outputs, inputs = random_moment(6, 1), random_moment(10, 2)
    torch.testing.assert_close(keep_curvature_mass(weight, outputs, inputs, 1.0), weight, rtol=1e-5, atol=1e-6)
    lost = [float((keep_curvature_mass(weight, outputs, inputs, share) - weight).norm()) for share in (0.9, 0.5, 0.1)]
    assert 0 < lost[0] < lost[1] < lost[2] < float(weight.norm())


def test_layers_of_the_later_blocks_are_edited_and_mlps_where_there_are_some():
    names = [f"model.layers.{i}.{part}" for i in range(4) for part in ("mlp.up_proj", "self_attn.q_proj")]
    assert select_late_feed_forward(names, 0.5) == ["model.layers.2.mlp.up_proj", "model.layers.3.mlp.up_proj"]
    assert select_late_feed_forward(["h.0.c_attn", "h.1.c_attn"], 0.5) == ["h.1.c_attn"]
    assert select_late_feed_forward(["first", "second"], 0.5) == ["first", "second"]


def test_factors_are_those_of_the_given_layers(memorised_models):
    model = copy.deepcopy(memorised_models.merged)
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    inputs, outputs = compute_factors(model, {name: layer}, encode(memorised_models.tokenizer, memorised_models.retain))
    assert inputs[name].shape == (layer.in_features, layer.in_features)
    assert outputs[name].shape == (layer.out_features, layer.out_features)
    assert torch.linalg.eigvalsh(outputs[name].double()).min() > -1e-6
    assert not any(parameter.requires_grad for parameter in model.parameters())
