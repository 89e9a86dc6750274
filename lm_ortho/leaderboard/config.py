"""The schema of ``board.yaml``. Unknown keys are refused with the closest known one."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    field_validator,
    model_validator,
)

from lm_ortho.baselines.interface import Budget
from lm_ortho.config import (
    ModelSource,
    PromptForm,
    check_template_args,
    describe_validation_error,
    refuse_truth_value,
)
from lm_ortho.dial import is_alpha
from lm_ortho.errors import UserError, printable
from lm_ortho.leaderboard.plain_yaml import read_plain_yaml
from lm_ortho.runtime.device import choose_dtype, is_batch_size

MAX_CELLS = 10_000
"""Number of models that a board may ask for."""
_Number = Annotated[float, BeforeValidator(refuse_truth_value)]
_Count = Annotated[int, BeforeValidator(refuse_truth_value), Field(ge=1, lt=2**31)]
_Seed = Annotated[int, BeforeValidator(refuse_truth_value), Field(ge=0, lt=2**32)]
_Name = Annotated[str, Field(min_length=1, max_length=200)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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

    method: str = Field(
        pattern="^[a-z][a-z0-9_]*$", max_length=100, description="Name of a method (docs/baselines.md)."
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="Settings of the method.")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict, description="Lists of values by setting; every combination is a row."
    )
    seeds: tuple[_Seed, ...] | None = Field(None, min_length=1, description="Seeds; those of the board without it.")
    alphas: tuple[_Number, ...] | None = Field(None, min_length=1, description="Alphas; those of the board without it.")
    tune: bool = Field(False, description="Select the settings from the method's grid on the tuning split first.")

    @property
    def n_combinations(self) -> int:
        """The number of combinations of settings, which are not made for it."""
        return math.prod(len(values) for values in self.grid.values())

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

    task: _Name = Field(description="Name of the task.")
    metric: _Name = Field(description="Name of the metric.")
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

    seed: _Seed = Field(100, description="Seed of the split and of the runs.")
    budget: Budget | None = Field(None, description="Budget of the runs; that of the board without it.")


class Resources(_Part):
    """Where cells run, and the resources of each of them."""

    executor: Literal["local", "ray"] = Field("local", description="`local` (also under torchrun) or `ray`.")
    address: str | None = Field(
        None, description="Address of a Ray cluster; without it one is started on this machine."
    )
    cpus: _Number = Field(1, gt=0, description="CPUs per cell.")
    gpus: _Number = Field(0, ge=0, description="GPUs per cell.")
    memory_gb: _Number | None = Field(None, gt=0, description="Gigabytes of memory per cell.")


class Board(_Part):
    """A matrix of models, methods, settings, seeds and tasks."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=100, description="Short name, for files.")
    title: str = Field("", description="Title of the page.")
    models: dict[_Name, Model] = Field(
        default_factory=lambda: {"embedded": Model.model_validate({})},
        min_length=1,
        description="Models that hold a memory, by name; the embedded one without it.",
    )
    methods: tuple[Entry, ...] = Field(min_length=1, description="Methods to compare.")
    tasks: tuple[_Name, ...] = Field(min_length=1, description="lm-eval tasks and groups to measure.")
    seeds: tuple[_Seed, ...] = Field((0,), min_length=1, description="Seeds of every method that draws something.")
    alphas: tuple[_Number, ...] = Field(
        (0.0, 1.0), min_length=1, description="Alphas of the methods with a dial; others are measured once."
    )
    limit: _Count | None = Field(None, description="Number of documents of every task; all without it.")
    limits: dict[_Name, _Count] = Field(
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
    batch_size: _Count | str = Field(1, description="Batch size of the evaluation, as in lm-eval.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="`--metadata` for the tasks.")
    apply_chat_template: StrictBool | _Name = Field(
        False, description="Ask in the chat template of the tokenizer, or in the one of this name."
    )
    system_instruction: str | None = Field(
        None, max_length=10_000, description="Message of the system before the question of a chat."
    )
    chat_template_args: dict[str, Any] = Field(
        default_factory=dict, description="Variables of the chat template such as `date_string`."
    )
    prompts: PromptForm = Field(
        "auto", description="Form of the questions that models are made with, as the model arg of this name."
    )
    imports: tuple[str, ...] = Field((), description="Python modules to import that register methods of your own.")

    @field_validator("batch_size", mode="after")
    @classmethod
    def _check_batch_size(cls, batch_size: int | str) -> int | str:
        if not is_batch_size(batch_size):
            raise ValueError("must be a whole number from 1 on, auto, or auto:N")
        return batch_size

    @field_validator("chat_template_args", mode="before")
    @classmethod
    def _check_template_args(cls, arguments: Any) -> Any:
        return check_template_args(arguments)

    @model_validator(mode="after")
    def _check_chat(self) -> Board:
        for name in ("system_instruction", "chat_template_args"):
            if getattr(self, name) and not self.apply_chat_template:
                raise ValueError(f"{name} needs apply_chat_template: true")
        if self.system_instruction and self.prompts == "plain":
            raise ValueError("prompts: plain would make models without the system_instruction; use chat, both or auto")
        return self

    @property
    def template_args(self) -> dict[str, Any]:
        """The variables of the chat template; transformers takes the name of a template among them."""
        name = {"chat_template": self.apply_chat_template} if isinstance(self.apply_chat_template, str) else {}
        return {**self.chat_template_args, **name}

    @property
    def chat(self) -> dict[str, Any]:
        """How the tasks ask, as lm-eval names it; {} without a chat template."""
        if not self.apply_chat_template:
            return {}
        names = ("apply_chat_template", "system_instruction", "chat_template_args")
        return {name: value for name in names if (value := getattr(self, name))}

    @property
    def recipe_keys(self) -> dict[str, Any]:
        """The keys of a recipe that render the rows of every method as the tasks ask; {} at the defaults."""
        keys = {
            "prompts": "" if self.prompts == "auto" else self.prompts,
            "system_instruction": self.system_instruction,
            "chat_template_args": self.template_args,
        }
        return {name: value for name, value in keys.items() if value}

    @field_validator("dtype", mode="after")
    @classmethod
    def _check_dtype(cls, dtype: str) -> str:
        choose_dtype(dtype, "cpu", torch.float32)
        return dtype

    @field_validator("imports", mode="after")
    @classmethod
    def _check_imports(cls, imports: tuple[str, ...]) -> tuple[str, ...]:
        if bad := [name for name in imports if not all(part.isidentifier() for part in name.split("."))]:
            raise ValueError(f"{printable(bad[0], 80)!r} is not the name of a Python module, such as package.module")
        return imports

    @model_validator(mode="after")
    def _check_names(self) -> Board:
        texts = [*self.models, *self.tasks, *self.limits]
        if bad := [text for text in texts if not text.isprintable() or text != text.strip()]:
            raise ValueError(
                f"the name {printable(bad[0], 80)!r} of a model or task has odd characters or outer spaces"
            )
        return self

    @model_validator(mode="after")
    def _check_size(self) -> Board:
        """Refuses a grid that would never end, before anybody makes its combinations."""
        per_model = sum(entry.n_combinations * len(entry.seeds or self.seeds) for entry in self.methods)
        if (cells := per_model * len(self.models)) > MAX_CELLS:
            number = f"{cells:,}" if cells < 10**9 else "more than a billion"
            raise ValueError(f"models, methods, grids and seeds make {number} cells; a board has at most {MAX_CELLS:,}")
        return self

    @model_validator(mode="after")
    def _check_alphas(self) -> Board:
        alphas = [*self.alphas, *itertools.chain.from_iterable(entry.alphas or () for entry in self.methods)]
        if bad := [alpha for alpha in alphas if not is_alpha(alpha)]:
            raise ValueError(f"alpha {bad[0]!r} is not between 0 and 1")
        return self


def read_board(path: Path) -> Board:
    """The board of a YAML file; ``UserError`` in one line names the key at fault and the closest known key."""
    content = read_plain_yaml(path, f"board={str(path)!r}")
    if not isinstance(content, Mapping):
        raise UserError(f"board={str(path)!r} must hold keys such as name, methods and tasks")
    return make_board(content, f"board={str(path)!r}")


def make_board(content: Mapping[str, Any], where: str = "board") -> Board:
    """A validated ``Board``; errors begin with ``where``."""
    _refuse_unknown_keys(content, Board, where, "")
    try:
        return Board(**content)
    except ValidationError as error:
        first = error.errors()[0]
        is_unquoted = first["type"] == "string_type" and isinstance(first["input"], (bool, int, float))
        hint = "; YAML reads it as a number or as true or false, so write it in quotes" if is_unquoted else ""
        raise UserError(f"{where}: {describe_validation_error(error)}{hint}") from None


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
            close = difflib.get_close_matches(str(name)[:100], schema.model_fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(schema.model_fields)}"
            raise UserError(f"{where}: {prefix}{printable(name, 100)} is unknown; {hint}")
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
