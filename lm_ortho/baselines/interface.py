"""The registry of methods, and what they share: material, budget, run and result.

A method takes a model that holds a memory and returns a new model that should not hold it any more.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from lm_ortho.config import Recipe, describe_validation_error, validate
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from lm_ortho.finetune import round_to_bf16
from lm_ortho.layer import get_streams
from lm_ortho.registry import Registry
from lm_ortho.runtime.progress import ProgressCallback, no_progress
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder

Reads = Literal["merged", "base", "end"]
"""The models that a method reads beside the rows.

``merged``: the merged weights only; ``base``: also the base model (before fine-tuning); ``end``: any model, because
the method is an end of the scale and no competitor.
"""


@dataclass(frozen=True)
class Material:
    """The models and rows that a method may read and must not change.

    ``merged`` (float32 numbers that are BF16 values) holds the memory; ``base`` is the model before fine-tuning,
    ``reference`` the retain-only model. ``forget`` and ``retain`` are the rows of a calibration set. ``prompts`` are
    the keys of a recipe that decide the form of the questions (``prompts``, ``system_instruction``,
    ``chat_template_args``), for every method; without one its default applies.
    """

    tokenizer: Any
    merged: nn.Module
    forget: Sequence[Row]
    retain: Sequence[Row]
    base: nn.Module | None = None
    reference: nn.Module | None = None
    prompts: Mapping[str, Any] = field(default_factory=dict)

    def restrict(self, reads: Reads) -> Material:
        """The same material without the models that a method with this ``reads`` may not see."""
        return replace(
            self,
            base=self.base if reads == "base" else None,
            reference=self.reference if reads == "end" else None,
        )

    def to(self, device: str | torch.device) -> Material:
        """The same material with its models moved to ``device``."""
        models = {name: getattr(self, name) for name in ("merged", "base", "reference")}
        return replace(self, **{name: model.to(device) for name, model in models.items() if model is not None})


class Settings(BaseModel):
    """Base class of the settings of a method; unknown keys are refused. Descriptions go into docs/baselines.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Budget(Settings):
    """Budget of every method that trains: optimiser steps, and the batch size for each set that the method reads.

    The default goes through the embedded forget set ten times, as in the papers of NPO and SimNPO. With ``tokens`` the
    number of steps follows from what a step of the method costs, so that methods are compared at the same cost.

    Raises:
        UserError: for a number that is not a whole number from 1 on, and for both ``steps`` and ``tokens``.
    """

    steps: int | None = Field(
        400, ge=1, strict=True, description="Number of optimiser steps; null where tokens are given."
    )
    forget_rows: int = Field(16, ge=1, strict=True, description="Forget rows per step.")
    retain_rows: int = Field(16, ge=1, strict=True, description="Retain rows per step.")
    tokens: int | None = Field(
        None,
        ge=1,
        strict=True,
        description="Number of tokens through the model, in place of the steps: a forward and backward pass counts 1 "
        "per token, a forward pass alone a third.",
    )

    def __init__(self, **numbers: Any) -> None:
        try:
            super().__init__(**numbers)
        except ValidationError as error:
            raise UserError(f"{describe_validation_error(error)} (a budget has whole numbers from 1 on)") from None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_steps(cls, numbers: Any) -> Any:
        """Sets ``steps`` to None where only ``tokens`` are given; refuses both, and neither."""
        if not isinstance(numbers, Mapping):
            return numbers
        has_tokens = numbers.get("tokens") is not None
        if has_tokens and numbers.get("steps") is not None:
            raise ValueError("give steps or tokens, not both")
        if not has_tokens and numbers.get("steps", 0) is None:
            raise ValueError("give steps or tokens")
        return {**numbers, "steps": None} if has_tokens else numbers


FORWARD_SHARE = 1 / 3
"""Cost of a forward pass, as a share of a forward and backward pass: the backward pass costs twice as much."""


@dataclass
class TokenCount:
    """Tokens that a run has put through the model, in units of one token's forward and backward pass.

    A forward pass alone counts a third, a pass that ends at a block in proportion to the blocks; padding does not
    count. The count depends on rows, settings and seed only, so a resumed run has that of an uninterrupted one.
    """

    total: float = 0.0

    def add(self, tokens: float, depth: float = 1.0) -> None:
        """Adds forward and backward passes of ``tokens`` through the share ``depth`` of the blocks."""
        self.total += depth * tokens

    def add_forward(self, tokens: float, depth: float = 1.0) -> None:
        """Adds forward passes of ``tokens`` through the share ``depth`` of the blocks."""
        self.total += FORWARD_SHARE * depth * tokens


@dataclass(frozen=True)
class Run:
    """Arguments of one call of a method. ``resume`` is the folder that stores the progress of a long training.

    The method adds to ``tokens`` what it puts through the model.
    """

    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    progress: ProgressCallback = no_progress
    resume: ResumeFolder = NO_RESUME
    tokens: TokenCount = field(default_factory=TokenCount)


