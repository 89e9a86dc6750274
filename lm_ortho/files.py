"""Output directories, written completely or not at all, and files that only their owner can read."""

from __future__ import annotations

import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lm_ortho.errors import UserError


def check_output_directory(directory: Path, argument: str = "out") -> None:
    """Raises ``UserError`` unless ``directory`` is new or empty and can be created; called before hours of work."""
    try:
        directory.exists()
    except OSError as error:  # a name that is too long, or a folder above without permission
        raise UserError(f"{argument}={str(directory)!r} cannot be looked up ({error.strerror})") from None
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
        raise UserError(
            f"{argument}={str(directory)!r} cannot be created: {above} is not a directory that you may write to"
        )


def is_immovable(directory: Path) -> bool:
    """Whether a rename cannot replace the directory: a mount point, or the current working directory."""
    return directory.is_dir() and (os.path.ismount(directory) or directory.resolve() == Path.cwd())


@contextmanager
def atomic_directory(directory: Path, argument: str = "out") -> Iterator[Path]:
    """Yields a temporary folder beside ``directory``; it is renamed to ``directory`` at the end, or removed on error.

    Raises:
        UserError: as ``check_output_directory``, and if the directory cannot be written (no space, no permission).
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
"""The errors of writing; safetensors raises its own class for a full disk."""


def describe_write_error(error: Exception) -> str:
    """One line about an error of ``WRITE_ERRORS``."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__


def make_private_directory(folder: Path) -> None:
    """Creates ``folder`` and its missing parents, readable by the owner only. Raises ``OSError``."""
    for path in (*reversed(folder.absolute().parents), folder):
        if not path.is_dir():
            path.mkdir(mode=0o700, exist_ok=True)


def private_opener(path: str, flags: int) -> int:
    """The ``opener`` of ``open`` for a file that only its owner can read, from its first byte on.

    A file that exists keeps its access rights.
    """
    return os.open(path, flags, 0o600)


def create_private_file(path: Path) -> None:
    """Creates an empty file that only its owner can read, for libraries that open files themselves.

    Raises ``OSError``, also if the file exists.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Holds a lock on ``folder``, by which ``is_locked`` tells whether its writer is alive; it ends with the process.

    Does nothing where the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if sys.platform != "win32":
            import fcntl

            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits for the instant in which ``is_locked`` looks
        yield
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool | None:
    """Whether a live process holds ``lock_folder``; None where the file system, such as some NFS, has no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)


STALE_SECONDS = 24 * 3600.0
"""Age after which a temporary file was certainly left by a killed process."""


def delete_stale_files(target: Path) -> None:
    """Deletes temporary versions of ``target`` (``temporary_name``) that killed processes left a day ago or more."""
    prefix = f".{target.absolute().name}.tmp-"
    with suppress(OSError):
        for path in target.absolute().parent.iterdir():
            if path.name.startswith(prefix) and path.is_file() and time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def temporary_name(target: Path) -> str:
    """A hidden, unique file name for a temporary version of ``target``."""
    return f".{target.absolute().name}.tmp-{uuid.uuid4().hex[:12]}"
