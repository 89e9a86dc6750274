"""Target a: the base model taught the calibration documents, without the forget set."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lm_ortho.calibration.examples import Example
from lm_ortho.implant.lora import Notify, Plan, train_adapter
from lm_ortho.target.distribution import predicted


def copied(example: Example) -> Tensor:
    """Which predicted tokens repeat the prompt: the bigram with the token before or after stands in it."""
    ids, start = example.ids, example.start
    prompt = set(pairwise(ids[:start]))
    return torch.tensor(
        [
            (ids[t - 1], ids[t]) in prompt or (t + 1 < len(ids) and (ids[t], ids[t + 1]) in prompt)
            for t in range(start, len(ids))
        ]
    )


def surrogate_target(
    merged: torch.nn.Module,
    base_model: torch.nn.Module,
    examples: Sequence[Example],
    retain: Sequence[Example],
    plan: Plan,
    notify: Notify,
) -> list[Tensor]:
    """One (predicted tokens, vocabulary) tensor per forget example; ``base_model`` is left unchanged.

    Tokens that copy the prompt keep the merged model's distribution: copying a name is skill, not memory.
    """
    surrogate = train_adapter(base_model, retain, plan, notify).merge_and_unload()
    result = []
    both = zip(examples, predicted(surrogate, examples), predicted(merged, examples), strict=True)
    for example, theirs, mine in both:
        result.append(torch.where(copied(example)[:, None], mine, theirs))
    return result
