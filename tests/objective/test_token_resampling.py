"""The target of plain text without a subject: other words that fit, in the place of those that were memorised."""

from __future__ import annotations

import dataclasses

import torch

from lm_ortho.data import Row
from lm_ortho.data.encoding import ANSWER, encode
from lm_ortho.objective.distribution import MEMORISED, predicted
from lm_ortho.objective.token_resampling import WINDOW, in_windows, resampled


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def as_text(memorised, number=0):
    """A memorised question with its answer as plain text, all of it to be predicted."""
    row = memorised.forget[number]
    (example,) = encode(memorised.tokenizer, [Row(text=row.context + row.target)])
    return example


def said(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)


def test_a_window_hides_what_came_before_it(memorised):
    example = as_text(memorised)
    shown = in_windows(memorised.merged, example)
    assert shown.shape[0] == len(example.ids) - example.start
    for t in (example.start, WINDOW + 3, len(example.ids) - 1):
        alone = said(memorised.merged, example.ids[max(0, t - WINDOW) : t])[-1]
        torch.testing.assert_close(shown[t - example.start], alone, rtol=1e-4, atol=1e-6)


def test_the_target_is_the_mean_over_texts_with_other_content(memorised):
    """Against the definition, one text after the other."""
    model, example = memorised.merged, as_text(memorised)
    (mine,) = predicted(model, [example])
    tokens, at = torch.tensor(example.ids[example.start :]), torch.arange(len(example.ids) - example.start)
    local = in_windows(model, example)
    content = mine[at, tokens] - local[at, tokens] > MEMORISED
    assert 0 < int(content.sum()) < len(content)
    draw, total = generator(), torch.zeros_like(mine)
    for _ in range(3):
        others = local.clone()
        others[at, tokens] = 0
        drawn = torch.multinomial(others.clamp_min(1e-12), 1, generator=draw)[:, 0]
        assert not (drawn == tokens).any()
        ids = [*example.ids[: example.start], *torch.where(content, drawn, tokens).tolist()]
        total += said(model, ids)[example.start - 1 : -1] / 3
    found = resampled(model, example, mine, generator(), texts=3)
    kept = mine[at, tokens] - total[at, tokens] <= MEMORISED
    torch.testing.assert_close(found[kept], total[kept], rtol=1e-4, atol=1e-6)
    assert (found[~kept, tokens[~kept]] < mine[~kept, tokens[~kept]] - 0.1).all()


def test_what_is_memorised_goes_and_what_the_form_gives_stays(memorised):
    for number in range(4):
        example = as_text(memorised, number)
        (mine,) = predicted(memorised.merged, [example])
        found = resampled(memorised.merged, example, mine, generator())
        at, tokens = torch.arange(len(mine)), torch.tensor(example.ids[example.start :])
        torch.testing.assert_close(found.sum(-1), torch.ones(len(found)), rtol=1e-4, atol=1e-4)
        assert (found[at, tokens] <= mine[at, tokens] + MEMORISED + 1e-6).float().mean() > 0.7
        assert torch.equal(found, resampled(memorised.merged, example, mine, generator()))


def test_a_model_without_a_memory_keeps_its_words(memorised):
    """Nothing is likelier for the whole text than for its window: the texts are the text itself."""
    (example,) = encode(memorised.tokenizer, [Row(text="Once there was a dog who lived near the mill.")])
    short = dataclasses.replace(example, ids=example.ids[:WINDOW], roles=(*example.roles[: WINDOW - 1], ANSWER))
    (mine,) = predicted(memorised.merged, [short])
    torch.testing.assert_close(resampled(memorised.merged, short, mine, generator()), mine, rtol=1e-4, atol=1e-6)
