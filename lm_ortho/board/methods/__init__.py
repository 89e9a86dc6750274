"""Methods that make a model forget, ours and those of the literature, on the same material: one file per idea."""

from lm_ortho.board.methods import (
    arithmetic,
    ascent,
    curvature,
    ends,
    misdirection,
    ours,
    preference,
    pruning,
    rounding,
)
from lm_ortho.board.methods.base import METHODS, Budget, Material, Method, Result, Run, Settings, method
from lm_ortho.board.methods.material import material_of_files, material_of_world
from lm_ortho.board.methods.tuning import Score, Tuned, Tuning, score, split_of_rows, split_of_world, tune
from lm_ortho.board.methods.writing import REPORT_FILE, save

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
del arithmetic, ascent, curvature, ends, misdirection, ours, preference, pruning, rounding
