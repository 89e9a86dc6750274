"""The C++ kernel as a library: compiled, cached, found, missing, and free of stray memory accesses."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lm_ortho import kernels
from lm_ortho.kernels import cpu, dispatch
from lm_ortho.kernels.cpu import build, library
from lm_ortho.layer import OrthoLinear
from tests.support import tiny
from tests.support.paths import REPOSITORY

HERE = Path(__file__).parent
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler"
)


@pytest.fixture
def fresh_library(monkeypatch):
    """Searches for the library again, during the test and after it."""
    monkeypatch.setattr(library, "_library", None)
    dispatch.forget_choices()
    yield
    dispatch.forget_choices()


@needs_compiler
def test_no_memory_access_is_out_of_bounds(tmp_path):
    program = tmp_path / "driver"
    command = [
        *build.compiler(),
        "-std=c++17",
        "-O1",
        "-g0",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-pthread",
        f"-I{build.HERE}",
    ]
    command += [flag for flag in build.flags() if not flag.startswith("-O")]
    objects = []
    compilers = []
    for name, file_flags in {**build.sources(), "driver": ()}.items():
        source = HERE / "asan_driver.cpp" if name == "driver" else build.HERE / f"{name}.cpp"
        objects.append(str(tmp_path / f"{name}.o"))
        compilers.append(subprocess.Popen([*command, *file_flags, "-c", str(source), "-o", objects[-1]]))
    assert [process.wait(timeout=200) for process in compilers] == [0] * len(compilers)
    link_process = subprocess.run([*command, *objects, "-o", str(program), "-ldl"], capture_output=True, text=True)
    if link_process.returncode and "asan" in link_process.stderr:
        pytest.skip("the compiler comes without AddressSanitizer")
    assert link_process.returncode == 0, link_process.stderr
    process = subprocess.run([str(program)], capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "agrees" in process.stdout
    assert "2000 hostile inputs" in process.stdout


@needs_compiler
def test_the_library_is_compiled_once_and_cached_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path))
    path = build.cached_library()
    assert path.parent == tmp_path / "kernels"
    before = path.stat().st_mtime_ns
    assert build.cached_library() == path
    assert path.stat().st_mtime_ns == before
    assert [path.name for path in path.parent.iterdir()] == [path.name]
    monkeypatch.setattr(build, "COMMON", (*build.COMMON, "-DOTHER"))
    assert build.key() not in path.name


def test_the_cache_folder_is_that_of_the_platform(monkeypatch):
    import platformdirs

    monkeypatch.delenv("LM_ORTHO_CACHE", raising=False)
    if sys.platform == "linux":
        assert build.cache_folder() == Path(platformdirs.user_cache_dir("lm-ortho")) / "kernels"


@needs_compiler
def test_a_compiler_failure_is_reported_in_one_line(tmp_path, monkeypatch):
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit 0\necho "x.cpp:1: error: no" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match=r"^c\+\+ failed: x.cpp:1: error: no$"):
        build.cached_library()
    assert list((tmp_path / "cache" / "kernels").iterdir()) == []


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        ("off", "LM_ORTHO_CPU_KERNEL=off"),
        ("unknown", "LM_ORTHO_CPU_KERNEL=mmx is unknown"),
        ("no compiler", "no C++ compiler found"),
        ("darwin", "built on Linux only, not on darwin"),
        ("win32", "built on Linux only, not on win32"),
        ("unwritable", "cannot be written"),
    ],
)
def test_without_the_library_plain_torch_runs_with_one_warning(
    cause, reason, tmp_path, monkeypatch, fresh_library, caplog
):
    monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "BUNDLED", "nothing.so")
    if cause in ("off", "unknown"):
        monkeypatch.setenv(library.SWITCH, "off" if cause == "off" else "mmx")
    elif cause == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif cause == "unwritable":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path / "file"))
    else:
        monkeypatch.setattr(build.sys, "platform", cause)
    layers = [OrthoLinear.from_streams(tiny.layer_streams(torch.randn(1024, 1024), seed=seed)) for seed in (0, 1)]
    kernels.reset_calls()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for layer in (*layers, *layers):
            layer(torch.randn(2, 1024).bfloat16())
    assert kernels.calls() == {"reference.base": 4}
    (line,) = [record.message for record in caplog.records if "kernel cpu" in record.message]
    assert reason in line
    assert "\n" not in line


@pytest.mark.skipif(isinstance(cpu.find(), cpu.MissingLibrary), reason="the CPU kernel is not available")
@pytest.mark.parametrize("isa", cpu.ISAS)
def test_the_switch_limits_the_instruction_set(isa, monkeypatch, fresh_library):
    widest = cpu.find().isa
    cpu.forget()
    monkeypatch.setenv(library.SWITCH, isa)
    assert cpu.find().isa == min(isa, widest, key=cpu.ISAS.index)


def test_doctor_names_the_kernel_and_the_reason(monkeypatch, fresh_library):
    from lm_ortho.cli.doctor import _check_kernel

    if isinstance(cpu.find(), cpu.Library) and not torch.cuda.is_available():
        assert _check_kernel().status == "ok"
        assert cpu.find().isa in _check_kernel().found
    cpu.forget()
    dispatch.forget_choices()
    monkeypatch.setenv(library.SWITCH, "off")
    if not torch.cuda.is_available():
        assert _check_kernel().status == "warn"
        assert f"{library.SWITCH}=off" in _check_kernel().found


def test_a_stray_import_of_the_folder_registers_nothing():
    """transformers imports any package named ``kernels`` on the path."""
    code = "import kernels, lm_ortho.kernels; from lm_ortho.kernels.cpu.op import operator; operator()"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60, cwd=REPOSITORY)
