"""Methods of the package as makers of cells."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_ortho.checkpoint import cache
from lm_ortho.config import Recipe
from lm_ortho.errors import UserError
from lm_ortho.leaderboard.cells import MODES, Cell, Maker
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.runtime.resume import ResumeFolder


def _methods() -> Any:
    """The room of the methods, loaded by name when a cell first asks for one."""
    return importlib.import_module("lm_ortho.baselines")


def of_package(name: str) -> Maker:
    """The maker of a registered method; ``UserError`` lists the known ones and the closest."""
    return OfMethod(_methods().METHODS.get(name))


@dataclass(frozen=True)
class OfMethod:
    """A ``Method`` of the registry as a maker."""

    method: Any

    @property
    def mode(self) -> str:
        return MODES[self.method.reads]

    @property
    def dial(self) -> bool:
        """A recipe of ours makes two streams, everything else a model without alpha."""
        return self.method.schema is Recipe

    def check(self, settings: Mapping[str, Any]) -> None:
        self.method.check(settings)

    def grid(self) -> Sequence[Mapping[str, Any]]:
        return list(self.method.grid)

    def score(self, cell: Cell, progress: ProgressCallback) -> Mapping[str, Any]:
        methods, tuned = _methods(), cell.tuned or {}
        if cell.source["pretrained"]:
            raise UserError(
                "tune: the tuning split is one of the embedded world; give settings for a model of your own"
            )
        split = methods.split_of_world(_material(_plain(cell.source)), tuned["seed"])
        made = self.method.make(split.material, cell.settings, tuned["seed"], _budget(cell), progress)
        found = methods.score(made, split)
        return {"forget": found.forget, "retain": found.retain, "total": found.total}

    def make(self, cell: Cell, directory: Path, progress: ProgressCallback) -> Mapping[str, Any]:
        resume = ResumeFolder(cache.unfinished_directory(cell.key))
        material = _material(_plain(cell.source))
        made = self.method.make(material, cell.settings, cell.seed, _budget(cell), progress, resume)
        _methods().save(made, directory, material.tokenizer, asdict(cell))
        resume.clear()
        return dict(made.report)


def _budget(cell: Cell) -> Any:
    return _methods().Budget(**cell.budget)


def _plain(source: Mapping[str, Any]) -> str:
    return json.dumps(dict(source), sort_keys=True)


@lru_cache(maxsize=1)
def _material(source: str) -> Any:
    """The material of a model, which methods never change; the next cell of the same model finds it loaded."""
    given = json.loads(source)
    if not given["pretrained"]:
        return _methods().material_of_world()
    where = {name: given[name] for name in ("revision", "trust_remote_code") if given[name]}
    named = {name: given[name] for name in ("peft", "forget", "retain") if given[name]}
    base = given["base"] or "auto"
    return _methods().material_of_files(
        given["pretrained"], base=base, reference_model=given["never_saw"], **named, **where
    )
