"""A cell: one model made by one method. Its key says what decides the model; its pieces are what is to be done.

A board knows methods through one narrow protocol, ``Maker``: a cell and a directory in, a Hugging Face directory and a
report out. Methods of the package are looked up when a cell is made; modules named in ``imports`` may add others.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lm_ortho.checkpoint.manifest import sha256
from lm_ortho.errors import UserError
from lm_ortho.leaderboard.store import Piece
from lm_ortho.pipeline.code_hash import DECOMPOSITION, evaluation_hash, versions
from lm_ortho.registry import Registry
from lm_ortho.runtime.progress import ProgressCallback

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

    def score(self, cell: Cell, progress: ProgressCallback) -> Mapping[str, Any]:
        """Tries the settings of ``cell`` on the tuning split; ``total`` is the lower the better."""

    def make(self, cell: Cell, directory: Path, progress: ProgressCallback) -> Mapping[str, Any]:
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
    from lm_ortho.leaderboard.makers import of_package

    return of_package(name)


def digest(content: Any) -> str:
    """sha256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def make_piece(cell: Cell) -> Piece:
    """The piece that makes the model of a cell."""
    return Piece(cell.key, cell.key, "make", {**asdict(cell), "label": cell.label})


def evaluate_piece(
    cell_key: str, described: Mapping[str, Any], alpha: Any, task: str, content: Mapping[str, str], **how: Any
) -> Piece:
    """The piece that measures a model at ``alpha`` (None: it has no dial) on ``task``.

    ``described`` goes into the record beside ``how``, which decides the numbers; only the latter is part of the
    key, with the ``content`` of the files that its metadata names (``asked_of``).
    """
    asked = {"alpha": alpha, "task": task, "versions": versions(), "code": evaluation_hash(), **how}
    key = digest({"cell": cell_key, **asked, "content": content})
    return Piece(key, cell_key, "evaluate", {**described, **asked})


def asked_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Hash of the content of every file and folder that tasks read, by its argument or environment variable."""
    from lm_ortho.config import parse_named_values
    from lm_ortho.harness.tasks import muse, tofu_data

    given = {name: value for name, value in metadata.items() if isinstance(value, str)}
    given |= {name: os.environ.get(name, "") for name in (muse.DIRECTORY_VARIABLE, tofu_data.DIRECTORY_VARIABLE)}
    found = {}
    for name, value in given.items():
        places = parse_named_values(value, name) or {"": value}
        hashes = [[part, _content(Path(place).expanduser())] for part, place in places.items() if place]
        if name != "pretrained" and any(content for _, content in hashes):  # what the model is, its cell says
            found[name] = digest(hashes)
    return found


def _content(path: Path) -> str:
    """Hash of a file, or of the files of a folder; nothing where there is neither."""
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    found = hashlib.sha256()
    for file in filter(Path.is_file, files):
        found.update(f"{file.relative_to(path)} {sha256(file)}".encode())
    return found.hexdigest() if files else ""


def lm_eval_command(kind: str, args: str, task: str, limit: int | None, metadata: Mapping[str, Any]) -> str:
    """The command that gives the numbers of one piece, ready for a shell."""
    parts = ["lm_eval", "--model", kind, "--model_args", args, "--tasks", task]
    parts += ["--limit", str(limit)] if limit else []
    parts += ["--metadata", json.dumps(dict(metadata))] if metadata else []
    return shlex.join(parts)


METHOD_CODE = ("lm_ortho.baselines", *DECOMPOSITION)
"""Modules whose code, with all that they import, decides what a model is, whatever the method."""
