"""The cache of decompositions: every entry is a checkpoint, behind a symbolic link that is named by its key.

    <key>                               link to the current version of the entry
    .<key>.version-<random>/checkpoint  a version: the current one, a replaced one, or one that is being written
    unfinished-<key>                    saved states of an interrupted decomposition
    surrogate-<key>                     an adapter that several decompositions use, and the state of its training

A new version is written beside the old one, and one rename of the link makes it the current one. So a reader finds an
entry at any moment, and a complete one; it goes on reading a version that is replaced meanwhile, for that one is
deleted an hour after it was last looked up. A version holds a lock while it is written; one without that no link names
is a leftover of a killed process. On NFS another machine may see the older version for the seconds that it caches
names.

Entries hold the memory in clear: the folders of versions are readable by their owner only, before anything is in them.
Earlier versions of the package made a folder ``<key>`` with the checkpoint itself; it is read, listed and replaced.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from torch import nn

from lm_ortho.checkpoint.duplicate import duplicate
from lm_ortho.checkpoint.manifest import MANIFEST_FILE, read_manifest
from lm_ortho.checkpoint.write import USED_FILE, save
from lm_ortho.errors import UserError
from lm_ortho.files import is_locked, lock_folder, make_private_directory, temporary_name

DEFAULT_LIMIT_GB = 20.0
_KEY = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"\.([0-9a-f]{64})\.(version|tmp)-[0-9a-f]+")
"""Versions of entries; those named tmp are links that were not renamed, and leftovers of the earlier layout."""
_CHECKPOINT = "checkpoint"
_VERSION_LIFETIME = 3600.0
"""Seconds after which a version that is neither current nor locked is deleted; until then somebody may read it."""
_UNLOCKED_LIFETIME = 24 * 3600.0
"""The same where locks are not possible, after which a write was certainly interrupted."""
_UNFINISHED = re.compile(r"(unfinished|surrogate)-[0-9a-f]{64}")
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
    """The link to the entry of ``key``, whether it exists or not. Raises ``ValueError`` for anything but a key."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not a cache key")
    return cache_dir() / key


def unfinished_directory(key: str) -> Path:
    """The folder for the saved state of an interrupted decomposition of ``key``."""
    return entry_path(key).with_name(f"unfinished-{key}")


