"""The registry of attacks: ways to bring back a memory that a model has forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lm_ortho.registry import Registry
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.verdict.measurements import Measurement

Attack = Callable[[nn.Module, Any, ProgressCallback], Measurement]
"""Takes a plain model, which stays as it is, its tokenizer and a progress callback; measures the attacked model."""
ATTACKS: Registry[Attack] = Registry("attack", "lm_ortho.attacks")
