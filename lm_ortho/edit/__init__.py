"""Edits choose the codes of the base stream on the support."""

from lm_ortho.edit import fixed as _fixed
from lm_ortho.edit import optimised as _optimised
from lm_ortho.edit.interface import EDITS, Edit, EditInput

__all__ = ["EDITS", "Edit", "EditInput"]
del _fixed, _optimised
