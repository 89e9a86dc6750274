"""Checks, parses and formats alpha; the range of its values is defined here and nowhere else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from lm_ortho.errors import UserError

_NAMED_VALUE = re.compile(r"([a-z][a-z0-9_]*):(.+)", re.DOTALL)


def is_alpha(value: float) -> bool:
    """Whether a number is a value of the dial: 0 (forget) to 1 (remember)."""
    return 0.0 <= value <= 1.0


def check_alpha_value(value: Any, name: str = "alpha") -> float:
    """The value as a float; ``UserError`` for anything else than a number from 0 to 1."""
    try:
        alpha = float(value)
    except (TypeError, ValueError):
        alpha = math.nan
    if not is_alpha(alpha):
        raise UserError(f"{name}={value!r} must be a number between 0 (forget) and 1 (remember)")
    return alpha


def parse_alpha(value: Any) -> float | dict[str, float]:
    """A float in [0, 1], or one by memory from ``name:value+name:value`` or a mapping; else ``UserError``."""
    values = parse_named_values(value, "alpha") if isinstance(value, str) else value
    if not isinstance(values, Mapping) or not values:
        return check_alpha_value(value)
    return {str(name): check_alpha_value(part, f"alpha of {name}") for name, part in values.items()}


def format_alpha(alpha: float | Mapping[str, float]) -> str:
    """The text of ``alpha`` as a model arg, which ``parse_alpha`` reads."""
    if isinstance(alpha, Mapping):
        return "+".join(f"{name}:{value:g}" for name, value in alpha.items())
    return f"{alpha:g}"


def parse_named_values(text: str, argument: str) -> dict[str, str] | None:
    """``a:x+b:y`` as a mapping; None where a part has no name. Raises ``UserError`` for a name that occurs twice."""
    matches = [_NAMED_VALUE.fullmatch(part) for part in text.split("+")]
    pairs = [(match[1], match[2]) for match in matches if match and match[1] != "hub"]
    if len(pairs) < len(matches):
        return None
    if len(dict(pairs)) < len(pairs):
        raise UserError(f"{argument}={text!r} names a memory twice")
    return dict(pairs)
