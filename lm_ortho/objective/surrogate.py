"""Target a: the base model taught the calibration documents, without the forget set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lm_ortho.data.encoding import Example, mean_loss
from lm_ortho.finetune.lora import train_adapter
from lm_ortho.finetune.train import FinetunePlan
from lm_ortho.objective.distribution import predicted
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder

log = logging.getLogger(__name__)

STEPS, ROUNDS = 400, 5
NEAR = 0.1
"""Nats per token that the surrogate may stay behind the merged model on the retain documents."""


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
    seed: int,
    progress: ProgressCallback,
    resume: ResumeFolder = NO_RESUME,
) -> list[Tensor]:
    """One (predicted tokens, vocabulary) tensor per forget example; ``base_model`` is left unchanged.

    The surrogate is taught until it knows the retain documents about as well as the merged model does, or for
    ``ROUNDS``. Its vocabulary may be shorter or longer than the merged model's, by a padding token or rows that fill up
    a matrix. Tokens that copy the prompt keep the merged model's distribution: copying a name is skill, not memory.
    """
    wanted = mean_loss(merged, retain) + NEAR
    adapted: Any = base_model
    for number in range(ROUNDS):
        plan = FinetunePlan(steps=STEPS, rows=16, lr=2e-3, seed=seed + number)
        state = resume.path(f"surrogate-{number + 1}")
        adapted = train_adapter(adapted, retain, plan, progress, f"surrogate {number + 1}", state)
        reached = mean_loss(adapted, retain)
        log.info("surrogate: loss on retain documents %.3f, wanted %.3f", reached, wanted)
        if reached <= wanted:
            break
    surrogate = adapted.merge_and_unload()
    result = []
    both = zip(examples, predicted(surrogate, examples), predicted(merged, examples), strict=True)
    for example, theirs, mine in both:
        result.append(torch.where(copied(example)[:, None], mine, _as_wide(theirs, mine.shape[1])))
    return result


def _as_wide(probs: Tensor, vocabulary: int) -> Tensor:
    """(tokens, vocabulary) of distributions over another number of tokens; what is cut off goes to the others."""
    if probs.shape[1] == vocabulary:
        return probs
    kept = functional.pad(probs[:, :vocabulary], (0, max(0, vocabulary - probs.shape[1])))
    return kept / kept.sum(-1, keepdim=True)
