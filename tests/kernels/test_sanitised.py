"""The tests of the C++ kernel and the fuzzed layers once more, with the library compiled for AddressSanitizer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lm_ortho.kernels.cpu import build
from tests.support.paths import REPOSITORY

FLAGS = ("-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TESTS = (
    "tests/kernels/test_checks.py",
    "tests/kernels/test_cpu_kernel.py",
    "tests/kernels/test_dispatch.py",
    "tests/streams/test_validation.py",
    "tests/fuzz/test_checkpoints.py",
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the library is built on Linux only")
def test_the_kernel_tests_touch_no_memory_that_is_not_theirs(tmp_path: Path) -> None:
    runtime = find_runtime()
    cache = tmp_path / "cache"
    library = cache / "kernels" / f"dual_stream-{build.key()}.so"
    library.parent.mkdir(parents=True)
    build.compile_library(library, FLAGS)
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",  # the interpreter frees little at its end
        "LM_ORTHO_CACHE": str(cache),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    assert overflows(environment), "AddressSanitizer does not see an access beside an array"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *TESTS]
    process = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=1800, check=False
    )
    output = process.stdout + process.stderr
    assert process.returncode == 0, output[-6000:]
    assert "ERROR: AddressSanitizer" not in output
    assert "runtime error:" not in output
    assert re.search(r"\d+ passed", output), output[-2000:]
    assert "skipped" not in output, "the kernel was not found"


def overflows(environment: dict[str, str]) -> bool:
    """Whether a deliberate lie about a size is caught, so that silence means something."""
    code = """
import ctypes, torch
from lm_ortho.kernels import cpu
functions = cpu.require_library().functions
codes, scales = torch.zeros(64 * 64, dtype=torch.int8), torch.zeros(64, dtype=torch.uint8)
panels = torch.zeros(128 + 8 * 256, dtype=torch.uint8)
functions.lm_ortho_pack_base(
    codes.data_ptr(), codes.numel(), scales.data_ptr(), 64, 64, 64, 64, 1, panels.data_ptr(), panels.numel()
)
"""
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return "heap-buffer-overflow" in process.stderr


def find_runtime() -> str:
    """The shared library of AddressSanitizer of the compiler; skips the test where there is none."""
    try:
        command = build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    process = subprocess.run([*command, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    runtime = process.stdout.strip()
    if not Path(runtime).is_file():
        pytest.skip("the compiler comes without a shared AddressSanitizer")
    return str(Path(runtime).resolve())
