"""Target c, for plain text: predictions after texts of the same form in which all memorised content is resampled."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_ortho.data.encoding import ANSWER, CONTEXT, Example
from lm_ortho.objective.distribution import MEMORISED_MARGIN, hold_down, predict_distributions, predict_tokens

WINDOW, TEXTS = 8, 12
"""Number of preceding tokens that define the form, and number of resampled texts."""


def predict_in_windows(model: torch.nn.Module, example: Example) -> Tensor:
    """Predictions (predicted tokens, vocabulary) of ``model`` from the last ``WINDOW`` tokens alone."""
    windows = []
    for t in range(example.start, len(example.ids)):
        context = example.ids[max(0, t - WINDOW) : t]
        windows.append(Example((*context, example.ids[t]), (*(CONTEXT for _ in context), ANSWER)))
    return torch.cat(predict_distributions(model, windows))


@torch.no_grad()
def resample_target(
    model: torch.nn.Module, example: Example, own_probs: Tensor, draw: torch.Generator, texts: int = TEXTS
) -> Tensor:
    """Target distributions (predicted tokens, vocabulary) of one text; ``own_probs`` are the model's own.

    A token counts as content if the whole text makes it more than 0.15 likelier than the last eight tokens alone do:
    a memory predicts it, the form does not.
    """
    tokens = torch.tensor(example.ids[example.start :])
    # 1. Find the content: tokens that the model predicts from the whole text and not from the last eight tokens.
    at, window_probs = torch.arange(len(tokens)), predict_in_windows(model, example)
    is_content = own_probs[at, tokens] - window_probs[at, tokens] > MEMORISED_MARGIN
    # 2. Resample all content from the predictions in the window, never the true token, so no text recalls the memory.
    content_probs = window_probs.clone()
    content_probs[at, tokens] = 0.0
    content_probs = content_probs.clamp_min(1e-12)
    resampled_texts = []
    for _ in range(texts):
        samples = torch.multinomial(content_probs, 1, generator=draw)[:, 0]
        ids = (*example.ids[: example.start], *torch.where(is_content, samples, tokens).tolist())
        resampled_texts.append(Example(ids, example.roles))
    # 3. Average the model's predictions at the same position of these texts.
    total, positions = torch.zeros_like(own_probs), range(example.start, len(example.ids))
    for _, probs in predict_tokens(model, resampled_texts, [positions] * texts):
        total += probs
    mean = total / texts
    # 4. Hold down the tokens that the model still prefers by more than 0.15.
    return hold_down(mean, tokens, own_probs[at, tokens] - mean[at, tokens] > MEMORISED_MARGIN)
