"""Reads the files of a checkpoint: regular files of limited size only, and JSON of limited depth.

A checkpoint may come from anywhere. A named pipe in place of a file would wait for ever, a device never end.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from lm_ortho.checkpoint import limits
from lm_ortho.errors import UserError, printable


@contextmanager
def open_regular(path: Path, limit: int) -> Iterator[IO[bytes]]:
    """Opens a file of a checkpoint for reading; links are followed, as every file of the hub cache is one.

    Raises:
        UserError: for a file that is missing or cannot be read, for anything but a regular file, and for more than
            ``limit`` bytes.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        if os.path.lexists(path) and not path.is_file() and not path.is_symlink():
            raise UserError(f"{path.parent}: {path.name} is not a regular file") from None
        reason = "" if isinstance(error, FileNotFoundError) else f" ({printable(error)})"
        raise UserError(f"{path.parent}: {path.name} is missing or cannot be read{reason}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise UserError(f"{path.parent}: {path.name} is not a regular file")
    with os.fdopen(descriptor, "rb") as stream:
        if status.st_size > limit:
            raise UserError(f"{path.parent}: {path.name} has {status.st_size} bytes; at most {limit} are read")
        yield stream


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file. Raises ``UserError`` that names the file."""
    with open_regular(path, limits.JSON_BYTES) as stream:
        content = stream.read(limits.JSON_BYTES + 1)
    try:
        parsed = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise UserError(_describe_depth(path)) from None
    except ValueError:
        raise UserError(f"{path.parent}: {path.name} is not valid JSON (truncated?)") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path.parent}: {path.name} does not hold a JSON object")
    if _is_deeper(parsed, limits.JSON_DEPTH):
        raise UserError(_describe_depth(path))
    return parsed


def sha256(path: Path, limit: int = limits.WEIGHT_FILE_BYTES) -> str:
    """Hex digest of the content of a file. Raises ``UserError`` as ``open_regular``."""
    with open_regular(path, limit) as stream:
        return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()


def _describe_depth(path: Path) -> str:
    return f"{path.parent}: {path.name} has more than {limits.JSON_DEPTH} lists and objects inside each other"


def _is_deeper(content: Any, depth: int) -> bool:
    """Whether lists and objects lie deeper inside each other than ``depth``."""
    level = [content]
    for _ in range(depth):
        level = [
            part
            for node in level
            for part in (node.values() if isinstance(node, dict) else node)
            if isinstance(part, dict | list)
        ]
        if not level:
            return False
    return True
