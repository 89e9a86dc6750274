"""The registry of methods: how a model that holds a memory becomes one that should not."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from lm_ortho.config import validate
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from lm_ortho.finetune import round_to_bf16
from lm_ortho.layer import get_streams
from lm_ortho.registry import Registry
from lm_ortho.runtime.progress import ProgressCallback, no_progress
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder

Reads = Literal["merged", "base", "end"]
"""Besides the rows: the merged weights; also the model before fine-tuning; ends of the scale may look at anything."""


@dataclass(frozen=True)
class Material:
    """What a method may read, and must not change.

    ``merged`` (float32 numbers that are BF16 values) holds the memory; ``base`` is the model before fine-tuning,
    ``reference`` one that never saw the forget set. ``forget`` and ``retain`` are the rows of a calibration.
    """

    tokenizer: Any
    merged: nn.Module
    forget: Sequence[Row]
    retain: Sequence[Row]
    base: nn.Module | None = None
    reference: nn.Module | None = None

    def seen_by(self, reads: Reads) -> Material:
        """The same without the models that are none of the method's business."""
        return replace(
            self,
            base=self.base if reads == "base" else None,
            reference=self.reference if reads == "end" else None,
        )

    def to(self, device: str | torch.device) -> Material:
        """The same with its models, which are moved, on ``device``."""
        moved = {name: getattr(self, name) for name in ("merged", "base", "reference")}
        return replace(self, **{name: model.to(device) for name, model in moved.items() if model is not None})


@dataclass(frozen=True)
class Budget:
    """What every method that trains is given: steps, and the rows of each set that a step takes of those it reads.

    The default goes through the embedded forget set ten times, as in the papers of NPO and SimNPO.
    """

    steps: int = 400
    forget_rows: int = 16
    retain_rows: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"budget: {name}={value!r} must be a whole number from 1 on")


@dataclass(frozen=True)
class Run:
    """One call of a method. ``resume`` takes what a long training has reached."""

    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    progress: ProgressCallback = no_progress
    resume: ResumeFolder = NO_RESUME


@dataclass(frozen=True)
class Result:
    """A new model, whole in BF16 values or patched with streams of ours, and what its method has to tell in plain JSON.

    ``meta`` is what a checkpoint of a patched model says about how it was made.
    """

    model: nn.Module
    report: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decomposed(self) -> bool:
        """Whether it has to be saved as a checkpoint of ours."""
        return bool(get_streams(self.model))

    @property
    def dial(self) -> bool:
        """Whether it can be measured at alphas above 0."""
        return any(layer.memories for layer in get_streams(self.model).values())


class Settings(BaseModel):
    """The choices of one method; unknown keys are refused. The descriptions go into docs/baselines.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Make = Callable[[Material, Any, Run], Result]


@dataclass(frozen=True)
class Method:
    """A method of the registry. ``grid`` are the settings that are tried on the tuning split.

    ``objective`` and ``paper`` are Markdown for docs/baselines.md; ``trains`` says whether a budget applies.
    """

    name: str
    reads: Reads
    objective: str
    paper: str
    schema: type[BaseModel]
    grid: tuple[Mapping[str, Any], ...]
    trains: bool
    function: Make

    @property
    def known(self) -> tuple[str, ...]:
        """The names of the settings. A seed is not among them: it goes with the run."""
        return tuple(name for name in self.schema.model_fields if name != "seed")

    @property
    def defaults(self) -> dict[str, Any]:
        """Every setting as it is without being named."""
        return self.check({}).model_dump(include=set(self.known))

    def check(self, settings: Mapping[str, Any]) -> BaseModel:
        """The settings with defaults filled in; ``UserError`` names an unknown one, or a value that is not allowed."""
        for name in settings:
            if name not in self.known:
                close = difflib.get_close_matches(str(name), self.known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                known = f"known: {', '.join(sorted(self.known))}" if self.known else "it has none"
                raise UserError(f"method={self.name}: setting {name!r} is unknown; {known}.{hint}")
        try:
            return validate(self.schema, settings)
        except UserError as error:
            raise UserError(f"method={self.name}: {error}") from None

    def make(
        self,
        material: Material,
        settings: Mapping[str, Any] | None = None,
        seed: int = 0,
        budget: Budget | None = None,
        progress: ProgressCallback = no_progress,
        resume: ResumeFolder = NO_RESUME,
    ) -> Result:
        """A new model; the material is as before. The same arguments give the same model on the same machine.

        Raises:
            UserError: for bad settings, material that the method needs and that is not there, and weights that are no
                numbers any more.
        """
        asked = self.check(settings or {})
        self.require(material)
        given = material.seen_by(self.reads)
        made = self.function(given, asked, Run(seed, budget or Budget(), progress, resume))
        model = made.model.eval().requires_grad_(False)
        self._check_finite(model)
        return made if made.decomposed else replace(made, model=round_to_bf16(model))

    def require(self, material: Material) -> None:
        """Raises ``UserError`` for material without rows, or without a model that the method is about."""
        for name in ("forget", "retain"):
            if not getattr(material, name):
                raise UserError(f"method={self.name}: {name} holds no rows")
        if self.reads == "base" and material.base is None:
            raise UserError(f"method={self.name} reads the model before fine-tuning; give base=")
        if self.name == "never_saw" and material.reference is None:
            raise UserError("method=never_saw is a model that never saw the forget set; give reference=")

    def _check_finite(self, model: nn.Module) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in model.parameters()):
            raise UserError(f"method={self.name}: the weights are no numbers any more; it went too far, lower lr")


METHODS: Registry[Method] = Registry("method")


def arxiv(number: str) -> str:
    """A link to a paper, in Markdown."""
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
) -> Callable[[Make], Make]:
    """Decorator that registers the function as ``name``. Every setting of the ``grid`` is checked here."""

    def add(function: Make) -> Make:
        made = Method(name, reads, objective, paper, settings, tuple(grid), trains, function)
        for tried in made.grid:
            made.check(tried)
        METHODS.register(name)(made)
        return function

    return add
