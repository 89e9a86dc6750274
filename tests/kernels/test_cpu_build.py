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
from lm_ortho.kernels import cpu, dispatch
from lm_ortho.kernels.cpu import build, library

from lm_ortho import kernels
from lm_ortho.layer import OrthoLinear
from tests.support import tiny
from tests.support.paths import REPOSITORY

HERE = Path(__file__).parent
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler"
)


@pytest.fixture
def looks_again(monkeypatch):
    """The library is looked for again, during the test and after it."""
    monkeypatch.setattr(library, "_found", None)
    dispatch.forget_decisions()
    yield
    dispatch.forget_decisions()


@needs_compiler
def test_no_memory_access_goes_astray(tmp_path):
    program = tmp_path / "driver"
    command = [*build.compiler(), "-std=c++17", "-O1", "-g0", "-fsanitize=address", "-pthread", f"-I{build.HERE}"]
    command += [flag for flag in build.flags() if not flag.startswith("-O")]
    objects = []
    running = []
    for name, own in {**build.sources(), "driver": ()}.items():
        source = HERE / "asan_driver.cpp" if name == "driver" else build.HERE / f"{name}.cpp"
        objects.append(str(tmp_path / f"{name}.o"))
        running.append(subprocess.Popen([*command, *own, "-c", str(source), "-o", objects[-1]]))
    assert [process.wait(timeout=200) for process in running] == [0] * len(running)
    linked = subprocess.run([*command, *objects, "-o", str(program), "-ldl"], capture_output=True, text=True)
    if linked.returncode and "asan" in linked.stderr:
        pytest.skip("the compiler comes without AddressSanitizer")
    assert linked.returncode == 0, linked.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agrees" in done.stdout


@needs_compiler
def test_the_library_is_compiled_once_and_found_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path))
    made = build.cached_library()
    assert made.parent == tmp_path / "kernels"
    before = made.stat().st_mtime_ns
    assert build.cached_library() == made
    assert made.stat().st_mtime_ns == before
    assert [path.name for path in made.parent.iterdir()] == [made.name]
    monkeypatch.setattr(build, "COMMON", (*build.COMMON, "-DOTHER"))
    assert build.key() not in made.name


def test_the_cache_folder_is_that_of_the_platform(monkeypatch):
    import platformdirs

    monkeypatch.delenv("LM_ORTHO_CACHE", raising=False)
    if sys.platform == "linux":
        assert build.cache_folder() == Path(platformdirs.user_cache_dir("lm-ortho")) / "kernels"


@needs_compiler
def test_a_compiler_that_fails_is_told_in_one_line(tmp_path, monkeypatch):
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit 0\necho "x.cpp:1: error: no" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match=r"^c\+\+ failed: x.cpp:1: error: no$"):
        build.cached_library()
    assert list((tmp_path / "cache" / "kernels").iterdir()) == []


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("off", "LM_ORTHO_CPU_KERNEL=off"),
        ("unknown", "LM_ORTHO_CPU_KERNEL=mmx is unknown"),
        ("no compiler", "no C++ compiler found"),
        ("darwin", "built on Linux only, not on darwin"),
        ("win32", "built on Linux only, not on win32"),
        ("unwritable", "cannot be written"),
    ],
)
def test_without_the_library_plain_torch_runs_and_says_so_once(way, reason, tmp_path, monkeypatch, looks_again, caplog):
    monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "BUNDLED", "nothing.so")
    if way in ("off", "unknown"):
        monkeypatch.setenv(library.SWITCH, "off" if way == "off" else "mmx")
    elif way == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif way == "unwritable":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path / "file"))
    else:
        monkeypatch.setattr(build.sys, "platform", way)
    layers = [OrthoLinear.from_streams(tiny.layer_streams(torch.randn(1024, 1024), seed=seed)) for seed in (0, 1)]
    kernels.reset_calls()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for layer in (*layers, *layers):
            layer(torch.randn(2, 1024).bfloat16())
    assert kernels.calls() == {"reference.base": 4}
    (line,) = [record.message for record in caplog.records if "kernel cpu" in record.message]
    assert reason in line
    assert "\n" not in line


@pytest.mark.skipif(isinstance(cpu.find(), cpu.Absent), reason="the CPU kernel is not there")
@pytest.mark.parametrize("isa", cpu.ISAS)
def test_the_switch_limits_the_instruction_set(isa, monkeypatch, looks_again):
    widest = cpu.find().isa
    cpu.forget()
    monkeypatch.setenv(library.SWITCH, isa)
    assert cpu.find().isa == min(isa, widest, key=cpu.ISAS.index)


def test_doctor_names_the_kernel_and_the_reason(monkeypatch, looks_again):
    from lm_ortho.cli.doctor import _kernel

    if isinstance(cpu.find(), cpu.Library) and not torch.cuda.is_available():
        assert _kernel().status == "ok"
        assert cpu.find().isa in _kernel().found
    cpu.forget()
    dispatch.forget_decisions()
    monkeypatch.setenv(library.SWITCH, "off")
    if not torch.cuda.is_available():
        assert _kernel().status == "warn"
        assert f"{library.SWITCH}=off" in _kernel().found


def test_a_stray_import_of_the_folder_registers_nothing():
    """transformers imports whatever is called ``kernels`` on the path."""
    code = "import kernels, lm_ortho.kernels as ours; from lm_ortho.kernels.cpu.op import operator; operator()"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60, cwd=REPOSITORY)
