"""What a decomposition is asked to do: one schema for model args, command flags and checkpoint config."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lm_ortho.errors import UserError

_NAMED = re.compile(r"([a-z][a-z0-9_]*):(.+)", re.DOTALL)


class Recipe(BaseModel):
    """The recorded choices of one decomposition; unknown keys are refused.

    ``density`` is the largest share of the decomposed weights that may leave the base stream; ``steps`` are those of
    the optimised edit, a tenth of which the attribution pass takes. ``prompts`` is the form in which questions are put
    to the model: plain, chat, both, or auto (both where the tokenizer has a chat template).

    The last three are for models that are large beside the memory: ``groups`` of layers whose attribution is made in a
    pass of its own, ``states`` of the optimiser in BF16, ``recompute`` of activations in the backward pass.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    density: float = Field(0.01, gt=0, le=0.5)
    sieve: str = "attribution"
    projection: str = "gptq"
    edit: str = "optimised"
    bits: int = 4
    group_size: int = 64
    targets: str = ""
    prompts: Literal["auto", "plain", "chat", "both"] = "auto"
    steps: int = Field(1000, ge=10)
    seed: int = Field(0, ge=0)
    groups: int = Field(1, ge=1)
    states: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, bits: int) -> int:
        if bits not in (3, 4, 8, 16):
            raise ValueError("must be one of 3, 4, 8, 16")
        return bits

    @field_validator("group_size")
    @classmethod
    def _positive_group(cls, group_size: int) -> int:
        if group_size < 8 or group_size % 8:
            raise ValueError("must be a positive multiple of 8")
        return group_size


def make_recipe(**values: Any) -> Recipe:
    """A checked ``Recipe``; ``UserError`` names the first bad argument, its value and the allowed range."""
    try:
        return Recipe(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{name}={first.get('input')!r}: {first['msg']}") from None


def parse_alpha(value: Any) -> float | dict[str, float]:
    """A finite float in [0, 1], or one by memory from ``name:value+name:value`` or a mapping; else ``UserError``."""
    parts = named_parts(value) if isinstance(value, str) else value if isinstance(value, Mapping) else None
    if not parts:
        return _in_range(value, "alpha")
    return {str(name): _in_range(part, f"alpha of {name}") for name, part in parts.items()}


def show_alpha(alpha: float | Mapping[str, float]) -> str:
    """``alpha`` as a model arg."""
    if isinstance(alpha, Mapping):
        return "+".join(f"{name}:{value:g}" for name, value in alpha.items())
    return f"{alpha:g}"


def named_parts(value: str) -> dict[str, str] | None:
    """``a:x+b:y`` as a mapping; None where a part has no name. Raises ``UserError`` for a name given twice."""
    pairs = [_NAMED.fullmatch(part) for part in value.split("+")]
    found = [(pair[1], pair[2]) for pair in pairs if pair and pair[1] != "hub"]
    if len(found) < len(pairs):
        return None
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise UserError(f"{value!r} names a memory twice")
    return dict(found)


def _in_range(value: Any, name: str) -> float:
    try:
        alpha = float(value)
    except (TypeError, ValueError):
        alpha = math.nan
    if not 0.0 <= alpha <= 1.0:
        raise UserError(f"{name}={value!r} must be a number between 0 (forget) and 1 (remember)")
    return alpha
