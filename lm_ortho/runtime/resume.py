"""What a long run has reached, kept in files so that an interrupted one goes on from there."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from lm_ortho.errors import UserError
from lm_ortho.files import make_private_directory, temporary_name

log = logging.getLogger(__name__)

INTERVAL = 300.0
"""Seconds between two states of an optimiser."""


class ResumeFolder:
    """States by name in a folder of one run; without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._last = time.monotonic()

    def of(self, part: str) -> ResumeFolder:
        """A keeper for one part of the run, in a folder inside."""
        return ResumeFolder(self.folder / part if self.folder is not None else None)

    def path(self, name: str) -> Path | None:
        """Where ``name`` is or would be; the folder is made. Raises ``UserError`` where it cannot be."""
        if self.folder is None:
            return None
        try:
            make_private_directory(self.folder)
        except OSError as error:
            raise UserError(
                f"cache: {self.folder} cannot be written ({error.strerror}); set LM_ORTHO_CACHE to a folder of yours"
            ) from None
        return self.folder / f"{name}.pt"

    def load(self, name: str) -> Any | None:
        """What was kept under ``name``; None if nothing was, or if it cannot be read."""
        path = self.path(name)
        if path is None or not path.is_file():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a file that was cut off raises many kinds; the work is then done again
            log.warning("%s cannot be read and is not used (%s)", path.name, type(error).__name__)
            return None

    def save(self, name: str, state: Any) -> None:
        """Keeps ``state``, complete or not at all; what cannot be kept does not stop the run."""
        path = self.path(name)
        if path is None:
            return
        try:
            save_state(state, path)
        except (OSError, RuntimeError) as error:  # torch has a RuntimeError of its own for a full disk
            log.warning("%s could not be kept (%s); an interruption would lose it", path.name, error)
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for another state."""
        return self.folder is not None and time.monotonic() - self._last >= INTERVAL

    def drop(self, name: str) -> None:
        """Lets ``name`` go."""
        path = self.path(name)
        if path is not None:
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Lets everything go: the run is finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def save_state(state: Any, path: Path) -> None:
    """Saves a state under a name that no other process writes to, then renames it."""
    partial = path.with_name(temporary_name(path))
    try:
        torch.save(state, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


NO_RESUME = ResumeFolder()
"""Keeps nothing."""
