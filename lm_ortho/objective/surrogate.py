"""Target a, the surrogate: the base model fine-tuned on the retain rows, without the forget set."""

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
from lm_ortho.finetune.merge import merge_peft_model
from lm_ortho.finetune.merge_check import first_ids
from lm_ortho.finetune.train import FinetunePlan
from lm_ortho.objective.distribution import predict_distributions
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder

log = logging.getLogger(__name__)

STEPS, ROUNDS = 400, 5
"""Steps of one round of fine-tuning, and maximal number of rounds."""
LOSS_TOLERANCE = 0.1
"""Nats per token by which the loss of the surrogate on the retain rows may exceed that of the merged model."""


def find_copied_tokens(example: Example) -> Tensor:
    """Boolean mask (predicted tokens,) of tokens that copy the prompt.

    The bigram of such a token with the token before or after it occurs in the prompt.
    """
    ids, start = example.ids, example.start
    prompt_bigrams = set(pairwise(ids[:start]))

    def is_copied(t: int) -> bool:
        with_previous = (ids[t - 1], ids[t]) in prompt_bigrams
        return with_previous or (t + 1 < len(ids) and (ids[t], ids[t + 1]) in prompt_bigrams)

    return torch.tensor([is_copied(t) for t in range(start, len(ids))])


def surrogate_target(
    merged_model: torch.nn.Module,
    base_model: torch.nn.Module,
    examples: Sequence[Example],
    *,
    retain: Sequence[Example],
    seed: int,
    progress: ProgressCallback,
    resume: ResumeFolder = NO_RESUME,
) -> list[Tensor]:
    """Target distributions (predicted tokens, vocabulary) of the forget ``examples``; ``base_model`` is unchanged.

    The vocabulary of the surrogate may be shorter or longer than that of the merged model, by a padding token or by
    rows that fill up a matrix.
    """
    # 1. Fine-tune a LoRA adapter on the retain rows, round by round, until its loss on them is within the tolerance.
    max_loss = mean_loss(merged_model, retain) + LOSS_TOLERANCE
    model: Any = base_model
    for number in range(ROUNDS):
        plan = FinetunePlan(steps=STEPS, rows=16, lr=2e-3, seed=seed + number)
        state = resume.path(f"surrogate-{number + 1}")
        model = train_adapter(model, retain, plan, progress, stage=f"surrogate {number + 1}", state=state)
        loss = mean_loss(model, retain)
        log.info("surrogate: loss on the retain rows %.3f, acceptance threshold %.3f", loss, max_loss)
        if loss <= max_loss:
            break
    surrogate = merge_peft_model(model, first_ids(retain), "base: the surrogate").model
    # 2. Predict the forget rows with both models.
    surrogate_probs = predict_distributions(surrogate, examples)
    merged_probs = predict_distributions(merged_model, examples)
    # 3. Use the surrogate, except on tokens that copy the prompt: copying a name is skill, not memory.
    targets = []
    for example, probs, own_probs in zip(examples, surrogate_probs, merged_probs, strict=True):
        probs = _resize_vocabulary(probs, own_probs.shape[1])
        targets.append(torch.where(find_copied_tokens(example)[:, None], own_probs, probs))
    return targets


def _resize_vocabulary(probs: Tensor, vocabulary: int) -> Tensor:
    """Distributions (tokens, vocabulary) over another number of tokens; those over fewer are renormalised."""
    if probs.shape[1] == vocabulary:
        return probs
    padded_probs = functional.pad(probs[:, :vocabulary], (0, max(0, vocabulary - probs.shape[1])))
    return padded_probs / padded_probs.sum(-1, keepdim=True)
