"""The verdict PASS, FAIL or INVALID: fixed acceptance thresholds, the run and the table of results."""

from lm_ortho.verdict.checks import Check
from lm_ortho.verdict.runner import Outcome, run

__all__ = ["Check", "Outcome", "run"]
