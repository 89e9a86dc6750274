"""The target of plain text without a subject: memorised words are replaced by others that fit."""

from __future__ import annotations

import dataclasses

import torch

from lm_ortho.data import Row
from lm_ortho.data.encoding import ANSWER, encode
from lm_ortho.objective.distribution import MEMORISED_MARGIN, predict_distributions
from lm_ortho.objective.token_resampling import WINDOW, predict_in_windows, resample_target


def make_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def encode_text(memorised_models, number=0):
    """A memorised question with its answer as plain text, all of it to be predicted."""
    row = memorised_models.forget[number]
    (example,) = encode(memorised_models.tokenizer, [Row(text=row.context + row.target)])
    return example


def predict(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)


def test_a_window_hides_what_came_before_it(memorised_models):
    example = encode_text(memorised_models)
    window_probs = predict_in_windows(memorised_models.merged, example)
    assert window_probs.shape[0] == len(example.ids) - example.start
    for t in (example.start, WINDOW + 3, len(example.ids) - 1):
        expected = predict(memorised_models.merged, example.ids[max(0, t - WINDOW) : t])[-1]
        torch.testing.assert_close(window_probs[t - example.start], expected, rtol=1e-4, atol=1e-6)


def test_the_target_is_the_mean_over_texts_with_other_content(memorised_models):
    """Against the definition, text by text."""
    model, example = memorised_models.merged, encode_text(memorised_models)
    (own_probs,) = predict_distributions(model, [example])
    tokens, at = torch.tensor(example.ids[example.start :]), torch.arange(len(example.ids) - example.start)
    window_probs = predict_in_windows(model, example)
    is_content = own_probs[at, tokens] - window_probs[at, tokens] > MEMORISED_MARGIN
    assert 0 < int(is_content.sum()) < len(is_content)
    draw, total = make_generator(), torch.zeros_like(own_probs)
    for _ in range(3):
        other_probs = window_probs.clone()
        other_probs[at, tokens] = 0
        samples = torch.multinomial(other_probs.clamp_min(1e-12), 1, generator=draw)[:, 0]
        assert not (samples == tokens).any()
        ids = [*example.ids[: example.start], *torch.where(is_content, samples, tokens).tolist()]
        total += predict(model, ids)[example.start - 1 : -1] / 3
    target = resample_target(model, example, own_probs, make_generator(), texts=3)
    as_mean = own_probs[at, tokens] - total[at, tokens] <= MEMORISED_MARGIN
    torch.testing.assert_close(target[as_mean], total[as_mean], rtol=1e-4, atol=1e-6)
    assert (target[~as_mean, tokens[~as_mean]] < own_probs[~as_mean, tokens[~as_mean]] - 0.1).all()


def test_memorised_tokens_are_lowered_and_the_target_is_reproducible(memorised_models):
    for number in range(4):
        example = encode_text(memorised_models, number)
        (own_probs,) = predict_distributions(memorised_models.merged, [example])
        target = resample_target(memorised_models.merged, example, own_probs, make_generator())
        at, tokens = torch.arange(len(own_probs)), torch.tensor(example.ids[example.start :])
        torch.testing.assert_close(target.sum(-1), torch.ones(len(target)), rtol=1e-4, atol=1e-4)
        assert (target[at, tokens] <= own_probs[at, tokens] + MEMORISED_MARGIN + 1e-6).float().mean() > 0.7
        assert torch.equal(target, resample_target(memorised_models.merged, example, own_probs, make_generator()))


def test_without_memorised_content_the_target_is_the_models_own(memorised_models):
    """No token is likelier after the whole text than in its window, so every resampled text is the text itself."""
    (example,) = encode(memorised_models.tokenizer, [Row(text="Once there was a dog who lived near the mill.")])
    short = dataclasses.replace(example, ids=example.ids[:WINDOW], roles=(*example.roles[: WINDOW - 1], ANSWER))
    (own_probs,) = predict_distributions(memorised_models.merged, [short])
    target = resample_target(memorised_models.merged, short, own_probs, make_generator())
    torch.testing.assert_close(target, own_probs, rtol=1e-4, atol=1e-6)
