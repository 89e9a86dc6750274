"""The manifest of a checkpoint: its files with their hashes, and the record of how it was made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from lm_ortho.errors import UserError
from lm_ortho.streams import BITS, DEFAULT_MEMORY

FORMAT = "lm-ortho"
FORMAT_VERSION = 2
"""The newest format: 1 holds one memory; 2 holds several, each with a name and an ortho file."""
MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
ORTHO_FILE = "ortho.safetensors"


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
    try:
        files = {
            _check_relative(name): FileRecord(str(record["sha256"]), int(record["bytes"]))
            for name, record in content["files"].items()
        }
        return Manifest(files, dict(content["meta"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{directory}: {MANIFEST_FILE} is damaged") from None


def check_version(version: Any, location: object) -> None:
    """Raises ``UserError`` for a format that this version of lm-ortho cannot read; ``location`` begins the message."""
    if not isinstance(version, int) or version < 1:
        raise UserError(f"{location}: no valid format_version ({version!r})")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{location}: written by a newer lm-ortho (format {version}, this one reads up to "
            f"{FORMAT_VERSION}); upgrade lm-ortho"
        )


def check_settings(settings: Mapping[str, Any], location: object) -> None:
    """Raises ``UserError`` for an impossible lattice or list of layers in ``quantization_config``."""
    bits, size, modules = (settings.get(name) for name in ("bits", "group_size", "modules"))
    if type(bits) is not int or bits not in BITS:
        raise UserError(
            f"{location}: quantization_config has bits={bits!r}; expected one of {', '.join(map(str, BITS))}"
        )
    if type(size) is not int or size < 8 or size % 8:
        raise UserError(f"{location}: quantization_config has group_size={size!r}; expected a positive multiple of 8")
    if not isinstance(modules, list) or not modules or not all(isinstance(name, str) for name in modules):
        raise UserError(f"{location}: quantization_config lists no decomposed modules")


def verify(directory: Path, manifest: Manifest, names: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Raises ``UserError`` for a file that differs from its record; ``optional`` ones may be missing."""
    optional_names = set(optional)
    for name in names:
        path = directory / name
        record = manifest.files.get(name)
        if record is None:
            raise UserError(f"{directory}: {name} is not listed in {MANIFEST_FILE}")
        if not path.is_file():
            if name in optional_names:
                continue
            raise UserError(f"{directory}: {name} is missing")
        size = path.stat().st_size
        if size != record.bytes:
            raise UserError(
                f"{directory}: {name} has {size} bytes, not {record.bytes} as in the manifest: truncated or replaced"
            )
        if sha256(path) != record.sha256:
            raise UserError(f"{directory}: {name} was changed after it was written (its sha256 differs)")


def read_meta(path: str | PathLike[str]) -> dict[str, Any]:
    """The record that ``save`` stored with a checkpoint: recipe, report, hashes. Raises ``UserError``."""
    return read_manifest(Path(path)).meta


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file. Raises ``UserError`` that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path.parent}: {path.name} is missing or cannot be read") from None
    except ValueError:
        raise UserError(f"{path.parent}: {path.name} is not valid JSON (truncated?)") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.parent}: {path.name} does not hold a JSON object")
    return content


def read_libortho_settings(config: Path) -> dict[str, Any] | None:
    """The ``quantization_config`` of a ``config.json``; None if it is missing or not that of lm-ortho.

    Raises:
        UserError: as ``read_json``.
    """
    settings = read_json(config).get("quantization_config")
    return settings if isinstance(settings, dict) and settings.get("quant_method") == "libortho" else None


def sha256(path: Path) -> str:
    """Hex digest of the content of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_relative(name: str) -> str:
    """Returns ``name``. Raises ``ValueError`` for a path outside the checkpoint."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise ValueError(name)
    return name
