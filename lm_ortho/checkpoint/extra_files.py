"""The files that are copied from a checkpoint besides weights and configuration: tokenizer, templates, own code."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from lm_ortho.checkpoint.manifest import FileRecord
from lm_ortho.errors import UserError, printable

_TOKENIZER_FILE = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template|tekken|normalizer|emoji|encoder"
    r"|byte_maps|word_shape|word_pronunciation|(\w+[_-])?vocab([_-]\w+)?)\.json"
    r"|(vocab|merges|dict)\.txt"
    r"|[\w.-]+\.(model|tiktoken|spm|jinja|tokenizer)"
    r"|bpe\.codes"
    r"|additional_chat_templates/[\w.-]+\.jinja",
    re.ASCII,
)
"""Names of the files that transformers' tokenizers write, inside a checkpoint."""
_CODE_FILE = re.compile(r"([\w-]+/)*[\w-]+\.py", re.ASCII)
_CHUNK = 1 << 20


def is_tokenizer_file(name: str) -> bool:
    """Whether ``name``, a path inside a checkpoint, is a file of a tokenizer or a chat template."""
    return bool(_TOKENIZER_FILE.fullmatch(name))


def is_code_file(name: str) -> bool:
    """Whether ``name``, a path inside a checkpoint, is Python code."""
    return bool(_CODE_FILE.fullmatch(name))


def copy_extra_files(
    source: Path,
    target: Path,
    listed_files: Mapping[str, FileRecord],
    names: Iterable[str] | None = None,
    *,
    with_code: bool = False,
) -> list[str]:
    """Copies a tokenizer from ``source`` to ``target``, with ``with_code`` also a model's own code; returns the names.

    ``names`` are those of ``listed_files`` by default. Names outside the list of what a tokenizer has are left out,
    and so are files that ``target`` has already, in any case of letters. A file of ``listed_files`` must have the
    sha256 of its record; any other one must be inside ``source`` after its links are followed, or in the store of
    the hub cache that ``source`` belongs to.

    Raises:
        UserError: for a link that leads out of the checkpoint, for anything but a regular file, and for other content
            than that of the record.
    """
    copied_names = list[str]()
    written_names = {path.relative_to(target).as_posix().casefold() for path in target.rglob("*")}
    for name in dict.fromkeys(listed_files if names is None else names):
        is_allowed = is_tokenizer_file(name) or (with_code and is_code_file(name))
        if is_allowed and name.casefold() not in written_names:
            copy_file(source, name, target, listed_files.get(name))
            written_names.add(name.casefold())
            copied_names.append(name)
    return copied_names


def copy_file(source: Path, name: str, target: Path, record: FileRecord | None) -> None:
    """Copies the file ``name`` of a checkpoint into ``target``; the rules and errors of ``copy_extra_files``."""
    path = follow_links(source, name, is_listed=record is not None)
    copy = target.joinpath(*PurePosixPath(name).parts)
    copy.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        # Without O_NONBLOCK a named pipe would wait for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise UserError(f"{source}: {name} is not a regular file")
            with copy.open("xb") as out:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
    except FileNotFoundError:
        raise UserError(f"{source}: {name} is missing") from None
    if record is not None and digest.hexdigest() != record.sha256:
        copy.unlink()
        raise UserError(f"{source}: {name} was changed after it was written (its sha256 differs)")


def follow_links(source: Path, name: str, *, is_listed: bool) -> Path:
    """The file behind ``name``; raises ``UserError`` for an unlisted one that a link takes out of the checkpoint.

    The content of a listed file is compared with its record instead. In the cache of the Hugging Face hub every file
    is a link from `snapshots/<commit>` to `blobs` of the same repository.
    """
    root = source.resolve()
    try:
        path = root.joinpath(*PurePosixPath(name).parts).resolve(strict=True)
    except FileNotFoundError:
        raise UserError(f"{source}: {name} is missing") from None
    except (OSError, RuntimeError) as error:  # a circle of links
        raise UserError(f"{source}: {name} cannot be read ({printable(error)})") from None
    snapshots = (folder for folder in root.parents if folder.name == "snapshots")
    blobs = [folder.with_name("blobs") for folder in snapshots]
    if not (is_listed or path.parent in blobs or path.is_relative_to(root)):
        raise UserError(f"{source}: {name} is a link that leads out of the checkpoint; replace it by the file itself")
    return path
