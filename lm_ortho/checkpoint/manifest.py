"""The manifest of a checkpoint: its files with their hashes, and the record of how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from lm_ortho.checkpoint import limits
from lm_ortho.checkpoint.input_files import read_json, sha256
from lm_ortho.checkpoint.settings import FORMAT_VERSION, check_version
from lm_ortho.errors import UserError, printable
from lm_ortho.streams import DEFAULT_MEMORY

FORMAT = "lm-ortho"
MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
ORTHO_FILE = "ortho.safetensors"
# Files with which transformers would load another model from the same directory.
OTHER_MODEL_FILES = (
    "model.safetensors",
    "model.*.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.*.json",
    "pytorch_model.bin",
    "pytorch_model.*.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin.index.*.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_BASE_FILE = re.compile(r"base(-\d{5}-of-\d{5})?\.safetensors", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_base_file(name: str) -> bool:
    """Whether ``name`` is a file, or one of several, that holds the base stream."""
    return bool(_BASE_FILE.fullmatch(name))


def ortho_file(memory: str) -> str:
    """The file that holds the ortho stream of ``memory`` in every layer."""
    return ORTHO_FILE if memory == DEFAULT_MEMORY else f"ortho-{memory}.safetensors"


def format_version(memories: Iterable[str]) -> int:
    """The oldest format version that can hold these memories."""
    return 1 if set(memories) <= {DEFAULT_MEMORY} else FORMAT_VERSION


@dataclass(frozen=True)
class FileRecord:
    """Hash and size of one file when it was written."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint by path inside it, and the free-form record of how it was made."""

    files: dict[str, FileRecord]
    meta: dict[str, Any]


def write_manifest(directory: Path, meta: dict[str, Any], version: int = 1) -> None:
    """Writes the manifest of all files of ``directory``. Raises ``UserError`` if ``meta`` is not plain JSON."""
    files = {
        path.relative_to(directory).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    content = {"format": FORMAT, "format_version": version, "files": files, "meta": meta}
    try:
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"meta of a checkpoint must be plain JSON without NaN: {error}") from None
    (directory / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """Reads the manifest of a checkpoint. Raises ``UserError`` if it is missing, damaged or too new."""
    content = read_json(directory / MANIFEST_FILE)
    if content.get("format") != FORMAT:
        raise UserError(f"{directory}: {MANIFEST_FILE} does not describe an lm-ortho checkpoint")
    check_version(content.get("format_version"), directory)
    files, meta = content.get("files"), content.get("meta")
    if not isinstance(files, dict) or not isinstance(meta, dict):
        raise UserError(f"{directory}: {MANIFEST_FILE} is damaged: it has no files or no meta")
    if len(files) > limits.FILES:
        raise UserError(f"{directory}: {MANIFEST_FILE} lists {len(files)} files; at most {limits.FILES} are read")
    return Manifest({name: _parse_record(directory, name, record) for name, record in files.items()}, meta)


def _parse_record(directory: Path, name: str, record: Any) -> FileRecord:
    """Raises ``UserError`` for a path outside the checkpoint, written in an unusual way, or without hash and size."""
    parts = PurePosixPath(name).parts
    is_plain = name == "/".join(parts) and ".." not in parts and "\\" not in name
    if not name or not is_plain or name.startswith("/") or len(name) > limits.NAME_LENGTH:
        raise UserError(f"{directory}: {MANIFEST_FILE} is damaged: it lists {printable(repr(name), 80)}")
    fields = record if isinstance(record, dict) else {}
    digest, size = fields.get("sha256"), fields.get("bytes")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest) or type(size) is not int or size < 0:
        raise UserError(f"{directory}: {MANIFEST_FILE} is damaged: {name} has no sha256 and number of bytes")
    return FileRecord(digest, size)


def read_meta(path: str | PathLike[str]) -> dict[str, Any]:
    """The record that ``save`` stored with a checkpoint: recipe, report, hashes. Raises ``UserError``."""
    return read_manifest(Path(path)).meta


def read_libortho_settings(config: Path) -> dict[str, Any] | None:
    """The ``quantization_config`` of a ``config.json``; None if it is missing or not that of lm-ortho.

    Raises:
        UserError: as ``read_json``.
    """
    settings = read_json(config).get("quantization_config")
    return settings if isinstance(settings, dict) and settings.get("quant_method") == "libortho" else None
