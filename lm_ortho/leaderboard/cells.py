"""Cells and their pieces. A cell is one model made by one method; its key hashes everything that decides the model.

Pieces are the units of work of a board: a model to make, a setting to try, or a task to evaluate at one alpha.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lm_ortho.checkpoint.input_files import sha256
from lm_ortho.leaderboard.store import Piece
from lm_ortho.pipeline.code_hash import DECOMPOSITION, evaluation_hash, versions

METHOD_CODE = ("lm_ortho.baselines", *DECOMPOSITION)
"""Modules whose code, with all that they import, decides what a model is, whatever the method."""


@dataclass(frozen=True)
class Cell:
    """One model to be made. ``source`` is the board's entry of the model that holds the memory, as plain data.

    ``mode`` says what the method reads (``makers.MODES``), ``dial`` whether the model has an alpha. ``tuned`` says how
    the settings are chosen, if they are; ``settings`` is then filled in after the tuning and no part of the key.
    ``identity`` is a hash of the content of the source and of the code. ``prompts`` are the keys of a recipe that
    decide the form of the questions, for every method. ``device`` is where the model is made, no part of the key.
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
    prompts: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None

    @property
    def key(self) -> str:
        """Hash of everything that decides the model."""
        settings = {"tuned": self.tuned} if self.tuned else {"settings": self.settings}
        prompts = [self.prompts] if self.prompts else []
        return digest([self.method, settings, self.seed, self.mode, self.budget, self.identity, *prompts])

    @property
    def label(self) -> str:
        """Method and settings as readable text."""
        words = ["tuned"] if self.tuned else [f"{name}={value}" for name, value in self.settings.items()]
        return " ".join([self.method, *words])

    @property
    def folder(self) -> str:
        """The name of the directory of its model."""
        return f"{self.method}-seed{self.seed}-{self.key[:12]}"


def digest(content: Any) -> str:
    """SHA-256 of plain data; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def build_model_piece(cell: Cell) -> Piece:
    """The piece that makes the model of a cell."""
    return Piece(cell.key, cell.key, "make", {**asdict(cell), "label": cell.label})


def build_evaluation_piece(
    cell_key: str,
    description: Mapping[str, Any],
    *,
    alpha: Any,
    task: str,
    file_hashes: Mapping[str, str],
    conditions: Mapping[str, Any],
) -> Piece:
    """The piece that measures a model at ``alpha`` (None: it has no alpha) on ``task``.

    The record holds ``description`` and ``conditions``. Only the conditions decide the numbers, so only they are part
    of the key, with the hashes of the files that the metadata names (``hash_task_files``).
    """
    config = {"alpha": alpha, "task": task, "versions": versions(), "code": evaluation_hash(), **conditions}
    key = digest({"cell": cell_key, **config, "content": file_hashes})
    return Piece(key, cell_key, "evaluate", {**description, **config})


def hash_task_files(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Hash of the content of every file and folder that tasks read, by its argument or environment variable."""
    from lm_ortho.data.rows import is_file
    from lm_ortho.dial import parse_named_values
    from lm_ortho.harness.tasks import muse, tofu_data

    arguments = {name: value for name, value in metadata.items() if isinstance(value, str)}
    arguments |= {name: os.environ.get(name, "") for name in (muse.DIRECTORY_VARIABLE, tofu_data.DIRECTORY_VARIABLE)}
    file_hashes = {}
    for name, value in arguments.items():
        places = (None if is_file(value) else parse_named_values(value, name)) or {"": value}
        hashes = [[part, _hash_path(Path(place).expanduser())] for part, place in places.items() if place]
        # The content of the model itself is already part of the key of its cell.
        if name != "pretrained" and any(content_hash for _, content_hash in hashes):
            file_hashes[name] = digest(hashes)
    return file_hashes


def _hash_path(path: Path) -> str:
    """Hash of a file, or of all files of a folder; empty where there is neither."""
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    content_hash = hashlib.sha256()
    for file in filter(Path.is_file, files):
        content_hash.update(f"{file.relative_to(path)} {sha256(file)}".encode())
    return content_hash.hexdigest() if files else ""


def format_lm_eval_command(
    kind: str,
    args: str,
    task: str,
    *,
    limit: int | None,
    metadata: Mapping[str, Any],
    chat: Mapping[str, Any] | None = None,
) -> str:
    """The ``lm_eval`` command that reproduces the numbers of one piece, quoted for a shell.

    ``chat`` holds ``apply_chat_template`` and ``system_instruction``; variables of the template are model args.
    """
    parts = ["lm_eval", "--model", kind, "--model_args", args, "--tasks", task]
    parts += ["--limit", str(limit)] if limit else []
    parts += ["--metadata", json.dumps(dict(metadata))] if metadata else []
    if template := (chat or {}).get("apply_chat_template"):
        parts += ["--apply_chat_template", *([template] if isinstance(template, str) else [])]
    if instruction := (chat or {}).get("system_instruction"):
        parts += ["--system_instruction", instruction]
    return shlex.join(parts)
