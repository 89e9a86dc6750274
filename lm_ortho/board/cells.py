"""A cell: one model made by one method. Its key says what decides the model; its pieces are what is to be done.

A board knows methods through one narrow protocol, ``Maker``: a cell and a directory in, a Hugging Face directory and a
report out. Methods of the package are looked up when a cell is made; modules named in ``imports`` may add others.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from lm_ortho.board.store import Piece
from lm_ortho.errors import UserError
from lm_ortho.implant import Notify
from lm_ortho.registry import Registry

MODES = {"base": "auto", "merged": "none", "end": "end"}
"""What a method reads beside the rows, in the words of the model arg `base`: also the model before fine-tuning (auto),
the merged weights only (none), or anything (end: the two ends of the scale)."""


@dataclass(frozen=True)
class Cell:
    """One model to be made. ``source`` is the entry of the model that holds the memory, as plain data.

    ``tuned`` says how the settings are chosen where they are; they are then no part of the key, and ``settings`` is
    filled in when they are known. ``identity`` stands for the content of the source and for the code.
    """

    model: str
    source: Mapping[str, Any]
    method: str
    settings: Mapping[str, Any]
    seed: int
    mode: str
    budget: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, Any] | None = None
    dial: bool = False
    identity: str = ""

    @property
    def key(self) -> str:
        """Hash of everything that decides the model."""
        asked = {"tuned": self.tuned} if self.tuned else {"settings": self.settings}
        return digest([self.method, asked, self.seed, self.mode, self.budget, self.identity])

    @property
    def label(self) -> str:
        """Method and settings, for people."""
        told = ["tuned"] if self.tuned else [f"{name}={value}" for name, value in self.settings.items()]
        return " ".join([self.method, *told])

    @property
    def folder(self) -> str:
        """The name of its directory."""
        return f"{self.method}-seed{self.seed}-{self.key[:12]}"


class Maker(Protocol):
    """What makes models of cells. ``mode`` is one of ``MODES``, ``dial`` says whether the models have an alpha."""

    @property
    def mode(self) -> str:
        """What it reads."""

    @property
    def dial(self) -> bool:
        """Whether its models have an alpha."""

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises ``UserError`` for settings it does not know."""

    def grid(self) -> Sequence[Mapping[str, Any]]:
        """The settings to be tried on the tuning split."""

    def score(self, cell: Cell, notify: Notify) -> Mapping[str, Any]:
        """Tries the settings of ``cell`` on the tuning split; ``total`` is the lower the better."""

    def make(self, cell: Cell, directory: Path, notify: Notify) -> Mapping[str, Any]:
        """Writes a Hugging Face model with its tokenizer into the empty ``directory``; gives a report in plain JSON."""


MAKERS: Registry[Maker] = Registry("method")
"""Methods that modules outside of the package add."""


def find_maker(name: str, imports: Sequence[str] = ()) -> Maker:
    """The maker of a method; ``UserError`` for an unknown one lists the known names and the closest."""
    for module in imports:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"imports: {module!r} cannot be imported ({error})") from None
    if name in MAKERS:
        return MAKERS.get(name)
    from lm_ortho.board.making import of_package

    return of_package(name)


def digest(content: Any) -> str:
    """sha256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def make_piece(cell: Cell) -> Piece:
    """The piece that makes the model of a cell."""
    return Piece(cell.key, cell.key, "make", {**asdict(cell), "label": cell.label})


def evaluate_piece(cell_key: str, described: Mapping[str, Any], alpha: Any, task: str, **how: Any) -> Piece:
    """The piece that measures a model at ``alpha`` (None: it has no dial) on ``task``.

    ``described`` goes into the record beside ``how``, which decides the numbers; only the latter is part of the key.
    """
    asked = {"alpha": alpha, "task": task, "versions": versions(), "code": code(MEASURING), **how}
    key = digest({"cell": cell_key, **asked})
    return Piece(key, cell_key, "evaluate", {**described, **asked})


def versions() -> dict[str, str]:
    """The packages that decide what is measured."""
    from importlib.metadata import version

    import lm_ortho

    others = {name: version(name) for name in ("lm_eval", "torch", "transformers")}
    return {"lm_ortho": lm_ortho.__version__, **others}


MAKING = (
    "calibration", "checkpoint", "edit", "implant", "kernels", "layer", "methods", "projection", "reference", "sieve",
    "streams", "target", "decompose.py", "memories.py", "workbench.py", "registry.py", "settings.py",
)  # fmt: skip
"""Rooms and files whose code decides what a model is."""
MEASURING = ("harness", "kernels", "layer", "metrics", "streams", "tasks")
"""Rooms whose code decides what is measured."""


@lru_cache
def code(rooms: tuple[str, ...]) -> str:
    """Hash of the package's own code in these rooms: a change makes what it decided stale."""
    import lm_ortho
    from lm_ortho.kernels import calls
    from lm_ortho.plugin.bridges import tasks_dir

    roots = {
        Path(lm_ortho.__file__).parent: "*.py",
        Path(inspect.getfile(calls)).parent: "*.py",
        tasks_dir(): "*",
    }
    files = {
        f"{root.name}/{path.relative_to(root)}": path
        for root, pattern in roots.items()
        for path in root.rglob(pattern)
        if path.is_file() and path.suffix not in (".md", ".pyc")
    }
    found = hashlib.sha256()
    for name, path in sorted(files.items()):
        if set(rooms) & set(Path(name).parts):
            found.update(name.encode() + path.read_bytes())
    return found.hexdigest()
