"""States of a long run, saved to files so that an interrupted run resumes from the last one."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from lm_ortho.errors import UserError
from lm_ortho.files import create_private_file, delete_stale_files, make_private_directory, temporary_name

log = logging.getLogger(__name__)

SAVE_INTERVAL = 300.0
"""Seconds between two saved states of an optimiser."""


class ResumeFolder:
    """A folder with the states of one run, saved under names; without a folder nothing is saved.

    ``common_folder`` holds results that other runs may use, too; without it there are none.
    """

    def __init__(self, folder: Path | None = None, common_folder: Path | None = None) -> None:
        self.folder, self.common_folder = folder, common_folder
        self._last_save = time.monotonic()

    def subfolder(self, name: str) -> ResumeFolder:
        """Returns a ``ResumeFolder`` for one part of the run, in a folder inside this one."""
        return ResumeFolder(self.folder / name if self.folder is not None else None, self.common_folder)

    def shared_folder(self, name: str, key: str) -> ResumeFolder:
        """Returns a ``ResumeFolder`` for a result with this ``key``, the hash of its inputs, that other runs may use.

        Without a folder for such results it is inside this one.
        """
        if self.common_folder is None:
            return self.subfolder(name)
        return ResumeFolder(self.common_folder / f"{name}-{key}")

    def path(self, name: str) -> Path | None:
        """Returns the file of the state ``name`` (existing or not) and creates the folder; None without a folder.

        Raises:
            UserError: if the folder cannot be created.
        """
        if self.folder is None:
            return None
        try:
            make_private_directory(self.folder)
        except OSError as error:
            raise UserError(
                f"cache: {self.folder} cannot be written ({error.strerror}); "
                "set LM_ORTHO_CACHE to a folder that you can write to"
            ) from None
        return self.folder / f"{name}.pt"

    def load(self, name: str) -> Any | None:
        """Returns the state saved under ``name``; None if there is none or if its file cannot be read."""
        path = self.path(name)
        return None if path is None else load_state(path)

    def save(self, name: str, state: Any) -> None:
        """Saves ``state`` atomically; a failed write is logged and does not stop the run."""
        path = self.path(name)
        if path is None:
            return
        try:
            save_state(state, path)
        except (OSError, RuntimeError) as error:  # torch raises a RuntimeError for a full disk
            log.warning("%s could not be saved (%s); an interruption would lose it", path.name, error)
        self._last_save = time.monotonic()

    def is_due(self) -> bool:
        """Returns whether it is time to save another state."""
        return self.folder is not None and time.monotonic() - self._last_save >= SAVE_INTERVAL

    def delete(self, name: str) -> None:
        """Deletes the state ``name``."""
        path = self.path(name)
        if path is not None:
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes all states; called when the run is finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def load_state(path: Path) -> Any | None:
    """Returns the state saved in ``path``; None if there is none or if its file cannot be read.

    Only tensors and plain values are read: a file of another origin cannot run code.
    """
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated file raises many kinds; the work is then repeated
        log.warning("%s cannot be read and is not used (%s)", path.name, type(error).__name__)
        return None


def save_state(state: Any, path: Path) -> None:
    """Saves a state under a temporary name that no other process uses, then renames the file to ``path``.

    A state holds a memory in clear: only its owner can read it, from the first byte on. Temporary files of processes
    that were killed while they saved this state are deleted after a day.
    """
    delete_stale_files(path)
    partial = path.with_name(temporary_name(path))
    try:
        create_private_file(partial)  # torch.save keeps the access rights of a file that exists
        torch.save(state, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


NO_RESUME = ResumeFolder()
"""A ``ResumeFolder`` without a folder: it saves nothing."""
