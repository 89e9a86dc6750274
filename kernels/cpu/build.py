"""Compiles the C++ of this folder, when a wheel is built or at first use.

The build hook of the package runs it where torch is not installed, so only the standard library is imported.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
BUNDLED = "dual_stream.so"
"""File name of the library in a wheel that was built where a compiler is."""
COMMON = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fvisibility=hidden")
# The headers of GCC leave "undefined" vectors uninitialised on purpose; vectors never cross a border of the ABI.
QUIET = ("-Wall", "-Wextra", "-Werror=return-type", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi")
SOURCES: dict[str, tuple[str, ...]] = {"api": (), "pack": (), "threads": (), "scalar": (), "probe": ()}
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mfma")
X86_SOURCES: dict[str, tuple[str, ...]] = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": _AVX512,
    "avx512_sparse": _AVX512,
    "avx512_probe": _AVX512,
}
SECONDS = 300.0
"""Time limit of one compiler call; a compiler that takes longer hangs."""


class BuildError(Exception):
    """The library cannot be compiled; the message is the reason, in one line."""


def sources() -> dict[str, tuple[str, ...]]:
    """Names of the C++ files for this processor, with the flags each needs beside ``COMMON``."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {**SOURCES, **(X86_SOURCES if x86 else {})}


def flags() -> list[str]:
    """The compiler flags of all files."""
    return [*COMMON, *QUIET, *(["-DLM_ORTHO_X86"] if "avx512" in sources() else [])]


def compiler() -> list[str]:
    """The command of the C++ compiler: ``$CXX``, or the first of g++, clang++ and c++. Raises ``BuildError``."""
    if sys.platform != "linux":
        raise BuildError(f"it is built on Linux only, not on {sys.platform}")
    custom_command = shlex.split(os.environ.get("CXX", ""))
    for command in [custom_command] if custom_command else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler found ({custom_command[0] if custom_command else 'g++, clang++, c++'})")


def key() -> str:
    """Hash of all that determines the library: the sources, the flags, the compiler and its version."""
    command = compiler()
    digest = hashlib.sha256()
    for path in sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    version = _run([*command, "--version"]).splitlines()[:1]
    digest.update(repr((command, version, flags(), sources(), platform.machine())).encode())
    return digest.hexdigest()[:24]


def cache_folder() -> Path:
    """The folder of libraries compiled at first use: ``kernels`` in ``LM_ORTHO_CACHE`` or the user's cache folder.

    It is the same as ``platformdirs.user_cache_dir("lm-ortho")`` on Linux, the one platform that compiles.
    """
    cache = os.environ.get("LM_ORTHO_CACHE")
    user_cache = os.environ.get("XDG_CACHE_HOME", "").strip() or os.path.expanduser("~/.cache")
    return (Path(cache) if cache else Path(user_cache) / "lm-ortho") / "kernels"


def cached_library() -> Path:
    """The library of exactly these sources, compiled if it is not in the cache. Raises ``BuildError``."""
    target = cache_folder() / f"dual_stream-{key()}.so"
    if not target.is_file():
        try:
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            compile_library(target)
        except OSError as error:
            raise BuildError(f"{target.parent} cannot be written ({error.strerror})") from None
    return target


def compile_library(target: Path, extra: tuple[str, ...] = ()) -> None:
    """Compiles the shared library ``target``, completely or not at all. Raises ``BuildError``.

    Two processes may do so at once: each writes under a temporary name of its own and renames.
    """
    command = compiler()
    with tempfile.TemporaryDirectory() as scratch:

        def compile_object(name: str, file_flags: tuple[str, ...]) -> str:
            path = f"{scratch}/{name}.o"
            _run([*command, *flags(), *extra, *file_flags, "-c", str(HERE / f"{name}.cpp"), "-o", path])
            return path

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_object, sources().keys(), sources().values()))
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")
        try:
            link_flags = ["-shared", "-static-libstdc++", "-static-libgcc", "-pthread", "-ldl"]
            _run([*command, *extra, *objects, "-o", str(temporary), *link_flags])
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    """Runs a command and returns its output. Raises ``BuildError`` with its first error."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from None
    if process.returncode:
        output = process.stderr.splitlines()
        lines = [line for line in output if "error" in line] or output or ["?"]
        raise BuildError(f"{Path(command[0]).name} failed: {lines[0].strip()}")
    return process.stdout
