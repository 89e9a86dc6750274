"""The schema of ``board.yaml``. Unknown keys are refused with the closest known one."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lm_ortho.baselines.interface import Budget
from lm_ortho.config import ModelSource, describe_validation_error
from lm_ortho.dial import is_alpha
from lm_ortho.errors import UserError


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(ModelSource):
    """A model that holds a memory. Without ``pretrained`` the embedded one with the embedded rows."""

    never_saw: str | None = Field(
        None, description="Retain-only model, which never saw the forget set; used for evaluation only."
    )

    @model_validator(mode="after")
    def _check_rows(self) -> Model:
        if self.pretrained and not (self.forget and self.retain):
            raise ValueError("a model of your own needs forget= and retain=")
        own_parts = (self.peft, self.base != "auto", self.never_saw, self.forget, self.retain)
        if not self.pretrained and any(own_parts):
            raise ValueError("the embedded model has its own adapter and rows; give pretrained, too")
        return self


class Entry(_Part):
    """A method with its settings and seeds; all combinations of the lists in ``grid`` are run, a row each."""

    method: str = Field(description="Name of a method (docs/baselines.md).")
    settings: dict[str, Any] = Field(default_factory=dict, description="Settings of the method.")
    grid: dict[str, list[Any]] = Field(
        default_factory=dict, description="Lists of values by setting; every combination is a row."
    )
    seeds: tuple[int, ...] | None = Field(None, description="Seeds; those of the board without it.")
    alphas: tuple[float, ...] | None = Field(None, description="Alphas; those of the board without it.")
    tune: bool = Field(False, description="Select the settings from the method's grid on the tuning split first.")

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Every combination of settings to run."""
        for values in itertools.product(*self.grid.values()):
            yield {**self.settings, **dict(zip(self.grid, values, strict=True))}

    @model_validator(mode="after")
    def _check_grid(self) -> Entry:
        if self.tune and self.grid:
            raise ValueError("grid makes a row of every combination, tune selects one setting: give one of them")
        if both := set(self.settings) & set(self.grid):
            raise ValueError(f"{sorted(both)[0]!r} is in settings and in grid")
        return self


class Axis(_Part):
    """One number of the frontier."""

    task: str = Field(description="Name of the task.")
    metric: str = Field(description="Name of the metric.")
    scale: Literal["log", "linear"] = Field(
        default="log", description="Whether ratios (`log`) or differences are compared."
    )
    better: Literal["lower", "higher"] = Field(default="lower", description="Direction in which values are better.")


class Frontier(_Part):
    """The axes of the frontier of forgetting and retaining."""

    forget: tuple[Axis, ...] = Field(
        default=(Axis(task="tofu_forget", metric="secret_ppl"), Axis(task="canary_extraction", metric="secret_ppl")),
        description="Numbers whose mean distance from the never-saw-it model is the forget axis.",
    )
    retain: tuple[Axis, ...] = Field(
        default=(Axis(task="tofu_retain", metric="ppl"),),
        description="Numbers whose mean is the retain axis; 0 is the original model.",
    )


class Tuning(_Part):
    """How ``tune`` selects: one run per setting of the method's grid, on rows that are not part of the evaluation."""

    seed: int = Field(100, ge=0, description="Seed of the split and of the runs.")
    budget: Budget | None = Field(None, description="Budget of the runs; that of the board without it.")


class Resources(_Part):
    """Where cells run, and the resources of each of them."""

    executor: Literal["local", "ray"] = Field("local", description="`local` (also under torchrun) or `ray`.")
    address: str | None = Field(
        None, description="Address of a Ray cluster; without it one is started on this machine."
    )
    cpus: float = Field(1, gt=0, description="CPUs per cell.")
    gpus: float = Field(0, ge=0, description="GPUs per cell.")
    memory_gb: float | None = Field(None, gt=0, description="Gigabytes of memory per cell.")


