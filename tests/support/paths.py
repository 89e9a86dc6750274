"""Where the repository and its tests are."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
"""The root of the checkout."""
TESTS = REPOSITORY / "tests"
SUPPORT = TESTS / "support"
