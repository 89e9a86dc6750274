"""What a model that never saw the forget set would say."""

from lm_ortho.objective.distribution import Target
from lm_ortho.objective.loss import DEEPER, GENTLE, Objective, Penalty, Weights
from lm_ortho.objective.rehearsal import recalled_rows
from lm_ortho.objective.select import Choice, choose_target
from lm_ortho.objective.target_check import TargetCheck, check_target

__all__ = [
    "DEEPER",
    "GENTLE",
    "Choice",
    "Objective",
    "Penalty",
    "Target",
    "TargetCheck",
    "Weights",
    "check_target",
    "choose_target",
    "recalled_rows",
]
