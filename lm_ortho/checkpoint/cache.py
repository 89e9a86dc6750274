"""The cache of decompositions: every entry is a checkpoint in a folder named by its key.

Entries hold the memory in clear, so the folder is readable by its owner only.
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
_SCRATCH_LIFETIME = 24 * 3600.0  # seconds after which a write was certainly interrupted
_UNFINISHED = re.compile(r"unfinished-[0-9a-f]{64}")
_UNFINISHED_LIFETIME = 30 * 24 * 3600.0


@dataclass(frozen=True)
class Entry:
    """One cached decomposition; times are in seconds since the epoch, ``bytes`` is its size on disk."""

    key: str
    path: Path
    bytes: int
    created: float
    last_used: float
    description: str


def cache_dir() -> Path:
    """The folder of the cache: ``LM_ORTHO_CACHE``, or the cache folder of the platform."""
    return Path(os.environ.get("LM_ORTHO_CACHE") or platformdirs.user_cache_dir("lm-ortho"))


def size_limit() -> int:
    """The maximum size of the cache in bytes: ``LM_ORTHO_CACHE_LIMIT_GB``, or 20 GB; 0 keeps only the newest entry."""
    text = os.environ.get("LM_ORTHO_CACHE_LIMIT_GB", "").strip()
    try:
        gigabytes = float(text) if text else DEFAULT_LIMIT_GB
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < float("inf"):
        raise UserError(f"LM_ORTHO_CACHE_LIMIT_GB={text!r} must be a number of gigabytes, 0 or more")
    return int(gigabytes * 10**9)


def compute_key(parts: dict[str, Any]) -> str:
    """The cache key of a decomposition: sha256 of all that determines it (plain JSON), independent of key order.

    Raises:
        ValueError: for anything but plain JSON.
    """
    try:
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a cache key is made of plain JSON: {error}") from None
    return hashlib.sha256(text.encode()).hexdigest()


def entry_path(key: str) -> Path:
    """The folder of the entry of ``key``, whether it exists or not. Raises ``ValueError`` for anything but a key."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not a cache key")
    return cache_dir() / key


def unfinished_directory(key: str) -> Path:
    """The folder for the saved state of an interrupted decomposition of ``key``."""
    return entry_path(key).with_name(f"unfinished-{key}")


def lookup(key: str) -> Path | None:
    """The checkpoint of ``key``, whose time of use is set to now; None if there is none."""
    path = entry_path(key)
    if not (path / MANIFEST_FILE).is_file():
        return None
    _mark_used(path)
    return path


def store(
    key: str,
    model: nn.Module,
    tokenizer: Any = None,
    meta: dict[str, Any] | None = None,
    description: str = "",
) -> Path:
    """Saves the patched ``model`` as the entry of ``key``, evicts old entries, and returns the checkpoint.

    ``description`` is one line for ``list_entries``. An existing entry is replaced.
    """
    path = entry_path(key)
    make_private_directory(path.parent)
    save(path, model, tokenizer, {**(meta or {}), "description": description})
    path.chmod(0o700)
    _mark_used(path)
    evict(protected_keys=[key])
    return path


def list_entries() -> list[Entry]:
    """All entries, the least recently used first."""
    entries = [_read_entry(path) for path in _list_folders(_KEY)]
    return sorted((e for e in entries if e is not None), key=lambda e: (e.last_used, e.key))


def evict(protected_keys: Iterable[str] = ()) -> list[Entry]:
    """Removes entries until the cache is within ``size_limit`` and returns them.

    The least recently used are removed first, those of ``protected_keys`` never. Also removes stale files of
    interrupted writes after a day, and unfinished decompositions that were not resumed within 30 days.
    """
    for pattern, lifetime in ((_SCRATCH, _SCRATCH_LIFETIME), (_UNFINISHED, _UNFINISHED_LIFETIME)):
        for path in _list_folders(pattern):
            if time.time() - _mtime(path) > lifetime:
                shutil.rmtree(path, ignore_errors=True)
    protected, limit = set(protected_keys), size_limit()
    entries = list_entries()
    total = sum(e.bytes for e in entries)
    evicted_entries = []
    for entry in entries:
        if total <= limit:
            break
        if entry.key not in protected:
            shutil.rmtree(entry.path, ignore_errors=True)
            total -= entry.bytes
            evicted_entries.append(entry)
    return evicted_entries


def clear() -> list[Entry]:
    """Removes all entries and returns them, and removes stale files of interrupted runs.

    Other files in the folder stay.
    """
    entries = list_entries()
    for path in [*_list_folders(_KEY), *_list_folders(_SCRATCH), *_list_folders(_UNFINISHED)]:
        shutil.rmtree(path, ignore_errors=True)
    return entries


def _read_entry(path: Path) -> Entry | None:
    """The entry in a folder; None if the folder is deleted meanwhile."""
    try:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        created = _mtime(path / MANIFEST_FILE) or _mtime(path)
    except OSError:
        return None
    try:
        description = str(read_manifest(path).meta.get("description", ""))
    except UserError:
        description = "(damaged)"
    last_used = max(created, _mtime(path / USED_FILE))
    return Entry(key=path.name, path=path, bytes=size, created=created, last_used=last_used, description=description)


def _list_folders(pattern: re.Pattern[str]) -> list[Path]:
    root = cache_dir()
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if pattern.fullmatch(path.name) and path.is_dir())


def _mark_used(path: Path) -> None:
    # A read-only cache still works, without recording the order of use.
    with contextlib.suppress(OSError):
        (path / USED_FILE).touch()


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
