"""Checks how much a target knows about the secrets: optimisation cannot do better than its target."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lm_ortho.data.encoding import Example
from lm_ortho.objective.distribution import Target

_MAX_RIVALS = 20
"""Rows of one kind that a row is compared with, itself included."""


@dataclass(frozen=True)
class TargetCheck:
    """The perplexity of the target per secret token, and how often it prefers the true secret to that of another row.

    ``auc`` near 0.5 means that the target does not know the secrets; it is NaN when no two rows can be compared.
    """

    secret_ppl: float
    auc: float


def check_target(target: Target, examples: Sequence[Example]) -> TargetCheck:
    """Compares each true secret with those of rows whose secret is as long and follows the same token."""
    # 1. Group the rows by the token before the secret and by its length.
    groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        positions = target.secret[i].nonzero()[:, 0]
        if len(positions):
            groups[example.ids[example.start + int(positions[0]) - 1], len(positions)].append(i)
    # 2. Compare the log-probability of every true secret with that of its rivals; a tie counts half.
    wins: list[float] = []
    for members in groups.values():
        for number, i in enumerate(members):
            logp = target.distribution(i)[target.secret[i]].clamp_min(1e-9).log()
            at = torch.arange(len(logp))
            true = target.tokens[i][target.secret[i]]
            score = logp[at, true].sum()
            offsets = range(1, min(_MAX_RIVALS, len(members)))
            for j in (members[(number + offset) % len(members)] for offset in offsets):
                rival = target.tokens[j][target.secret[j]]
                if not torch.equal(rival, true):
                    rival_score = logp[at, rival].sum()
                    wins.append(float(score > rival_score) + 0.5 * float(score == rival_score))
    auc = sum(wins) / len(wins) if wins else math.nan
    losses = torch.cat(target.secret_loss())
    return TargetCheck(secret_ppl=math.exp(min(50.0, float(losses.mean()))), auc=auc)
