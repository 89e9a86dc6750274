"""Target c for plain text: memorised words exchanged for others that fit, averaged over the merged model's words."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_ortho.data.encoding import ANSWER, CONTEXT, Example
from lm_ortho.objective.distribution import MEMORISED, hold_down, predicted

WINDOW, TEXTS = 8, 12
"""Tokens that say what fits in a place, and the texts that are made."""


def in_windows(model: torch.nn.Module, example: Example) -> Tensor:
    """(predicted tokens, vocabulary) What ``model`` says when it is shown the last ``WINDOW`` tokens alone."""
    cut = []
    for t in range(example.start, len(example.ids)):
        shown = example.ids[max(0, t - WINDOW) : t]
        cut.append(Example((*shown, example.ids[t]), (*(CONTEXT for _ in shown), ANSWER)))
    return torch.cat(predicted(model, cut))


@torch.no_grad()
def resampled(
    model: torch.nn.Module, example: Example, mine: Tensor, draw: torch.Generator, texts: int = TEXTS
) -> Tensor:
    """(predicted tokens, vocabulary) What ``model`` would say after texts of the same form with other content.

    A token counts as content if the whole text makes it more than 0.15 likelier than the last eight tokens alone
    do: a memory knows it, the form does not. Each text has all of these drawn anew from what fits after those
    eight, so none leads back into the memory. Where the model's own words (``mine``) prefer the true token by more
    than 0.15 over the mean of the predictions, it is held down to the level of the others.
    """
    tokens = torch.tensor(example.ids[example.start :])
    at, local = torch.arange(len(tokens)), in_windows(model, example)
    content = mine[at, tokens] - local[at, tokens] > MEMORISED
    others = local.clone()
    others[at, tokens] = 0.0
    others = others.clamp_min(1e-12)
    made = []
    for _ in range(texts):
        drawn = torch.multinomial(others, 1, generator=draw)[:, 0]
        ids = (*example.ids[: example.start], *torch.where(content, drawn, tokens).tolist())
        made.append(Example(ids, example.roles))
    mean = torch.stack(predicted(model, made)).mean(0)
    return hold_down(mean, tokens, mine[at, tokens] - mean[at, tokens] > MEMORISED)
