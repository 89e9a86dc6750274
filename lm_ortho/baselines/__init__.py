"""Methods that make a model forget, this package's and those of the literature, on the same material.

One file per idea; each file registers its methods in ``METHODS``.
"""

from lm_ortho.baselines import (
    alternate_answers,
    controls,
    gradient_ascent,
    kfac,
    ortho,
    preference_optimisation,
    pruning,
    repselect,
    rmu,
    rounding,
    task_arithmetic,
    undial,
)
from lm_ortho.baselines.interface import METHODS, Budget, Material, Method, Result, Run, Settings, method
from lm_ortho.baselines.material import material_from_files, material_from_world
from lm_ortho.baselines.saving import REPORT_FILE, save
from lm_ortho.baselines.tuning import Score, TuningResult, TuningSplit, score_result, split_rows, split_world, tune

__all__ = [
    "METHODS",
    "REPORT_FILE",
    "Budget",
    "Material",
    "Method",
    "Result",
    "Run",
    "Score",
    "Settings",
    "TuningResult",
    "TuningSplit",
    "material_from_files",
    "material_from_world",
    "method",
    "save",
    "score_result",
    "split_rows",
    "split_world",
    "tune",
]
del task_arithmetic, gradient_ascent, kfac, controls, rmu, ortho, preference_optimisation, pruning, rounding
del alternate_answers, repselect, undial
