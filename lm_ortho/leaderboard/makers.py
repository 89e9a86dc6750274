"""Makers create the models of cells.

A board uses methods through the protocol ``Maker``, which writes the model of a cell into a Hugging Face directory and
returns a report. The methods of this package are wrapped by ``MethodMaker``; modules that a board names in
``imports`` may register others in ``MAKERS``.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from lm_ortho import baselines
from lm_ortho.checkpoint import cache
from lm_ortho.config import Recipe
from lm_ortho.errors import UserError
from lm_ortho.leaderboard.cells import Cell
from lm_ortho.registry import Registry
from lm_ortho.runtime.device import choose_device
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.runtime.resume import ResumeFolder

MODES = {"base": "auto", "merged": "none", "end": "end"}
"""What a method reads beside the rows, as a value of the model arg `base`: also the base model (auto), the merged
weights only (none), or any model (end: the two ends of the scale)."""


class Maker(Protocol):
    """Makes the models of cells. ``mode`` is one of the values of ``MODES``."""

    @property
    def mode(self) -> str:
        """What the method reads beside the rows, a value of ``MODES``."""

    @property
    def dial(self) -> bool:
        """Whether the models of the method have an alpha."""

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises ``UserError`` for settings it does not know."""

    def grid(self) -> Sequence[Mapping[str, Any]]:
        """The settings to try on the tuning split."""

    def score(self, cell: Cell, progress: ProgressCallback) -> Mapping[str, Any]:
        """Tries the settings of ``cell`` on the tuning split and returns scores; the lower ``total`` the better."""

    def make(self, cell: Cell, directory: Path, progress: ProgressCallback) -> Mapping[str, Any]:
        """Writes a Hugging Face model with its tokenizer into the empty ``directory``; returns a report in JSON."""


MAKERS: Registry[Maker] = Registry("method")
"""Makers that modules outside of this package register."""


@dataclass(frozen=True)
class MethodMaker:
    """Makes models with a method of the registry ``baselines.METHODS``."""

    method: baselines.Method

    @property
    def mode(self) -> str:
        return MODES[self.method.reads]

    @property
    def dial(self) -> bool:
        """Only a decomposition, whose settings are a recipe, makes an ortho stream; other models have no alpha."""
        return self.method.schema is Recipe

    def check(self, settings: Mapping[str, Any]) -> None:
        self.method.check(settings)

    def grid(self) -> Sequence[Mapping[str, Any]]:
        return list(self.method.grid)

    def score(self, cell: Cell, progress: ProgressCallback) -> Mapping[str, Any]:
        tuning = cell.tuned or {}
        if cell.source["pretrained"]:
            raise UserError("tune: only the embedded world has a tuning split; give settings for your own model")
        seed = tuning["seed"]
        budget = baselines.Budget(**cell.budget)
        with self._place_material(cell) as material:
            split = baselines.split_world(material, seed)
            result = self.method.make(split.material, cell.settings, seed=seed, budget=budget, progress=progress)
            score = baselines.score_result(result, split)
        return {"forget": score.forget, "retain": score.retain, "total": score.total}

    def make(self, cell: Cell, directory: Path, progress: ProgressCallback) -> Mapping[str, Any]:
        resume = ResumeFolder(cache.unfinished_directory(cell.key), cache.cache_dir())
        budget = baselines.Budget(**cell.budget)
        with self._place_material(cell) as material:
            result = self.method.make(
                material, cell.settings, seed=cell.seed, budget=budget, progress=progress, resume=resume
            )
            result = replace(result, model=result.model.to("cpu"))
            baselines.save(result, directory, material.tokenizer, asdict(cell))
        resume.clear()
        return dict(result.report)

    @contextmanager
    def _place_material(self, cell: Cell) -> Iterator[baselines.Material]:
        """Context manager: the material of the cell on its device, which it leaves afterwards for the evaluation."""
        material = _load_cell_material(cell)
        try:
            yield material.to(choose_device(cell.device).choice)
        finally:
            material.to("cpu")


def find_maker(name: str, imports: Sequence[str] = ()) -> Maker:
    """The maker of a method, from the modules in ``imports`` or from this package.

    Raises:
        UserError: for a module that cannot be imported; for an unknown method, with the known names and the closest.
    """
    for module in imports:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever the code of the module raises
            raise UserError(f"imports: {module!r} cannot be imported ({type(error).__name__}: {error})") from error
    return MAKERS.get(name) if name in MAKERS else MethodMaker(baselines.METHODS.get(name))


def _load_cell_material(cell: Cell) -> baselines.Material:
    material = _load_material(json.dumps(dict(cell.source), sort_keys=True))
    return replace(material, prompts=dict(cell.prompts))


@lru_cache(maxsize=1)
def _load_material(source: str) -> baselines.Material:
    """The material of a model, which methods never change; kept in memory for the next cell of the same model."""
    model = json.loads(source)
    if not model["pretrained"]:
        return baselines.material_from_world()
    names = ("revision", "trust_remote_code", "peft", "forget", "retain")
    return baselines.material_from_files(
        model["pretrained"],
        base=model["base"] or "auto",
        reference_model=model["never_saw"],
        **{name: model[name] for name in names if model[name]},
    )