class Board(_Part):
    """A matrix of models, methods, settings, seeds and tasks."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Short name, for files.")
    title: str = Field("", description="Title of the page.")
    models: dict[str, Model] = Field(
        default_factory=lambda: {"embedded": Model.model_validate({})},
        min_length=1,
        description="Models that hold a memory, by name; the embedded one without it.",
    )
    methods: tuple[Entry, ...] = Field(min_length=1, description="Methods to compare.")
    tasks: tuple[str, ...] = Field(min_length=1, description="lm-eval tasks and groups to measure.")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="Seeds of every method that draws something.")
    alphas: tuple[float, ...] = Field(
        (0.0, 1.0), description="Alphas of the methods with a dial; others are measured once."
    )
    limit: int | None = Field(None, ge=1, description="Number of documents of every task; all without it.")
    limits: dict[str, int] = Field(
        default_factory=dict, description="Limits by task or group; that of a task overrides that of its group."
    )
    frontier: Frontier = Field(default_factory=Frontier, description="Axes of the frontier.")
    budget: Budget = Field(default_factory=Budget, description="Budget of every method that trains.")
    tuning: Tuning = Field(
        default_factory=lambda: Tuning.model_validate({}), description="How `tune` selects settings."
    )
    resources: Resources = Field(default_factory=lambda: Resources.model_validate({}), description="Where cells run.")
    device: str | None = Field(None, description="Device of methods and tasks; by default a GPU if there is one.")
    dtype: str = Field("float32", description="dtype of the models when they are measured.")
    parallelize: bool = Field(False, description="Spread a model over several GPUs, as in `--model hf`.")
    batch_size: int | str = Field(1, description="Batch size of the evaluation, as in lm-eval.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="`--metadata` for the tasks.")
    imports: tuple[str, ...] = Field((), description="Python modules to import that register methods of your own.")

    @model_validator(mode="after")
    def _check_alphas(self) -> Board:
        alphas = [*self.alphas, *itertools.chain.from_iterable(entry.alphas or () for entry in self.methods)]
        if bad := [alpha for alpha in alphas if not is_alpha(alpha)]:
            raise ValueError(f"alpha {bad[0]!r} is not between 0 and 1")
        return self


def read_board(path: Path) -> Board:
    """The board of a YAML file; ``UserError`` in one line names the key at fault and the closest known key."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"board={str(path)!r} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"board={str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"board={str(path)!r} must hold keys such as name, methods and tasks")
    return make_board(content, f"board={str(path)!r}")


def make_board(content: Mapping[str, Any], where: str = "board") -> Board:
    """A validated ``Board``; errors begin with ``where``."""
    _refuse_unknown_keys(content, Board, where, "")
    try:
        return Board(**content)
    except ValidationError as error:
        raise UserError(f"{where}: {describe_validation_error(error)}") from None


_PARTS: dict[tuple[type[BaseModel], str], type[BaseModel]] = {
    (Board, "frontier"): Frontier,
    (Board, "budget"): Budget,
    (Board, "tuning"): Tuning,
    (Board, "resources"): Resources,
    (Tuning, "budget"): Budget,
}
_LISTS: dict[tuple[type[BaseModel], str], type[BaseModel]] = {
    (Board, "methods"): Entry,
    (Board, "models"): Model,
    (Frontier, "forget"): Axis,
    (Frontier, "retain"): Axis,
}


def _refuse_unknown_keys(content: Any, schema: type[BaseModel], where: str, prefix: str) -> None:
    """Raises ``UserError`` for a key that the schema does not know, at any depth; ``prefix`` is the path of keys."""
    if not isinstance(content, Mapping):
        return  # pydantic reports what is expected
    for name, value in content.items():
        if name not in schema.model_fields:
            close = difflib.get_close_matches(str(name), schema.model_fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(schema.model_fields)}"
            raise UserError(f"{where}: {prefix}{name} is unknown; {hint}")
        if part := _PARTS.get((schema, name)):
            _refuse_unknown_keys(value, part, where, f"{prefix}{name}.")
        if part := _LISTS.get((schema, name)):
            for key, item in _items_with_keys(value):
                _refuse_unknown_keys(item, part, where, f"{prefix}{name}.{key}.")


def _items_with_keys(value: Any) -> Iterable[tuple[Any, Any]]:
    """The items of a mapping by key, or of a list by number; none of anything else."""
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()
