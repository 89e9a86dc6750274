"""PASS, FAIL or INVALID: fixed bars, the run, the table."""

from lm_ortho.verdict.checks import Check
from lm_ortho.verdict.runner import Outcome, run

__all__ = ["Check", "Outcome", "run"]
