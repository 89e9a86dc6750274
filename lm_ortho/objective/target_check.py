"""Whether a target is one a never-saw-it model could have given: optimisation cannot do better than its target."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lm_ortho.data.encoding import Example
from lm_ortho.objective.distribution import Target

_COMPARED = 20


@dataclass(frozen=True)
class TargetCheck:
    """The target's perplexity per secret token, and how often it prefers the true secret to another row's.

    ``auc`` near 0.5: the target does not know the secrets; ``nan`` when no two rows can be compared.
    """

    secret_ppl: float
    auc: float


def check_target(target: Target, examples: Sequence[Example]) -> TargetCheck:
    """Compares each true secret with secrets of rows whose secret is as long and follows the same token."""
    losses = torch.cat(target.secret_loss())
    alike: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        places = target.secret[i].nonzero()[:, 0]
        if len(places):
            alike[example.ids[example.start + int(places[0]) - 1], len(places)].append(i)
    wins: list[float] = []
    for members in alike.values():
        for at, i in enumerate(members):
            logp = target.of(i)[target.secret[i]].clamp_min(1e-9).log()
            steps = torch.arange(len(logp))
            true = target.tokens[i][target.secret[i]]
            score = logp[steps, true].sum()
            for j in (members[(at + step) % len(members)] for step in range(1, min(_COMPARED, len(members)))):
                other = target.tokens[j][target.secret[j]]
                if not torch.equal(other, true):
                    rival = logp[steps, other].sum()
                    wins.append(float(score > rival) + 0.5 * float(score == rival))
    auc = sum(wins) / len(wins) if wins else math.nan
    return TargetCheck(secret_ppl=math.exp(min(50.0, float(losses.mean()))), auc=auc)
