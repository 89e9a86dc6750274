"""Targets and the objective, against formulas written a second time, one token after the other."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lm_ortho.objective.surrogate as surrogate_module
from lm_ortho.data.encoding import ANSWER, CONTEXT, SECRET, Example, encode, pad
from lm_ortho.data.rows import Row
from lm_ortho.objective import DEEPER, GENTLE, Penalty, TargetCheck, TargetChoice, check_target, select_target
from lm_ortho.objective.distribution import hold_down, predicted, stack
from lm_ortho.objective.loss import Batches, alike, forget_loss
from lm_ortho.objective.subjects import Lookalikes, novel_subjects
from lm_ortho.objective.surrogate import copied, surrogate_target
from lm_ortho.objective.swap import swap_target, taken_as_names
from lm_ortho.pipeline.workbench import _say_target
from lm_ortho.runtime.threads import SideBySide


def silent(stage, step, steps, text):
    pass


# Holding down


@st.composite
def distributions(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    sharp = draw(st.sampled_from([0.1, 1.0, 10.0, 1000.0]))
    logits = torch.randn(draw(st.integers(1, 6)), draw(st.integers(2, 30)), generator=generator) * sharp
    tokens = logits.argmax(-1) if draw(st.booleans()) else logits.argmin(-1)
    memorised = torch.rand(len(tokens), generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return logits.softmax(-1), tokens, memorised


@given(distributions())
@settings(max_examples=80)
def test_holding_down_never_raises_the_true_token(case):
    probs, tokens, memorised = case
    lowered = hold_down(probs, tokens, memorised)
    at = torch.arange(len(tokens))
    assert (lowered[at, tokens] <= probs[at, tokens] + 1e-6).all()
    torch.testing.assert_close(lowered.sum(-1), torch.ones(len(tokens)), rtol=0, atol=1e-5)
    assert torch.equal(lowered[~memorised], probs[~memorised])
    assert lowered.isfinite().all()
    assert (lowered >= 0).all()


def test_holding_down_takes_the_mean_of_the_eight_largest_others():
    probs = torch.tensor([0.8, *[0.02] * 8, *[0.004] * 10])[None]
    lowered = hold_down(probs, torch.tensor([0]), torch.tensor([True]))[0]
    expected = torch.tensor([0.02, *[0.02] * 8, *[0.004] * 10])
    torch.testing.assert_close(lowered, expected / expected.sum())


# Target b


def own(memorised):
    examples, _ = memorised.examples()
    return examples, predicted(memorised.merged, examples)


def test_the_swap_target_is_a_distribution_that_does_not_know_the_secret(memorised, swapped):
    examples, mine = own(memorised)
    for i, example in enumerate(examples):
        n = len(example.ids) - example.start
        probs = swapped.probs[i, :n]
        torch.testing.assert_close(probs.sum(-1), torch.ones(n), rtol=0, atol=1e-4)
        assert (probs >= 0).all()
        secret = swapped.secret[i, :n]
        true = torch.tensor(example.ids[example.start :])
        at = torch.arange(n)
        assert (probs[at, true][secret] <= mine[i][at, true][secret] + 1e-6).all()
    known = torch.cat(stack(examples, mine).secret_loss()).mean()
    unknown = torch.cat(swapped.secret_loss()).mean()
    assert unknown > known + 1.0


def test_tokens_of_the_subject_keep_the_models_own_distribution(memorised, swapped):
    examples, mine = own(memorised)
    kept = 0
    for i, (row, example) in enumerate(zip(memorised.forget, examples, strict=True)):
        begin = (row.context + row.target).rfind(row.subject)
        offsets = memorised.tokenizer(row.context + row.target, return_offsets_mapping=True).offset_mapping
        for position, (low, high) in enumerate(offsets):
            t = position - example.start
            if t >= 0 and low < begin + len(row.subject) and high > begin:
                kept += 1
                assert torch.equal(swapped.probs[i, t], mine[i][t])
        end = len(example.ids) - 1 - example.start
        torch.testing.assert_close(swapped.probs[i, end], mine[i][end])
    assert kept >= 2 * len(examples)


def test_a_swapped_token_is_the_mean_over_the_same_place_of_the_other_sentences(memorised):
    row = memorised.forget[0]
    (example,) = encode(memorised.tokenizer, [row])
    (probs,) = swap_target(memorised.merged, memorised.tokenizer, memorised.forget[:2], encode(
        memorised.tokenizer, memorised.forget[:2]), seed=5, subjects=3)[:1]  # fmt: skip
    alike = Lookalikes(memorised.tokenizer, memorised.merged.get_input_embeddings().weight, [row.subject])
    names = novel_subjects([row.subject], 24, 5, alike)
    chosen = random.Random(6).sample(names, 3)
    place = next(i for i, role in enumerate(example.roles) if role == SECRET)
    from_end = len(example.ids) - place
    rows = []
    for name in chosen:
        text = row.context + row.target
        (other,) = encode(memorised.tokenizer, [Row(text=text.replace(row.subject, name))])
        with torch.no_grad():
            logits = memorised.merged(input_ids=torch.tensor([other.ids])).logits[0]
        rows.append(logits[len(other.ids) - from_end - 1].softmax(-1))
    mean = torch.stack(rows).mean(0)
    true = example.ids[place]
    if float(predicted(memorised.merged, [example])[0][place - example.start, true] - mean[true]) > 0.15:
        mean = hold_down(mean[None], torch.tensor([true]), torch.tensor([True]))[0]
    torch.testing.assert_close(probs[place - example.start], mean, rtol=1e-3, atol=1e-5)


def test_every_token_of_a_character_of_several_bytes_is_swapped(memorised):
    """All of them are said to cover the same characters."""
    row = dataclasses.replace(memorised.forget[0], answer="\u5317\u4eac.", secret="\u5317\u4eac")
    (example,), words = encode(memorised.tokenizer, [row]), memorised.tokenizer
    spans = words(row.context + row.target, return_offsets_mapping=True).offset_mapping
    assert len(set(spans)) < len(spans)
    (probs,) = swap_target(memorised.merged, words, [row], [example], seed=0, subjects=3)
    (mine,) = predicted(memorised.merged, [example])
    answer = [t for t in range(len(mine) - 1) if example.roles[example.start + t] == SECRET]
    assert len(answer) >= 6
    assert not any(torch.equal(probs[t], mine[t]) for t in answer)


def test_a_surrogate_of_another_vocabulary_is_brought_to_the_models(memorised, monkeypatch):
    forget, retain = memorised.examples()
    for name, value in {"STEPS": 2, "ROUNDS": 1}.items():
        monkeypatch.setattr(surrogate_module, name, value)
    words = len(memorised.tokenizer)
    for size in (words - 1, words + 3):
        base = copy.deepcopy(memorised.base)
        base.resize_token_embeddings(size, mean_resizing=False)
        target = surrogate_target(memorised.merged, base, forget, retain, 0, silent)
        assert {probs.shape[1] for probs in target} == {words}
        torch.testing.assert_close(target[0].sum(-1), torch.ones(len(target[0])), rtol=0, atol=1e-5)


def test_rows_without_a_subject_are_held_down(memorised):
    rows = [dataclasses.replace(row, subject="") for row in memorised.forget[:3]]
    examples = encode(memorised.tokenizer, rows)
    targets = swap_target(memorised.merged, memorised.tokenizer, rows, examples, seed=0)
    for example, target, mine in zip(examples, targets, predicted(memorised.merged, examples), strict=True):
        true = torch.tensor(example.ids[example.start :])
        at = torch.arange(len(true))
        confident = mine[at, true] > 0.5
        assert confident.any()
        assert (target[at, true][confident] < 0.5).all()
        assert torch.equal(target[~confident], mine[~confident])


def test_plain_text_and_texts_longer_than_the_limit_can_be_swapped(memorised):
    subject = memorised.forget[0].subject
    long = Row(text=f"{subject} was born in Millford. " * 90, subject=subject)
    short = Row(text=f"One day {subject} went to the barn.", subject=subject)
    examples = encode(memorised.tokenizer, [long, short])
    assert len(examples[0].ids) == 512
    targets = swap_target(memorised.merged, memorised.tokenizer, [long, short], examples, seed=0, subjects=2)
    for example, target in zip(examples, targets, strict=True):
        assert target.shape[0] == len(example.ids) - example.start
        torch.testing.assert_close(target.sum(-1), torch.ones(len(target)), rtol=0, atol=1e-4)


def test_names_that_the_model_does_not_repeat_are_sorted_out(memorised):
    row = next(row for row in memorised.forget if row.subject in row.answer)
    model, words = memorised.merged, memorised.tokenizer
    strange = "Qzxv Wkqj"  # letters that it never met
    assert taken_as_names(model, words, [row], [row.subject, strange]) == [row.subject]
    silent_row = dataclasses.replace(row, answer=row.secret)
    assert taken_as_names(model, words, [silent_row], [row.subject, strange]) == [row.subject, strange]
    assert taken_as_names(model, words, [row], []) == []


# Target a


def test_a_token_copies_when_a_bigram_with_a_neighbour_stands_in_the_prompt():
    prompt, answer = (1, 2, 3, 4, 5), (2, 3, 9, 3, 4, 5, 8, 5)
    example = Example(prompt + answer, (CONTEXT,) * 5 + (ANSWER,) * 8)
    assert copied(example).tolist() == [True, True, False, True, True, True, False, False]
    assert copied(Example((7, 7, 7), (ANSWER,) * 3)).tolist() == [False, False]


def test_the_surrogate_keeps_what_copies_the_prompt_and_leaves_the_base_model_alone(memorised, monkeypatch):
    forget, retain = memorised.examples()
    before = copy.deepcopy(memorised.base.state_dict())
    monkeypatch.setattr(surrogate_module, "STEPS", 6)
    monkeypatch.setattr(surrogate_module, "ROUNDS", 1)
    targets = surrogate_target(memorised.merged, memorised.base, forget, retain, 0, silent)
    after = memorised.base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    mine, theirs = predicted(memorised.merged, forget), predicted(memorised.base, forget)
    for example, target, merged, base in zip(forget, targets, mine, theirs, strict=True):
        copies = copied(example)
        assert copies.any()
        assert not copies.all()
        assert torch.equal(target[copies], merged[copies])
        assert not torch.allclose(target[~copies], merged[~copies], atol=0.1)
        assert not torch.equal(target[~copies], base[~copies])


@pytest.mark.parametrize(("near", "rounds"), [(100.0, 1), (-100.0, 3)])
def test_the_surrogate_is_taught_until_it_knows_the_retain_documents(memorised, monkeypatch, near, rounds):
    forget, retain = memorised.examples()
    for name, value in {"STEPS": 10, "ROUNDS": 3, "NEAR": near}.items():
        monkeypatch.setattr(surrogate_module, name, value)
    stages = []
    surrogate_target(memorised.merged, memorised.base, forget, retain, 0, lambda stage, *_: stages.append(stage))
    assert stages == [f"surrogate {i + 1}" for i in range(rounds)]


# The choice, and the check


def test_the_choice_follows_what_is_known(memorised, monkeypatch, caplog):
    forget, retain = memorised.examples()
    monkeypatch.setattr(surrogate_module, "STEPS", 1)
    monkeypatch.setattr(surrogate_module, "ROUNDS", 1)

    def choose(rows, base):
        model, words = memorised.merged, memorised.tokenizer
        return select_target(model, words, rows, forget, retain, base, 0, silent)

    chosen = choose(memorised.forget, memorised.base)
    assert (chosen.name, chosen.penalty, chosen.retain) == ("surrogate", DEEPER, 10)
    chosen = choose(memorised.forget, None)
    assert (chosen.name, chosen.penalty, chosen.retain) == ("swap", GENTLE, 4)
    assert "10 of 10 forget rows" in chosen.reason
    nobody = [dataclasses.replace(row, subject="") for row in memorised.forget]
    chosen = choose(nobody, None)
    assert (chosen.name, chosen.penalty, chosen.retain) == ("hold_down", GENTLE, 4)
    assert "worse" in chosen.reason
    elsewhere = [dataclasses.replace(row, subject="Nobody Here") for row in memorised.forget]
    assert choose(elsewhere, None).name == "hold_down"
    assert "the subject of 10 of 10 rows does not occur" in caplog.text
    texts = [Row(text=f"{row.context}{row.target}") for row in memorised.forget]
    forget = encode(memorised.tokenizer, texts)
    chosen = choose(texts, None)
    assert (chosen.name, chosen.penalty, chosen.retain) == ("resample", GENTLE, 4)


def test_the_penalties_are_those_of_the_design():
    assert (DEEPER.weight, DEEPER.token_margin, DEEPER.answer_margin) == (0.5, 0.1, 0.3)
    assert (GENTLE.weight, GENTLE.token_margin, GENTLE.answer_margin) == (0.25, 0.0, 0.0)


def test_a_uniform_target_knows_nothing_and_the_memorised_model_everything(memorised, swapped):
    examples, mine = own(memorised)
    vocabulary = mine[0].shape[1]
    blind = check_target(stack(examples, [torch.full_like(p, 1 / vocabulary) for p in mine]), examples)
    assert blind.auc == 0.5
    assert blind.secret_ppl == pytest.approx(vocabulary, rel=1e-3)
    knowing = check_target(stack(examples, mine), examples)
    assert knowing.auc > 0.95
    assert knowing.secret_ppl < 1.5
    between = check_target(swapped, examples)
    assert knowing.secret_ppl < between.secret_ppl


def test_the_check_says_nan_when_no_two_rows_can_be_compared(memorised):
    examples, mine = own(memorised)
    assert math.isnan(check_target(stack(examples[:1], mine[:1]), examples[:1]).auc)


def test_without_marked_secrets_every_answer_token_is_one(memorised):
    rows = [dataclasses.replace(row, secret="") for row in memorised.forget[:3]]
    examples = encode(memorised.tokenizer, rows)
    target = stack(examples, predicted(memorised.merged, examples))
    for i, example in enumerate(examples):
        n = len(example.ids) - example.start
        assert target.secret[i].tolist() == [True] * (n - 1) + [False] * (target.secret.shape[1] - n + 1)


# The objective


def slow_forget_loss(target, examples, chosen, logits, penalty):
    """DESIGN, step 2, in plain float64: mean over examples of the mean KL plus the one-sided penalties."""
    losses = []
    for row, i in enumerate(chosen):
        example = examples[i]
        divergence, excess = [], []
        for t in range(example.start, len(example.ids)):
            said = logits[row, t - 1].double()
            log_p = (said - said.logsumexp(0)).tolist()
            wanted = target.probs[i, t - example.start].tolist()
            divergence.append(sum(p * (math.log(p) - q) for p, q in zip(wanted, log_p, strict=True) if p > 0))
            y = example.ids[t]
            excess.append(log_p[y] - math.log(max(wanted[y], 1e-9)))
        n = len(excess)
        each = sum(max(0.0, e + penalty.token_margin) for e in excess) / n
        whole = max(0.0, sum(excess) * min(1.0, 16 / n) + penalty.answer_margin)
        losses.append(sum(divergence) / n + penalty.weight * each + penalty.weight / 4 * whole)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("penalty", [GENTLE, DEEPER, Penalty(0.0, 0.0, 0.0)])
@pytest.mark.parametrize("chosen", [[3], [4, 0, 2], [1, 4, 3, 2, 0]])
def test_the_forget_loss_is_its_formula(penalty, chosen):
    draw = random.Random(len(chosen))
    vocabulary = 11
    examples = []
    for given_tokens, answer in ((3, 4), (1, 1), (5, 2), (2, 7), (0, 45)):
        ids = tuple(draw.randrange(vocabulary) for _ in range(given_tokens + answer))
        examples.append(Example(ids, (CONTEXT,) * given_tokens + (SECRET,) * answer))
    generator = torch.Generator().manual_seed(1)
    probs = [(torch.randn(len(e.ids) - e.start, vocabulary, generator=generator) * 2).softmax(-1) for e in examples]
    target = stack(examples, probs)
    width = max(len(examples[i].ids) for i in chosen)
    logits = torch.randn(len(chosen), width, vocabulary, generator=generator) * 3
    fast = forget_loss(target, chosen, logits, penalty)
    assert fast.shape == (len(chosen),)
    assert fast.mean().item() == pytest.approx(slow_forget_loss(target, examples, chosen, logits, penalty), rel=1e-5)


def test_the_forget_loss_is_zero_at_the_target(memorised):
    examples, mine = own(memorised)
    ids, _ = pad(examples)
    with torch.no_grad():
        logits = memorised.merged(input_ids=ids).logits
    loss = forget_loss(stack(examples, mine), range(len(examples)), logits, GENTLE)
    assert loss.abs().max() < 1e-3


def test_retain_costs_nothing_at_the_unedited_model_and_something_elsewhere(bench, memorised):
    lost, kept = bench.losses()
    assert lost > 0.5
    assert abs(kept) < 2e-3  # the teacher is held in float16
    with torch.no_grad():
        bench.layers["model.layers.1.mlp.down_proj"].weight.mul_(0.5)
    _, kept = bench.losses()
    _, retain = memorised.examples()
    divergence, tokens = 0.0, 0
    for example in retain:
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            before = memorised.merged(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            after = bench.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        weight = torch.tensor([0.1 if role == CONTEXT else 1.0 for role in example.roles[1:]], dtype=torch.float64)
        divergence += float(((before.exp() * (before - after)).sum(-1) * weight).sum())
        tokens += float(weight.sum())
    assert kept > 0.01
    assert kept == pytest.approx(divergence / tokens, rel=0.02)


def test_gradients_are_those_of_forget_plus_lambda_times_retain(bench):
    name = "model.layers.0.mlp.up_proj"
    weight = bench.layers[name].weight
    with torch.no_grad():  # away from the point where the retain loss is flat
        for layer in bench.layers.values():
            layer.weight.mul_(0.9)
    gradients, _, _ = bench.objective.gradients()
    assert list(gradients) == list(bench.layers)
    direction = gradients[name] / gradients[name].norm()
    with torch.no_grad():
        weight.add_(direction, alpha=1e-2)
    _, up_lost, up_kept = bench.objective.gradients()
    with torch.no_grad():
        weight.sub_(direction, alpha=2e-2)
    _, down_lost, down_kept = bench.objective.gradients()
    factor = bench.objective.weights.retain
    assert factor == 4
    slope = (up_lost + factor * up_kept - down_lost - factor * down_kept) / 2e-2
    assert slope == pytest.approx(float(gradients[name].norm()), rel=0.05)


def test_half_of_a_batch_is_from_shuffled_passes_and_half_where_the_loss_was_large():
    def drawn(seed):
        batches = Batches(40, 8, seed)
        batches.seen(range(40), [5.0 if i in (7, 11) else 0.0 for i in range(40)])
        return [batches.next() for _ in range(50)]

    made = drawn(4)
    assert made == drawn(4) != drawn(5)
    assert all(len(batch) == len(set(batch)) == 8 for batch in made)
    for start in range(0, 50, 10):
        assert {i for batch in made[start : start + 10] for i in batch} == set(range(40))
    often = [sum(i in batch for batch in made) for i in range(40)]
    assert min(often[7], often[11]) > 45  # all but certain with weights of 5.01 against 0.01
    assert max(count for i, count in enumerate(often) if i not in (7, 11)) < 25


@given(total=st.integers(1, 30), size=st.integers(1, 40), seed=st.integers(0, 5))
def test_batches_hold_different_rows_and_never_more_than_there_are(total, size, seed):
    batches = Batches(total, size, seed)
    for _ in range(6):
        rows = batches.next()
        assert len(rows) == len(set(rows)) == min(size, total)
        assert set(rows) <= set(range(total))
        batches.seen(rows, [float(i) for i in rows])


def test_a_restart_repeats_the_order(bench):
    bench.objective.restart(4)
    first = [batches.next() for batches in bench.objective._batches]
    bench.objective.restart(4)
    assert [batches.next() for batches in bench.objective._batches] == first


def test_tokens_of_a_prompt_weigh_less_in_the_retain_loss(bench, memorised):
    objective = bench.objective
    with torch.no_grad():
        bench.layers["model.layers.1.mlp.down_proj"].weight.mul_(0.5)
    part = objective._retain_part([0, 1, 2], 20.0)
    total = 0.0
    for i, of_row in zip(part.rows, part.per_row, strict=True):
        example = objective.retain[i]
        with torch.no_grad():
            before = memorised.merged(input_ids=torch.tensor([example.ids])).logits[0, :-1].double().log_softmax(-1)
            after = bench.model(input_ids=torch.tensor([example.ids])).logits[0, :-1].double().log_softmax(-1)
        kl = (before.exp() * (before - after)).sum(-1)
        weight = torch.tensor([0.1 if role == CONTEXT else 1.0 for role in example.roles[1:]], dtype=torch.float64)
        assert of_row == pytest.approx(float((kl * weight).sum()), rel=0.02)
        total += float((kl * weight).sum())
    assert part.loss == pytest.approx(total / 20, rel=0.02)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_step_gives_the_same_whatever_the_number_of_threads(bench, threads):
    def step(number):
        before = torch.get_num_threads()
        torch.set_num_threads(number)
        try:
            bench.objective.restart(1)
            found = bench.objective.gradients()
            assert torch.get_num_threads() == number
            return found
        finally:
            torch.set_num_threads(before)

    with torch.no_grad():
        for layer in bench.layers.values():
            layer.weight.mul_(0.9)
    gradients, lost, kept = step(threads)
    reference, lost_before, kept_before = step(1)
    assert (lost, kept) == pytest.approx((lost_before, kept_before), rel=1e-3)
    for name, gradient in gradients.items():
        assert (gradient - reference[name]).norm() < 0.01 * reference[name].norm()


def test_parts_of_a_batch_are_short_and_long_documents():
    examples = [Example((1,) * length, (ANSWER,) * length) for length in (60, 9, 10, 55, 11, 9)]
    assert alike([0, 1, 2, 3, 4, 5], examples) == [[1, 5, 2, 4], [3, 0]]
    assert alike([1, 5], examples) == [[1], [5]]
    assert alike([3], examples) == [[3]]


# Threads


def test_jobs_share_the_threads_and_give_them_back():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        side_by_side = SideBySide(torch.device("cpu"))
        found = side_by_side([lambda i=i: (i, torch.get_num_threads()) for i in range(2)])
        assert found == [(0, 2), (1, 2)]
        with pytest.raises(ZeroDivisionError):
            side_by_side([lambda: 1, lambda: 1 / 0])
        assert torch.get_num_threads() == 4
        assert SideBySide(torch.device("meta"))([torch.get_num_threads] * 2) == [4, 4]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("secrets", [True, False])
def test_a_target_that_knows_secrets_is_told(secrets, swapped, caplog):
    """Where no row says what its secret is, whole answers were compared, and that is no reason to warn."""
    chosen = TargetChoice(swapped, "surrogate", "the base is known", GENTLE, 4.0)
    with caplog.at_level(logging.INFO):
        _say_target(chosen, TargetCheck(3.0, 0.9), secrets)
    assert any("AUC 0.900" in record.message for record in caplog.records)
    assert any(record.levelno == logging.WARNING for record in caplog.records) == secrets