def lookup(key: str) -> Path | None:
    """The checkpoint of ``key``, whose time of use is set to now; None if there is none.

    It is the current version itself and not the link to it, so that all its files belong together.
    """
    path = _follow(entry_path(key))
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

    ``description`` is one line for ``list_entries``. An existing entry is replaced in one step; of several processes
    that store one key the last one wins.
    """
    meta = {**(meta or {}), "description": description}
    return _store_version(key, lambda directory: save(directory, model, tokenizer, meta))


def store_copy(key: str, checkpoint: Path, description: str = "") -> bool:
    """Makes a copy of a checkpoint the entry of ``key``, as ``store`` does; returns whether its weights are hard links.

    Raises:
        OSError: if the cache cannot be written.
    """
    are_links = list[bool]()
    meta = {**read_manifest(checkpoint).meta, "description": description}

    def write(directory: Path) -> None:
        directory.mkdir()
        are_links.append(duplicate(checkpoint, directory, meta))

    _store_version(key, write)
    return all(are_links)


def copy_entry(entry: Path, directory: Path) -> bool:
    """Copies an entry, without its description, into an empty folder; returns whether the weights are hard links.

    Raises:
        UserError: for an entry that is damaged; its weights are verified when the copy is loaded.
        OSError: if ``directory`` cannot be written.
    """
    meta = {name: value for name, value in read_manifest(entry).meta.items() if name != "description"}
    return duplicate(entry, directory, meta)


def _store_version(key: str, write: Callable[[Path], object]) -> Path:
    """Lets ``write`` make a checkpoint, makes it the entry of ``key``, evicts old entries, and returns its folder."""
    link = entry_path(key)
    make_private_directory(link.parent)
    version = link.with_name(f".{key}.version-{uuid.uuid4().hex[:12]}")
    version.mkdir(mode=0o700)
    path = version / _CHECKPOINT
    with lock_folder(version):
        try:
            write(path)
            _mark_used(path)
            path = _publish(path, link)
        except BaseException:
            shutil.rmtree(version, ignore_errors=True)
            raise
    evict(protected_keys=[key])
    return path


def _publish(checkpoint: Path, link: Path) -> Path:
    """Makes ``checkpoint`` the one that ``link`` names, in one step; returns where it is then."""
    new_link = link.with_name(temporary_name(link))
    try:
        os.symlink(checkpoint.relative_to(link.parent), new_link)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # A file system without links: the folder itself, which takes two renames.
        checkpoint.chmod(0o700)
        _set_aside(link)
        os.rename(checkpoint, link)
        return link
    try:
        if link.is_dir() and not link.is_symlink():  # made by an earlier version of the package
            _set_aside(link)
        os.replace(new_link, link)
    finally:
        new_link.unlink(missing_ok=True)
    return checkpoint


def _set_aside(folder: Path) -> Path:
    """Renames an entry that is no link, so that it is swept like a replaced version; returns its new path."""
    hidden_folder = folder.with_name(temporary_name(folder))
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, hidden_folder)
    return hidden_folder


def list_entries() -> list[Entry]:
    """All entries, the least recently used first."""
    entries = [_read_entry(path) for path in _list_folders(_KEY) if path.is_dir()]
    return sorted((e for e in entries if e is not None), key=lambda e: (e.last_used, e.key))


def evict(protected_keys: Iterable[str] = ()) -> list[Entry]:
    """Removes entries until the cache is within ``size_limit`` and returns them.

    The least recently used are removed first, those of ``protected_keys`` never. Also removes what ``_sweep`` does.
    """
    _sweep()
    protected, limit = set(protected_keys), size_limit()
    entries = list_entries()
    total = sum(e.bytes for e in entries)
    evicted_entries = []
    for entry in entries:
        if total <= limit:
            break
        if entry.key not in protected:
            _delete(entry)
            total -= entry.bytes
            evicted_entries.append(entry)
    return evicted_entries


def clear() -> list[Entry]:
    """Removes all entries and returns them, and removes surrogates and the files of interrupted runs.

    Versions that a live process writes stay, and so do other files in the folder.
    """
    entries = list_entries()
    for entry in entries:
        _delete(entry)
    _sweep(at_once=True)
    return entries


def _sweep(at_once: bool = False) -> None:
    """Removes replaced versions and those of killed writers, links to nothing, and old surrogates and unfinished runs.

    A version stays for an hour after it was written or looked up (for a day where locks are not possible), an
    unfinished decomposition or a surrogate for 30 days after it was written; with ``at_once`` only what a live process
    writes stays.
    """
    for path in _list_folders(_VERSION):
        is_live = is_locked(path)
        lifetime = _UNLOCKED_LIFETIME if is_live is None else _VERSION_LIFETIME
        if not is_live and (at_once or time.time() - _newest_mtime(path) > lifetime) and not _is_current(path):
            _remove(path)
    for path in _list_folders(_UNFINISHED):
        if at_once or time.time() - _newest_mtime(path) > _UNFINISHED_LIFETIME:
            _remove(path)
    for path in _list_folders(_KEY):
        if not path.exists():
            _remove(path)


def _delete(entry: Entry) -> None:
    """Removes an entry: first its name, in one step, so that nobody finds a part of it."""
    link = entry_path(entry.key)
    if not link.is_symlink():
        _remove(_set_aside(link))
    elif _follow(link) == entry.path:
        link.unlink(missing_ok=True)
        _remove(entry.path.parent)


def _read_entry(link: Path) -> Entry | None:
    """The entry that a link names; None if it is deleted meanwhile."""
    path = _follow(link)
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
    return Entry(key=link.name, path=path, bytes=size, created=created, last_used=last_used, description=description)


def _follow(link: Path) -> Path:
    """The checkpoint that an entry names; its own path for a folder of the earlier layout and for a missing entry."""
    try:
        return link.parent / os.readlink(link)
    except OSError:
        return link


def _is_current(version: Path) -> bool:
    """Whether the link of its entry names this version."""
    match = _VERSION.fullmatch(version.name)
    return match is not None and _follow(version.with_name(match[1])).parent == version


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)


def _list_folders(pattern: re.Pattern[str]) -> list[Path]:
    """Folders of the cache and links, also to nothing."""
    root = cache_dir()
    if not root.is_dir():
        return []
    paths = (path for path in root.iterdir() if pattern.fullmatch(path.name))
    return sorted(path for path in paths if path.is_dir() or path.is_symlink())


def _mark_used(path: Path) -> None:
    # A read-only cache still works, without recording the order of use.
    with contextlib.suppress(OSError):
        (path / USED_FILE).touch()


def _newest_mtime(folder: Path) -> float:
    """The newest time of change of a folder, or a link, and of all files below it; now if they change meanwhile."""
    try:
        below = [] if folder.is_symlink() else list(folder.rglob("*"))
        return max(path.lstat().st_mtime for path in (folder, *below))
    except OSError:
        return time.time()


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
