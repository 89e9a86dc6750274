"""What a decomposition or a fine-tune is asked to do: one schema each for model args, command flags and records."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lm_ortho.errors import UserError

_NAMED = re.compile(r"([a-z][a-z0-9_]*):(.+)", re.DOTALL)


class Recipe(BaseModel):
    """The recorded choices of one decomposition; unknown keys are refused.

    The descriptions are the help of the command line's options. The last three are for models that are large beside the
    memory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    density: float = Field(
        0.01, gt=0, le=0.5, description="Largest share of the decomposed weights that may leave the base stream."
    )
    sieve: str = Field("attribution", description="How the weights that leave the base stream are picked.")
    projection: str = Field("gptq", description="How the other weights are rounded to the lattice.")
    edit: str = Field("optimised", description="What the base stream holds in place of the weights that left it.")
    bits: int = Field(4, description="Width of the base stream: 3, 4 or 8, or 16 for no lattice.")
    group_size: int = Field(64, description="Weights of a row that share a scale, a multiple of 8.")
    targets: str = Field(
        "", description="`+`-separated globs of layer names; all linear layers but the LM head without it."
    )
    prompts: Literal["auto", "plain", "chat", "both"] = Field(
        "auto", description="Form of the questions; auto: both where the tokenizer has a chat template, else plain."
    )
    recall: bool = Field(
        False, description="Look for further subjects that the model knows, and keep what it says of them."
    )
    steps: int = Field(
        1000, ge=10, description="Steps of the optimised edit; the attribution pass takes a tenth as many."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Of everything that is drawn.")
    groups: int = Field(1, ge=1, description="Parts of the model that go through the attribution one after the other.")
    states: Literal["float32", "bfloat16"] = Field("float32", description="Precision of the attribution's optimiser.")
    recompute: bool = Field(
        False, description="Compute activations again in the backward pass instead of keeping them."
    )

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


class Training(BaseModel):
    """The choices of one fine-tune that plants a memory; None is decided by model and data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["lora", "full"] = Field("lora", description="`lora` (an adapter, merged) or `full` (all weights).")
    rank: int = Field(32, ge=1, description="Of the adapter.")
    lr: float | None = Field(
        None, gt=0, lt=1, description="Learning rate at its peak; without it one that suits method and width."
    )
    steps: int | None = Field(None, ge=1, description="Without it as many as --epochs take, 200 at least.")
    epochs: float | None = Field(None, gt=0, description="Passes over the rows; 20 without --steps.")
    batch_rows: int = Field(16, ge=1, description="Rows in a step.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of the adapter's start and of the order of the rows.")


Schema = TypeVar("Schema", bound=BaseModel)


def make_recipe(**values: Any) -> Recipe:
    """A checked ``Recipe``; ``UserError`` names the first bad argument, its value and the allowed range."""
    return validate(Recipe, values)


def make_training(**values: Any) -> Training:
    """A checked ``Training``; ``UserError`` as for a recipe, and for both ``steps`` and ``epochs``."""
    training = validate(Training, values)
    if training.steps and training.epochs:
        raise UserError(f"steps={training.steps} and epochs={training.epochs:g}: give one of them")
    return training


def validate(schema: type[Schema], values: Mapping[str, Any]) -> Schema:
    """``values`` as ``schema`` has them; ``UserError`` names the first bad one, what was given and what is allowed."""
    try:
        return schema(**values)
    except ValidationError as error:
        raise UserError(describe_validation_error(error)) from None


def describe_validation_error(error: ValidationError) -> str:
    """The first value that a schema refused, in one line: its key, what was given, what is allowed."""
    first = error.errors()[0]
    name, told = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{name} is missing"
    given = first["input"]
    if first["type"] == "value_error" and isinstance(given, Mapping):  # a check of ours over several keys
        return f"{name}: {told}" if name else told
    shown = repr(given) if isinstance(given, str) else reprlib.repr(given)
    return f"{name}={shown}: {told}"


def parse_alpha(value: Any) -> float | dict[str, float]:
    """A finite float in [0, 1], or one by memory from ``name:value+name:value`` or a mapping; else ``UserError``."""
    parts = (
        parse_named_values(value, "alpha") if isinstance(value, str) else value if isinstance(value, Mapping) else None
    )
    if not parts:
        return _in_range(value, "alpha")
    return {str(name): _in_range(part, f"alpha of {name}") for name, part in parts.items()}


def format_alpha(alpha: float | Mapping[str, float]) -> str:
    """``alpha`` as a model arg."""
    if isinstance(alpha, Mapping):
        return "+".join(f"{name}:{value:g}" for name, value in alpha.items())
    return f"{alpha:g}"


def parse_named_values(value: str, argument: str) -> dict[str, str] | None:
    """``a:x+b:y`` as a mapping; None where a part has no name. Raises ``UserError`` for a name given twice."""
    pairs = [_NAMED.fullmatch(part) for part in value.split("+")]
    found = [(pair[1], pair[2]) for pair in pairs if pair and pair[1] != "hub"]
    if len(found) < len(pairs):
        return None
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise UserError(f"{argument}={value!r} names a memory twice")
    return dict(found)


def format_model_args(args: Mapping[str, Any]) -> str:
    """Model args as lm-eval takes them: ``name=value`` with commas, or JSON where a value has a mark of its own."""
    told = {name: f"{value:g}" if isinstance(value, float) else value for name, value in args.items()}
    plain = not any(mark in str(value) for value in told.values() for mark in ',={"')
    return ",".join(f"{name}={value}" for name, value in told.items()) if plain else json.dumps(told)


def _in_range(value: Any, name: str) -> float:
    try:
        alpha = float(value)
    except (TypeError, ValueError):
        alpha = math.nan
    if not 0.0 <= alpha <= 1.0:
        raise UserError(f"{name}={value!r} must be a number between 0 (forget) and 1 (remember)")
    return alpha
