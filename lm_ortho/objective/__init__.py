"""Target distributions, the answers of a model that never saw the forget set, and the loss that leads to them."""

from lm_ortho.objective.distribution import Target
from lm_ortho.objective.loss import DEEPER, GENTLE, LossWeights, Objective, Penalty
from lm_ortho.objective.rehearsal import find_rehearsal_rows
from lm_ortho.objective.select import TargetChoice, select_target
from lm_ortho.objective.target_check import TargetCheck, check_target

__all__ = [
    "DEEPER",
    "GENTLE",
    "LossWeights",
    "Objective",
    "Penalty",
    "Target",
    "TargetCheck",
    "TargetChoice",
    "check_target",
    "find_rehearsal_rows",
    "select_target",
]
