"""Directories that a user names for results: refused when occupied, and there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lm_ortho.errors import UserError


def check_output_directory(directory: Path, argument: str = "out") -> None:
    """Raises ``UserError`` unless ``directory`` is new or empty and can be made; hours of work may come before it."""
    if is_immovable(directory):
        raise UserError(f"{argument}={str(directory)!r} cannot be replaced as a whole; name a new directory inside it")
    if directory.is_dir():
        first = next(iter(sorted(directory.iterdir())), None)
        if first is not None:
            raise UserError(f"{argument}={str(directory)!r} holds {first.name}; choose a new or empty directory")
    elif directory.exists():
        raise UserError(f"{argument}={str(directory)!r} is a file; choose a new or empty directory")
    above = next(path for path in directory.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{argument}={str(directory)!r} cannot be made: {above} is no directory you may write to")


def is_immovable(directory: Path) -> bool:
    """Whether a directory cannot give its place to another: a mount point, or where somebody works."""
    return directory.is_dir() and (os.path.ismount(directory) or directory.resolve() == Path.cwd())


@contextmanager
def atomic_directory(directory: Path, argument: str = "out") -> Iterator[Path]:
    """A folder beside ``directory`` to write into, which takes its place at the end and is removed after an error.

    Raises:
        UserError: as ``check_output_directory``, and where it cannot be written (no space, no permission).
    """
    check_output_directory(directory, argument)
    directory = directory.resolve()  # a link to an empty directory stays a link
    scratch = directory.absolute().parent / temporary_name(directory)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        os.rename(scratch, directory)  # also onto an empty directory
    except WRITE_ERRORS as error:
        raise UserError(f"{argument}={str(directory)!r} cannot be written ({describe_write_error(error)})") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


WRITE_ERRORS = (OSError, SafetensorError)
"""What writing raises; safetensors has a class of its own for a full disk."""


def describe_write_error(error: Exception) -> str:
    """One line about an error of ``WRITE_ERRORS``."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__


def make_private_directory(folder: Path) -> None:
    """Makes ``folder`` and what is missing above it, readable by the owner only. Raises ``OSError``."""
    for path in (*reversed(folder.absolute().parents), folder):
        if not path.is_dir():
            path.mkdir(mode=0o700, exist_ok=True)


def temporary_name(target: Path) -> str:
    """A hidden name beside ``target`` that nothing else has."""
    return f".{target.absolute().name}.tmp-{uuid.uuid4().hex[:12]}"
