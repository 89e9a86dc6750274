"""Verifies the files of a checkpoint: each is as it was written, and no other weights would be read instead.

Only files of the manifest are read: the base stream is in files named `base`, the ortho streams in files named `ortho`.
Other files in the directory are left alone, except those from which transformers would load another model: they are
refused by name, because transformers prefers them to the index.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from lm_ortho.checkpoint import limits
from lm_ortho.checkpoint.extra_files import is_code_file, is_tokenizer_file
from lm_ortho.checkpoint.input_files import open_regular, read_json, sha256
from lm_ortho.checkpoint.manifest import (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    OTHER_MODEL_FILES,
    Manifest,
    is_base_file,
    ortho_file,
    read_libortho_settings,
    read_manifest,
)
from lm_ortho.checkpoint.settings import check_references, check_settings, check_sizes, check_version
from lm_ortho.errors import UserError, printable
from lm_ortho.files import temporary_name
from lm_ortho.runtime.progress import track
from lm_ortho.streams import DEFAULT_MEMORY


def verify_checkpoint(path: Path, *, trust_remote_code: bool = False) -> Manifest:
    """Checks a local checkpoint before anything is built from it; returns its manifest.

    Ortho files may be missing.

    Raises:
        UserError: unless every file is as it was written, the configuration is within ``limits``, and transformers
            would read no weights but those of the manifest.
    """
    # 1. The configuration: of this package, and nothing that would fill the memory.
    if not path.is_dir():
        raise UserError(
            f"{path} is not a checkpoint: there is no such directory (a model of the hub is loaded by "
            "AutoModelForCausalLM.from_pretrained)"
        )
    if not os.path.lexists(path / CONFIG_FILE):
        raise UserError(f"{path} is not a checkpoint: it has no {CONFIG_FILE}")
    settings = read_libortho_settings(path / CONFIG_FILE)
    if settings is None:
        raise UserError(f"{path} is not an lm-ortho checkpoint: its {CONFIG_FILE} names no libortho quantization")
    check_version(settings.get("format_version"), path)
    check_settings(settings, path)
    config = read_json(path / CONFIG_FILE)
    check_references(config, f"{path}: {CONFIG_FILE}")
    check_sizes(config, f"{path}: {CONFIG_FILE}")
    # 2. The files, by name.
    if not os.path.lexists(path / MANIFEST_FILE):
        raise UserError(f"{path}: {MANIFEST_FILE} is missing; the checkpoint is incomplete")
    manifest = read_manifest(path)
    check_unlisted_files(path, manifest, with_code=trust_remote_code)
    _check_sizes_of_files(path, manifest)
    # 3. Their content.
    ortho_files = [ortho_file(name) for name in settings.get("memories") or [DEFAULT_MEMORY]]
    verify_files(path, manifest, {**dict.fromkeys((CONFIG_FILE, INDEX_FILE)), **manifest.files}, optional=ortho_files)
    present = [name for name in ortho_files if name not in manifest.files and os.path.lexists(path / name)]
    verify_files(path, manifest, present)
    read_base_files(path, manifest)
    return manifest


def verify_files(directory: Path, manifest: Manifest, names: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Raises ``UserError`` for a file that differs from its record; ``optional`` ones may be missing."""
    optional_names = set(optional)
    for name in track(list(names), "verifying", str(directory)):
        path = directory / name
        record = manifest.files.get(name)
        if record is None:
            raise UserError(f"{directory}: {name} is not listed in {MANIFEST_FILE}")
        if not os.path.lexists(path):
            if name in optional_names:
                continue
            raise UserError(f"{directory}: {name} is missing")
        limit = limits.WEIGHT_FILE_BYTES if name.endswith(".safetensors") else limits.OTHER_FILE_BYTES
        with open_regular(path, limit) as stream:
            size = os.fstat(stream.fileno()).st_size
        if size != record.bytes:
            raise UserError(
                f"{directory}: {name} has {size} bytes, not {record.bytes} as in the manifest: truncated or replaced"
                f"{_describe_acceptance(directory, name)}"
            )
        if sha256(path, limit) != record.sha256:
            raise UserError(
                f"{directory}: {name} was changed after it was written (its sha256 differs)"
                f"{_describe_acceptance(directory, name)}"
            )


def check_regular_files(directory: Path) -> None:
    """Raises ``UserError`` for weights or JSON that are no regular files; transformers would wait for a named pipe."""
    for name in os.listdir(directory):
        path = directory / name
        is_input = name.endswith((".safetensors", ".bin")) or (name.endswith(".json") and not os.path.isdir(path))
        if is_input and os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{directory}: {printable(name)} is not a regular file")


def _check_sizes_of_files(directory: Path, manifest: Manifest) -> None:
    """Raises ``UserError`` for files that would take hours to hash."""
    weights = sum(record.bytes for name, record in manifest.files.items() if name.endswith(".safetensors"))
    others = sum(record.bytes for record in manifest.files.values()) - weights
    for kind, size, limit in (
        ("safetensors", weights, limits.WEIGHT_FILE_BYTES),
        ("other", others, limits.OTHER_FILE_BYTES),
    ):
        if size > limit:
            raise UserError(
                f"{directory}: {MANIFEST_FILE} lists {size} bytes in {kind} files; at most {limit} are read"
            )


