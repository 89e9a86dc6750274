"""What a model that never saw the forget set would say."""

from lm_ortho.target.check import TargetCheck, check_target
from lm_ortho.target.choose import Choice, choose_target
from lm_ortho.target.distribution import Target
from lm_ortho.target.objective import DEEPER, GENTLE, Objective, Penalty, Weights
from lm_ortho.target.recall import recalled_rows

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
