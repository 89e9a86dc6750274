"""Methods that make a model forget, ours and those of the literature, on the same material: one file per idea."""

from lm_ortho.baselines import (
    controls,
    gradient_ascent,
    kfac,
    ortho,
    preference_optimisation,
    pruning,
    rmu,
    rounding,
    task_arithmetic,
)
from lm_ortho.baselines.interface import METHODS, Budget, Material, Method, Result, Run, Settings, method
from lm_ortho.baselines.material import material_of_files, material_of_world
from lm_ortho.baselines.saving import REPORT_FILE, save
from lm_ortho.baselines.tuning import Score, Tuned, Tuning, score, split_of_rows, split_of_world, tune

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
    "Tuned",
    "Tuning",
    "material_of_files",
    "material_of_world",
    "method",
    "save",
    "score",
    "split_of_rows",
    "split_of_world",
    "tune",
]
del task_arithmetic, gradient_ascent, kfac, controls, rmu, ortho, preference_optimisation, pruning, rounding