def check_unlisted_files(directory: Path, manifest: Manifest, *, with_code: bool = False) -> None:
    """Checks the names in a directory: what transformers reads beside the weights must be in the manifest.

    Raises:
        UserError: for weights of another model, for a generation configuration that is not listed, and, if code of
            the checkpoint may be run, for Python files that are not listed.
    """
    names = os.listdir(directory)
    for name in names:
        if any(fnmatchcase(name, pattern) for pattern in OTHER_MODEL_FILES):
            raise UserError(
                f"{directory}: {printable(name)} is not part of the checkpoint, but transformers would load it; "
                "delete it"
            )
    if GENERATION_FILE in names and GENERATION_FILE not in manifest.files:
        raise UserError(f"{directory}: {GENERATION_FILE} is not listed in {MANIFEST_FILE}; delete it, or save again")
    if not with_code:
        return
    for path in directory.rglob("*.py"):
        code = path.relative_to(directory).as_posix()
        if code not in manifest.files:
            raise UserError(f"{directory}: {printable(code)} is code that is not listed in {MANIFEST_FILE}; delete it")


def read_base_files(directory: Path, manifest: Manifest) -> list[str]:
    """The names of the files of the base stream, from the index; verified before.

    Raises:
        UserError: for an index that is no table of files, names other files, or leaves one of the manifest out.
    """
    weight_map = read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{directory}: {INDEX_FILE} has no weight_map")
    for file in weight_map.values():
        check_base_file(directory, manifest, file)
    files = sorted(set(weight_map.values()))
    unused = sorted(name for name in manifest.files if is_base_file(name) and name not in files)
    if unused:
        raise UserError(f"{directory}: {INDEX_FILE} does not name {unused[0]}")
    return files


def check_base_file(directory: Path, manifest: Manifest, file: object) -> None:
    """Raises ``UserError`` unless ``file`` is the name of a file of the base stream that the manifest lists."""
    if not isinstance(file, str) or not is_base_file(file):
        raise UserError(
            f"{directory}: weights would be read from {printable(repr(file), 80)}; the base stream is in "
            "base.safetensors, or in base-00001-of-00002.safetensors and so on"
        )
    if file not in manifest.files:
        raise UserError(f"{directory}: {file} is not listed in {MANIFEST_FILE}")


def find_directory(files: Sequence[Path], source: str) -> Path:
    """The directory of the checkpoint from which transformers is about to read ``files``.

    Args:
        files: the files of the base stream.
        source: the model that was asked for: a directory, or a repository of the hub.

    Raises:
        UserError: for files of several directories, and for a folder inside another checkpoint, whose configuration
            would be read without being verified.
    """
    directory = files[0].parent
    if any(file.parent != directory for file in files):
        other = next(file for file in files if file.parent != directory)
        raise UserError(f"{directory}: weights would be read from {printable(other)}, too; they are in one directory")
    for parent in directory.absolute().parents:
        is_root = parent.parent.name == "snapshots" or (bool(source) and parent == Path(source).absolute())
        if (
            is_root
            and os.path.lexists(parent / CONFIG_FILE)
            and read_libortho_settings(parent / CONFIG_FILE) is not None
        ):
            raise UserError(f"{parent}: weights would be read from {printable(directory)}; name that directory instead")
        if is_root:
            break
    return directory


def accept_tokenizer(directory: Path) -> list[str]:
    """Records the tokenizer files of a checkpoint as they are now; returns the names of those that changed.

    Files that were deleted leave the manifest, new ones enter it. All other records stay.

    Raises:
        UserError: for a directory without a manifest, and for a file that is no regular one.
    """
    manifest = read_manifest(directory)
    paths = [path for pattern in ("*", "additional_chat_templates/*") for path in directory.glob(pattern)]
    present = {path.relative_to(directory).as_posix() for path in paths if not path.is_dir()}
    names = {name for name in (*manifest.files, *present) if is_tokenizer_file(name)}
    content = read_json(directory / MANIFEST_FILE)
    changed_names = []
    for name in sorted(names):
        record = content["files"].pop(name, None)
        if name in present:
            path = directory / name
            content["files"][name] = {"sha256": sha256(path, limits.OTHER_FILE_BYTES), "bytes": path.stat().st_size}
        if content["files"].get(name) != record:
            changed_names.append(name)
    if changed_names:
        scratch = directory / temporary_name(directory / MANIFEST_FILE)
        scratch.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(scratch, directory / MANIFEST_FILE)
    return changed_names


def _describe_acceptance(directory: Path, name: str) -> str:
    """What to do where the file of a tokenizer was changed on purpose; nothing for other files."""
    if not is_tokenizer_file(name) or is_code_file(name):
        return ""
    return (
        f"; if you changed the tokenizer or its chat template, `lm-ortho inspect {directory} --accept-tokenizer` "
        "records its files as they are now, and `tokenizer=DIR` takes another tokenizer without a change here"
    )
