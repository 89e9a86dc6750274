"""Targets: what the forget rows should look like, how a target is chosen, and how it is checked."""

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

from lm_ortho.data.encoding import ANSWER, CONTEXT, SECRET, Example, encode
from lm_ortho.data.rows import Row
from lm_ortho.objective import DEEPER, GENTLE, TargetCheck, TargetChoice, check_target, select_target
from lm_ortho.objective.distribution import hold_down, predict_distributions, stack
from lm_ortho.objective.subjects import Lookalikes, make_novel_subjects
from lm_ortho.objective.surrogate import find_copied_tokens, surrogate_target
from lm_ortho.objective.swap import filter_recognised_names, swap_target
from lm_ortho.pipeline.report import log_target
from lm_ortho.runtime.progress import no_progress
from tests.support.targets import predict_forget

# Holding down


@st.composite
def distributions(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    sharp = draw(st.sampled_from([0.1, 1.0, 10.0, 1000.0]))
    logits = torch.randn(draw(st.integers(1, 6)), draw(st.integers(2, 30)), generator=generator) * sharp
    tokens = logits.argmax(-1) if draw(st.booleans()) else logits.argmin(-1)
    is_memorised = torch.rand(len(tokens), generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return logits.softmax(-1), tokens, is_memorised


@given(distributions())
@settings(max_examples=80)
def test_holding_down_never_raises_the_true_token(case):
    probs, tokens, is_memorised = case
    result = hold_down(probs, tokens, is_memorised)
    at = torch.arange(len(tokens))
    assert (result[at, tokens] <= probs[at, tokens] + 1e-6).all()
    torch.testing.assert_close(result.sum(-1), torch.ones(len(tokens)), rtol=0, atol=1e-5)
    assert torch.equal(result[~is_memorised], probs[~is_memorised])
    assert result.isfinite().all()
    assert (result >= 0).all()


def test_holding_down_takes_the_mean_of_the_eight_largest_others():
    probs = torch.tensor([0.8, *[0.02] * 8, *[0.004] * 10])[None]
    result = hold_down(probs, torch.tensor([0]), torch.tensor([True]))[0]
    expected = torch.tensor([0.02, *[0.02] * 8, *[0.004] * 10])
    torch.testing.assert_close(result, expected / expected.sum())


# Target b


def test_the_swap_target_is_a_distribution_that_does_not_know_the_secret(memorised_models, swap_distributions):
    examples, own_distributions = predict_forget(memorised_models)
    for i, example in enumerate(examples):
        n = len(example.ids) - example.start
        probs = swap_distributions.probs[i, :n]
        torch.testing.assert_close(probs.sum(-1), torch.ones(n), rtol=0, atol=1e-4)
        assert (probs >= 0).all()
        secret = swap_distributions.secret[i, :n]
        true = torch.tensor(example.ids[example.start :])
        at = torch.arange(n)
        assert (probs[at, true][secret] <= own_distributions[i][at, true][secret] + 1e-6).all()
    own_loss = torch.cat(stack(examples, own_distributions).secret_loss()).mean()
    target_loss = torch.cat(swap_distributions.secret_loss()).mean()
    assert target_loss > own_loss + 1.0


def test_tokens_of_the_subject_keep_the_models_own_distribution(memorised_models, swap_distributions):
    examples, own_distributions = predict_forget(memorised_models)
    count = 0
    for i, (row, example) in enumerate(zip(memorised_models.forget, examples, strict=True)):
        begin = (row.context + row.target).rfind(row.subject)
        offsets = memorised_models.tokenizer(row.context + row.target, return_offsets_mapping=True).offset_mapping
        for position, (low, high) in enumerate(offsets):
            t = position - example.start
            if t >= 0 and low < begin + len(row.subject) and high > begin:
                count += 1
                assert torch.equal(swap_distributions.probs[i, t], own_distributions[i][t])
        end = len(example.ids) - 1 - example.start
        torch.testing.assert_close(swap_distributions.probs[i, end], own_distributions[i][end])
    assert count >= 2 * len(examples)


def test_a_swapped_token_is_the_mean_over_the_same_place_of_the_other_sentences(memorised_models):
    rows = memorised_models.forget[:2]
    examples = encode(memorised_models.tokenizer, rows)
    probs = next(swap_target(memorised_models.merged, memorised_models.tokenizer, rows, examples, seed=5, subjects=3))
    row, example = rows[0], examples[0]
    lookalikes = Lookalikes(
        memorised_models.tokenizer, memorised_models.merged.get_input_embeddings().weight, [row.subject]
    )
    names = make_novel_subjects([row.subject], 24, 5, lookalikes)
    position = next(i for i, role in enumerate(example.roles) if role == SECRET)
    from_end = len(example.ids) - position
    swapped_probs = []
    for name in random.Random(6).sample(names, 3):
        text = row.context + row.target
        (other,) = encode(memorised_models.tokenizer, [Row(text=text.replace(row.subject, name))])
        with torch.no_grad():
            logits = memorised_models.merged(input_ids=torch.tensor([other.ids])).logits[0]
        swapped_probs.append(logits[len(other.ids) - from_end - 1].softmax(-1))
    mean = torch.stack(swapped_probs).mean(0)
    true = example.ids[position]
    if (
        float(predict_distributions(memorised_models.merged, [example])[0][position - example.start, true] - mean[true])
        > 0.15
    ):
        mean = hold_down(mean[None], torch.tensor([true]), torch.tensor([True]))[0]
    torch.testing.assert_close(probs[position - example.start], mean, rtol=1e-3, atol=1e-5)


def test_every_token_of_a_character_of_several_bytes_is_swapped(memorised_models):
    """The tokenizer reports the same characters for all of them."""
    row = dataclasses.replace(memorised_models.forget[0], answer="\u5317\u4eac.", secret="\u5317\u4eac")
    tokenizer = memorised_models.tokenizer
    (example,) = encode(tokenizer, [row])
    spans = tokenizer(row.context + row.target, return_offsets_mapping=True).offset_mapping
    assert len(set(spans)) < len(spans)
    (probs,) = swap_target(memorised_models.merged, tokenizer, [row], [example], seed=0, subjects=3)
    (own_probs,) = predict_distributions(memorised_models.merged, [example])
    answer = [t for t in range(len(own_probs) - 1) if example.roles[example.start + t] == SECRET]
    assert len(answer) >= 6
    assert not any(torch.equal(probs[t], own_probs[t]) for t in answer)


def test_a_surrogate_of_another_vocabulary_gets_that_of_the_merged_model(memorised_models):
    forget, retain = memorised_models.examples()
    vocabulary = len(memorised_models.tokenizer)
    for size in (vocabulary - 1, vocabulary + 3):
        base = copy.deepcopy(memorised_models.base)
        base.resize_token_embeddings(size, mean_resizing=False)
        target = list(
            surrogate_target(
                memorised_models.merged,
                base,
                forget,
                retain=retain,
                steps=2,
                batch_rows=48,
                seed=0,
                progress=no_progress,
            )
        )
        assert {probs.shape[1] for probs in target} == {vocabulary}
        torch.testing.assert_close(target[0].sum(-1), torch.ones(len(target[0])), rtol=0, atol=1e-5)


def test_rows_without_a_subject_are_held_down(memorised_models):
    rows = [dataclasses.replace(row, subject="") for row in memorised_models.forget[:3]]
    examples = encode(memorised_models.tokenizer, rows)
    targets = swap_target(memorised_models.merged, memorised_models.tokenizer, rows, examples, seed=0)
    own_distributions = predict_distributions(memorised_models.merged, examples)
    for example, target, own_probs in zip(examples, targets, own_distributions, strict=True):
        true = torch.tensor(example.ids[example.start :])
        at = torch.arange(len(true))
        is_confident = own_probs[at, true] > 0.5
        assert is_confident.any()
        assert (target[at, true][is_confident] < 0.5).all()
        assert torch.equal(target[~is_confident], own_probs[~is_confident])


def test_plain_text_and_texts_longer_than_the_limit_can_be_swapped(memorised_models):
    subject = memorised_models.forget[0].subject
    long = Row(text=f"{subject} was born in Millford. " * 90, subject=subject)
    short = Row(text=f"One day {subject} went to the barn.", subject=subject)
    examples = encode(memorised_models.tokenizer, [long, short])
    assert len(examples[0].ids) == 512
    targets = swap_target(
        memorised_models.merged, memorised_models.tokenizer, [long, short], examples, seed=0, subjects=2
    )
    for example, target in zip(examples, targets, strict=True):
        assert target.shape[0] == len(example.ids) - example.start
        torch.testing.assert_close(target.sum(-1), torch.ones(len(target)), rtol=0, atol=1e-4)


def test_names_that_the_model_does_not_repeat_are_filtered_out(memorised_models):
    row = next(row for row in memorised_models.forget if row.subject in row.answer)
    model, tokenizer = memorised_models.merged, memorised_models.tokenizer
    unknown_name = "Qzxv Wkqj"  # letters that the model never met
    assert filter_recognised_names(model, tokenizer, [row], [row.subject, unknown_name]) == [row.subject]
    other_row = dataclasses.replace(row, answer=row.secret)
    names = [row.subject, unknown_name]
    assert filter_recognised_names(model, tokenizer, [other_row], names) == names
    assert filter_recognised_names(model, tokenizer, [row], []) == []


# Target a


def test_a_token_copies_when_a_bigram_with_a_neighbour_occurs_in_the_prompt():
    prompt, answer = (1, 2, 3, 4, 5), (2, 3, 9, 3, 4, 5, 8, 5)
    example = Example(prompt + answer, (CONTEXT,) * 5 + (ANSWER,) * 8)
    assert find_copied_tokens(example).tolist() == [True, True, False, True, True, True, False, False]
    assert find_copied_tokens(Example((7, 7, 7), (ANSWER,) * 3)).tolist() == [False, False]


def test_the_surrogate_keeps_tokens_that_copy_the_prompt_and_leaves_the_base_model_unchanged(memorised_models):
    forget, retain = memorised_models.examples()
    before = copy.deepcopy(memorised_models.base.state_dict())
    flags = [parameter.requires_grad for parameter in memorised_models.base.parameters()]
    targets = list(
        surrogate_target(
            memorised_models.merged,
            memorised_models.base,
            forget,
            retain=retain,
            steps=6,
            batch_rows=48,
            seed=0,
            progress=no_progress,
        )
    )
    assert flags == [parameter.requires_grad for parameter in memorised_models.base.parameters()]
    after = memorised_models.base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    merged_probs = predict_distributions(memorised_models.merged, forget)
    base_probs = predict_distributions(memorised_models.base, forget)
    for example, target, merged, base in zip(forget, targets, merged_probs, base_probs, strict=True):
        copies = find_copied_tokens(example)
        assert copies.any()
        assert not copies.all()
        assert torch.equal(target[copies], merged[copies])
        assert not torch.allclose(target[~copies], merged[~copies], atol=0.1)
        assert not torch.equal(target[~copies], base[~copies])


# The choice, and the check


def test_the_choice_follows_the_available_data(memorised_models, monkeypatch, caplog):
    forget, retain = memorised_models.examples()

    def choose(rows, base_model):
        return select_target(
            memorised_models.merged,
            memorised_models.tokenizer,
            rows,
            forget=forget,
            retain=retain,
            base_model=base_model,
            steps=1,
            batch_rows=48,
            seed=0,
            progress=no_progress,
        )

    choice = choose(memorised_models.forget, memorised_models.base)
    assert (choice.name, choice.penalty, choice.retain) == ("surrogate", DEEPER, 10)
    choice = choose(memorised_models.forget, None)
    assert (choice.name, choice.penalty, choice.retain) == ("swap", GENTLE, 4)
    assert "10 of 10 forget rows" in choice.reason
    without_subject = [dataclasses.replace(row, subject="") for row in memorised_models.forget]
    choice = choose(without_subject, None)
    assert (choice.name, choice.penalty, choice.retain) == ("hold_down", GENTLE, 4)
    assert "worse" in choice.reason
    other_subjects = [dataclasses.replace(row, subject="Nobody Here") for row in memorised_models.forget]
    assert choose(other_subjects, None).name == "hold_down"
    assert "the subject of 10 of 10 rows does not occur" in caplog.text
    texts = [Row(text=f"{row.context}{row.target}") for row in memorised_models.forget]
    forget = encode(memorised_models.tokenizer, texts)
    choice = choose(texts, None)
    assert (choice.name, choice.penalty, choice.retain) == ("resample", GENTLE, 4)


def test_the_penalties_are_those_of_the_design():
    assert (DEEPER.weight, DEEPER.token_margin, DEEPER.answer_margin) == (0.5, 0.1, 0.3)
    assert (GENTLE.weight, GENTLE.token_margin, GENTLE.answer_margin) == (0.25, 0.0, 0.0)


def test_the_check_of_a_uniform_target_and_of_the_memorised_model(memorised_models, swap_distributions):
    examples, own_distributions = predict_forget(memorised_models)
    vocabulary = own_distributions[0].shape[1]
    uniform = check_target(stack(examples, [torch.full_like(p, 1 / vocabulary) for p in own_distributions]), examples)
    assert uniform.auc == 0.5
    assert uniform.secret_ppl == pytest.approx(vocabulary, rel=1e-3)
    memorised_model = check_target(stack(examples, own_distributions), examples)
    assert memorised_model.auc > 0.95
    assert memorised_model.secret_ppl < 1.5
    assert memorised_model.secret_ppl < check_target(swap_distributions, examples).secret_ppl


def test_the_auc_is_nan_when_no_two_rows_can_be_compared(memorised_models):
    examples, own_distributions = predict_forget(memorised_models)
    assert math.isnan(check_target(stack(examples[:1], own_distributions[:1]), examples[:1]).auc)


def test_without_marked_secrets_every_answer_token_is_one(memorised_models):
    rows = [dataclasses.replace(row, secret="") for row in memorised_models.forget[:3]]
    examples = encode(memorised_models.tokenizer, rows)
    target = stack(examples, predict_distributions(memorised_models.merged, examples))
    for i, example in enumerate(examples):
        n = len(example.ids) - example.start
        assert target.secret[i].tolist() == [True] * (n - 1) + [False] * (target.secret.shape[1] - n + 1)


@pytest.mark.parametrize("secrets", [True, False])
def test_a_target_that_knows_secrets_is_a_warning(secrets, swap_distributions, caplog):
    """Without marked secrets whole answers are compared, and a high AUC is no reason to warn."""
    choice = TargetChoice(swap_distributions, "surrogate", "the base is known", GENTLE, 4.0)
    with caplog.at_level(logging.INFO):
        log_target(choice, TargetCheck(3.0, 0.9), has_secrets=secrets)
    assert any("AUC 0.900" in record.message for record in caplog.records)
    assert any(record.levelno == logging.WARNING for record in caplog.records) == secrets
