"""What a board is asked for: the schema of ``board.yaml``. Unknown keys are refused with the closest known one."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lm_ortho.config import describe_validation_error
from lm_ortho.errors import UserError


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(_Part):
    """A model that holds a memory. Without ``pretrained`` the embedded one with the embedded rows."""

    pretrained: str | None = Field(None, description="Hub id or directory.")
    peft: str | None = Field(None, description="Adapter with the memory.")
    base: str | None = Field(None, description="The model before fine-tuning; `pretrained` where `peft` is merged.")
    never_saw: str | None = Field(None, description="A model that never saw the forget set; it only judges.")
    forget: str | None = Field(None, description="Rows to forget, as the model arg.")
    retain: str | None = Field(None, description="Rows to keep, as the model arg.")
    revision: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _with_rows(self) -> Model:
        if self.pretrained and not (self.forget and self.retain):
            raise ValueError("a model of your own needs forget= and retain=")
        if not self.pretrained and any((self.peft, self.base, self.never_saw, self.forget, self.retain)):
            raise ValueError("the embedded model brings everything along; give pretrained, too")
        return self


class Entry(_Part):
    """A method with the settings and seeds that it is run with; the lists of ``grid`` are all combined, a row each."""

    method: str
    settings: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    alphas: tuple[float, ...] | None = None
    tune: bool = Field(False, description="Choose among the grid of the method on the tuning split first.")

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Every setting to run."""
        for values in itertools.product(*self.grid.values()):
            yield {**self.settings, **dict(zip(self.grid, values, strict=True))}

    @model_validator(mode="after")
    def _one_way(self) -> Entry:
        if self.tune and self.grid:
            raise ValueError("grid lists what becomes a row each, tune picks one setting: give one of them")
        if both := set(self.settings) & set(self.grid):
            raise ValueError(f"{sorted(both)[0]!r} is in settings and in grid")
        return self


class Axis(_Part):
    """One number of the frontier. ``scale`` log takes ratios, linear differences; ``better`` is the good direction."""

    task: str
    metric: str
    scale: Literal["log", "linear"] = "log"
    better: Literal["lower", "higher"] = "lower"


class Frontier(_Part):
    """Forget: mean distance from the model that never saw it. Retain: mean of these, 0 being that of ``unedited``."""

    forget: tuple[Axis, ...] = (
        Axis(task="tofu_forget", metric="secret_ppl"),
        Axis(task="canary_extraction", metric="secret_ppl"),
    )
    retain: tuple[Axis, ...] = (Axis(task="tofu_retain", metric="ppl"),)


class Budget(_Part):
    """What every method that trains is given, whatever it is."""

    steps: int = Field(400, ge=1)
    forget_rows: int = Field(16, ge=1)
    retain_rows: int = Field(16, ge=1)


class Tuning(_Part):
    """How ``tune`` chooses: one run per setting of the method's grid, on rows that the evaluation never asks about."""

    seed: int = Field(100, ge=0, description="Of the split and of the runs.")
    budget: Budget | None = None


class Resources(_Part):
    """Where cells run and what each of them asks for."""

    executor: Literal["local", "ray"] = "local"
    address: str | None = Field(None, description="Of a Ray cluster; one on this machine is started without it.")
    cpus: float = Field(1, gt=0, description="Per cell.")
    gpus: float = Field(0, ge=0, description="Per cell.")
    memory_gb: float | None = Field(None, gt=0, description="Per cell.")


class Board(_Part):
    """A matrix of models, methods, settings, seeds and tasks."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    title: str = ""
    models: dict[str, Model] = Field(default_factory=lambda: {"embedded": Model.model_validate({})}, min_length=1)
    methods: tuple[Entry, ...] = Field(min_length=1)
    tasks: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    alphas: tuple[float, ...] = Field((0.0, 1.0), description="For methods with a dial; others are one point.")
    limit: int | None = Field(None, ge=1, description="First documents of every task.")
    limits: dict[str, int] = Field(
        default_factory=dict, description="The same by task or group; a task goes before its group."
    )
    frontier: Frontier = Field(default_factory=Frontier)
    budget: Budget = Field(default_factory=lambda: Budget.model_validate({}))
    tuning: Tuning = Field(default_factory=lambda: Tuning.model_validate({}))
    resources: Resources = Field(default_factory=lambda: Resources.model_validate({}))
    device: str | None = None
    dtype: str = "float32"
    parallelize: bool = False
    batch_size: int | str = 1
    metadata: dict[str, Any] = Field(default_factory=dict, description="What `--metadata` says to the tasks.")
    imports: tuple[str, ...] = Field((), description="Python modules that register methods of your own.")

    @model_validator(mode="after")
    def _in_range(self) -> Board:
        every = [*self.alphas, *itertools.chain.from_iterable(e.alphas or () for e in self.methods)]
        if bad := [alpha for alpha in every if not 0 <= alpha <= 1]:
            raise ValueError(f"alpha {bad[0]!r} is not between 0 and 1")
        return self


def read_board(path: Path) -> Board:
    """The board of a YAML file; ``UserError`` in one line names the key at fault, its line of keys, and the closest."""
    import yaml

    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"board={str(path)!r} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"board={str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, Mapping):
        raise UserError(f"board={str(path)!r} must hold keys such as name, methods and tasks")
    return make_board(given, f"board={str(path)!r}")


def make_board(given: Mapping[str, Any], where: str = "board") -> Board:
    """A checked ``Board``."""
    _refuse_unknown(given, Board, where, "")
    try:
        return Board(**given)
    except ValidationError as error:
        raise UserError(f"{where}: {describe_validation_error(error)}") from None


_PARTS: dict[tuple[type[BaseModel], str], type[BaseModel]] = {
    (Board, "frontier"): Frontier, (Board, "budget"): Budget, (Board, "tuning"): Tuning, (Tuning, "budget"): Budget,
    (Board, "resources"): Resources,
}  # fmt: skip
_LISTS: dict[tuple[type[BaseModel], str], type[BaseModel]] = {
    (Board, "methods"): Entry, (Board, "models"): Model, (Frontier, "forget"): Axis, (Frontier, "retain"): Axis,
}  # fmt: skip


def _refuse_unknown(given: Any, schema: type[BaseModel], where: str, at: str) -> None:
    """Raises ``UserError`` for a key that the schema does not know, wherever it stands."""
    if not isinstance(given, Mapping):
        return  # pydantic says what is expected
    for name, value in given.items():
        if name not in schema.model_fields:
            close = difflib.get_close_matches(str(name), schema.model_fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(schema.model_fields)}"
            raise UserError(f"{where}: {at}{name} is unknown; {hint}")
        if part := _PARTS.get((schema, name)):
            _refuse_unknown(value, part, where, f"{at}{name}.")
        if part := _LISTS.get((schema, name)):
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
            for number, each in pairs:
                _refuse_unknown(each, part, where, f"{at}{name}.{number}.")
