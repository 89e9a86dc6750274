"""Decompositions kept between runs: every entry is a checkpoint in a folder named by its key.

The entries hold the memory in clear, so the folder is readable by its owner only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from torch import nn

from lm_ortho.checkpoint.manifest import MANIFEST_FILE, read_manifest
from lm_ortho.checkpoint.write import USED_FILE, save
from lm_ortho.errors import UserError
from lm_ortho.files import make_private_directory

DEFAULT_LIMIT_GB = 20.0
_KEY = re.compile(r"[0-9a-f]{64}")
_SCRATCH = re.compile(r"\.[0-9a-f]{64}\.tmp-[0-9a-f]+")
_SCRATCH_LIFE = 24 * 3600.0  # seconds after which an interrupted write is surely dead
_UNFINISHED = re.compile(r"unfinished-[0-9a-f]{64}")
_UNFINISHED_LIFE = 30 * 24 * 3600.0


@dataclass(frozen=True)
class Entry:
    """One kept decomposition; times are seconds since the epoch, ``bytes`` is what it takes on disk."""

    key: str
    path: Path
    bytes: int
    created: float
    last_used: float
    description: str


def cache_dir() -> Path:
    """The folder of the cache: ``LM_ORTHO_CACHE``, or the usual place of the platform."""
    return Path(os.environ.get("LM_ORTHO_CACHE") or platformdirs.user_cache_dir("lm-ortho"))


def size_limit() -> int:
    """The most bytes the cache may take: ``LM_ORTHO_CACHE_LIMIT_GB``, or 20 GB; 0 keeps only the newest."""
    asked = os.environ.get("LM_ORTHO_CACHE_LIMIT_GB", "").strip()
    try:
        gigabytes = float(asked) if asked else DEFAULT_LIMIT_GB
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < float("inf"):
        raise UserError(f"LM_ORTHO_CACHE_LIMIT_GB={asked!r} must be a number of gigabytes, 0 or more")
    return int(gigabytes * 10**9)


def key(parts: dict[str, Any]) -> str:
    """The key of everything that decides a decomposition: sha256 of ``parts`` (plain JSON), in any order."""
    try:
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a cache key is made of plain JSON: {error}") from None
    return hashlib.sha256(text.encode()).hexdigest()


def entry(key: str) -> Path:
    """Where the entry of ``key`` is or will be. Raises ``ValueError`` for anything but a key."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not a cache key")
    return cache_dir() / key


def unfinished_directory(key: str) -> Path:
    """The folder for what an interrupted decomposition of ``key`` has reached."""
    return entry(key).with_name(f"unfinished-{key}")


def lookup(key: str) -> Path | None:
    """The checkpoint of ``key``, marked as used now; None if there is none."""
    path = entry(key)
    if not (path / MANIFEST_FILE).is_file():
        return None
    _touch(path)
    return path


def store(
    key: str,
    model: nn.Module,
    tokenizer: Any = None,
    meta: dict[str, Any] | None = None,
    description: str = "",
) -> Path:
    """The new entry of ``key``: a checkpoint of the patched ``model``; then the oldest ones make room.

    ``description`` is one line for ``list_entries``. An entry that is there already is replaced.
    """
    path = entry(key)
    make_private_directory(path.parent)
    save(path, model, tokenizer, {**(meta or {}), "description": description})
    path.chmod(0o700)
    _touch(path)
    evict(keep=[key])
    return path


def list_entries() -> list[Entry]:
    """All entries, the least recently used first."""
    entries = [_read(path) for path in _folders(_KEY)]
    return sorted((e for e in entries if e is not None), key=lambda e: (e.last_used, e.key))


def evict(keep: Iterable[str] = ()) -> list[Entry]:
    """The entries removed to get under ``size_limit``: least recently used first, never those in ``keep``.

    Also removes what interrupted writes left behind a day ago or earlier, and decompositions that nobody went on with
    for a month.
    """
    for pattern, life in ((_SCRATCH, _SCRATCH_LIFE), (_UNFINISHED, _UNFINISHED_LIFE)):
        for path in _folders(pattern):
            if time.time() - _mtime(path) > life:
                shutil.rmtree(path, ignore_errors=True)
    kept, limit = set(keep), size_limit()
    entries = list_entries()
    total = sum(e.bytes for e in entries)
    removed = []
    for old in entries:
        if total <= limit:
            break
        if old.key not in kept:
            shutil.rmtree(old.path, ignore_errors=True)
            total -= old.bytes
            removed.append(old)
    return removed


def clear() -> list[Entry]:
    """The entries that were there; all are removed, and what interrupted runs left with them.

    Nothing else in the folder is touched.
    """
    entries = list_entries()
    for path in [*_folders(_KEY), *_folders(_SCRATCH), *_folders(_UNFINISHED)]:
        shutil.rmtree(path, ignore_errors=True)
    return entries


def _read(path: Path) -> Entry | None:
    """None for a folder that is going away while we look."""
    try:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        created = _mtime(path / MANIFEST_FILE) or _mtime(path)
    except OSError:
        return None
    try:
        description = str(read_manifest(path).meta.get("description", ""))
    except UserError:
        description = "(damaged)"
    return Entry(path.name, path, size, created, max(created, _mtime(path / USED_FILE)), description)


def _folders(pattern: re.Pattern[str]) -> list[Path]:
    root = cache_dir()
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if pattern.fullmatch(path.name) and path.is_dir())


def _touch(path: Path) -> None:
    # A read-only cache still serves; it only forgets the order of use.
    with contextlib.suppress(OSError):
        (path / USED_FILE).touch()


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
