"""The report of a decomposition as plain JSON: the target distribution with its reason, and the figures reached."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lm_ortho.objective import TargetCheck, TargetChoice
from lm_ortho.pipeline.model_lattice import Lattice
from lm_ortho.projection.lattice import dequantise, expand_scales

log = logging.getLogger(__name__)

SUSPICIOUS_AUC = 0.6
"""AUC of a target distribution above which a warning is logged; at 0.5 it does not prefer true secrets to others."""


def log_target(choice: TargetChoice, check: TargetCheck, *, has_secrets: bool) -> None:
    """Logs the target distribution and why it was selected. No edit forgets more than its target does.

    Rows without secrets are compared by whole answers with answers to other questions. Every
    language model prefers the former, so the AUC is then no reason for a warning.
    """
    log.info("target %s: %s; secret PPL %.3g, AUC %.3f", choice.name, choice.reason, check.secret_ppl, check.auc)
    if choice.name == "hold_down":
        log.warning("target: %s", choice.reason)
    if check.auc > SUSPICIOUS_AUC and has_secrets:
        log.warning("target %s still prefers the true secrets (AUC %.2f; 0.5 is chance)", choice.name, check.auc)


def target_report(choice: TargetChoice, check: TargetCheck) -> dict[str, Any]:
    """The name of the target and its reason, and how strongly it prefers the true secrets to others."""
    return {
        "name": choice.name,
        "reason": choice.reason,
        "secret_ppl": round(check.secret_ppl, 3),
        "auc": None if math.isnan(check.auc) else round(check.auc, 4),
    }


def mean_steps_moved(
    weights: Mapping[str, Tensor], lattice: Lattice, support: Mapping[str, Tensor], group_size: int
) -> float:
    """Mean distance between base stream and original weight on the support, in lattice steps."""
    distances = []
    for name, weight in weights.items():
        steps = expand_scales(lattice.scales[name], group_size, weight.shape[1])
        distance = (weight - dequantise(lattice.codes[name], lattice.scales[name], group_size)).abs() / steps
        distances.append(distance[support[name]])
    all_distances = torch.cat(distances)
    return round(float(all_distances.mean()), 3) if all_distances.numel() else 0.0