@dataclass(frozen=True)
class Result:
    """A new model, plain in BF16 values or patched with base and ortho streams, and a report in plain JSON.

    ``meta`` is the metadata of the checkpoint that a patched model is saved as.
    """

    model: nn.Module
    report: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_decomposed(self) -> bool:
        """Whether the model has to be saved as a checkpoint of this package."""
        return bool(get_streams(self.model))

    @property
    def has_alpha(self) -> bool:
        """Whether the model can be measured at alphas above 0."""
        return any(layer.memories for layer in get_streams(self.model).values())


MethodFunction = Callable[[Material, Any, Run], Result]


@dataclass(frozen=True)
class Method:
    """A method of the registry. ``grid`` lists the settings that are tried on the tuning split.

    ``objective`` and ``paper`` are Markdown for docs/baselines.md; ``trains`` says whether a budget applies.
    """

    name: str
    reads: Reads
    objective: str
    paper: str
    schema: type[BaseModel]
    grid: tuple[Mapping[str, Any], ...]
    trains: bool
    function: MethodFunction

    @property
    def setting_names(self) -> tuple[str, ...]:
        """The names of the settings. The seed is not among them: it belongs to the run."""
        return tuple(name for name in self.schema.model_fields if name != "seed")

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of every setting."""
        return self.check({}).model_dump(include=set(self.setting_names))

    def check(self, settings: Mapping[str, Any]) -> BaseModel:
        """The settings with defaults filled in; ``UserError`` names an unknown setting or a value out of range."""
        for name in settings:
            if name not in self.setting_names:
                close = difflib.get_close_matches(str(name), self.setting_names, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                names = f"known: {', '.join(sorted(self.setting_names))}" if self.setting_names else "it has none"
                raise UserError(f"method={self.name}: setting {name!r} is unknown; {names}.{hint}")
        try:
            return validate(self.schema, settings)
        except UserError as error:
            raise UserError(f"method={self.name}: {error}") from None

    def make(
        self,
        material: Material,
        settings: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        budget: Budget | None = None,
        progress: ProgressCallback = no_progress,
        resume: ResumeFolder = NO_RESUME,
    ) -> Result:
        """Makes a new model and leaves the material unchanged.

        Equal arguments give an equal model on the same machine. The report has the ``tokens`` that went through the
        model, counted as ``TokenCount`` says; a decomposition, whose budget is its own, does not count them.

        Raises:
            UserError: for bad settings, for material that the method needs and that is missing, and for weights that
                are not finite.
        """
        checked_settings = self.check(settings or {})
        self.require(material)
        run = Run(seed, budget or Budget(), progress, resume)
        result = self.function(material.restrict(self.reads), checked_settings, run)
        if self.schema is not Recipe:
            result = replace(result, report={**result.report, "tokens": round(run.tokens.total)})
        model = result.model.eval().requires_grad_(False)
        self._check_finite(model)
        return result if result.is_decomposed else replace(result, model=round_to_bf16(model))

    def require(self, material: Material) -> None:
        """Raises ``UserError`` for material without rows, or without a model that the method needs."""
        for name in ("forget", "retain"):
            if not getattr(material, name):
                raise UserError(f"method={self.name}: {name} holds no rows")
        if self.reads == "base" and material.base is None:
            raise UserError(f"method={self.name} reads the model before fine-tuning; give base=")
        if self.name == "never_saw" and material.reference is None:
            raise UserError("method=never_saw is a model that never saw the forget set; give reference=")

    def _check_finite(self, model: nn.Module) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in model.parameters()):
            raise UserError(f"method={self.name}: the weights are not finite; the training diverged, lower lr")


METHODS: Registry[Method] = Registry("method", "lm_ortho.methods")


def arxiv_link(number: str) -> str:
    """A Markdown link to a paper on arXiv."""
    return f"[arXiv {number}](https://arxiv.org/abs/{number})"


def method(
    name: str,
    *,
    reads: Reads = "merged",
    objective: str,
    paper: str,
    settings: type[BaseModel] = Settings,
    grid: Sequence[Mapping[str, Any]] = ({},),
    trains: bool = False,
) -> Callable[[MethodFunction], MethodFunction]:
    """Decorator that registers the function as method ``name``. Every setting of the ``grid`` is checked here."""

    def add(function: MethodFunction) -> MethodFunction:
        entry = Method(
            name=name,
            reads=reads,
            objective=objective,
            paper=paper,
            schema=settings,
            grid=tuple(grid),
            trains=trains,
            function=function,
        )
        for grid_point in entry.grid:
            entry.check(grid_point)
        METHODS.register(name)(entry)
        return function

    return add
