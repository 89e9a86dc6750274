"""A second copy of a checkpoint whose weights take no further space where the file system has hard links."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lm_ortho.checkpoint.extra_files import copy_file
from lm_ortho.checkpoint.input_files import read_json
from lm_ortho.checkpoint.manifest import MANIFEST_FILE, read_manifest
from lm_ortho.checkpoint.write import write_json


def duplicate(source: Path, target: Path, meta: Mapping[str, Any]) -> bool:
    """Makes the empty folder ``target`` a copy of the checkpoint ``source`` with another ``meta`` in its manifest.

    Weights are hard links where that is possible, because nothing writes to them in place; other files are copied, so
    that a changed configuration or tokenizer of one is not that of the other. Hashes stay those of ``source``, so
    loading the copy verifies every file.

    Returns:
        Whether all weights are links.

    Raises:
        UserError: for a file that is missing, or whose content is not that of the manifest where it is copied.
        OSError: if ``target`` cannot be written.
    """
    manifest, is_linked = read_manifest(source), True
    for name, record in manifest.files.items():
        if name.endswith(".safetensors"):
            if _link(source, name, target):
                continue
            is_linked = False
        copy_file(source, name, target, record)
    write_json(target / MANIFEST_FILE, {**read_json(source / MANIFEST_FILE), "meta": dict(meta)})
    return is_linked


def _link(source: Path, name: str, target: Path) -> bool:
    """Whether a file became a hard link; not possible across file systems, and on some of them."""
    parts = PurePosixPath(name).parts
    path, link = source.joinpath(*parts), target.joinpath(*parts)
    if path.is_symlink() or not path.is_file():
        return False
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, link)
    except OSError:
        return False
    return True
