"""``lm-ortho doctor``: how lm-eval finds us here, and what would break it."""

from __future__ import annotations

import json
import os
import platform
import site
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer

import lm_ortho
from lm_ortho.errors import UserError
from lm_ortho.plugin import startup

LIBRARIES = ("torch", "transformers", "lm_eval", "peft", "datasets", "tokenizers")
STARTUP_FILES = ("lm_ortho.pth", "lm_ortho.start")
HOOK = "start-up hook"
ENTRY_POINT = "entry point"
NONE = "none"


@dataclass(frozen=True)
class Check:
    """One fact; ``advice`` says what to do where ``status`` is not ok."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say which way lm-eval finds libortho here, and what would break it (exit code 1 if it does not)."""
    checks = list(_checks())
    broken = any(check.status == "fail" for check in checks)
    if as_json:
        report = {"active": active_way(), "ok": not broken, "checks": [asdict(check) for check in checks]}
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_table(checks)
        typer.echo(f"way to libortho: {active_way()}")
    raise typer.Exit(1 if broken else 0)


def active_way() -> str:
    """How a plain ``lm_eval`` command reaches our model in this environment."""
    if startup.installed():
        return HOOK
    return ENTRY_POINT if _scans_entry_points() else NONE


def _checks() -> Iterator[Check]:
    yield Check("lm-ortho", "ok", f"{lm_ortho.__version__} in {Path(lm_ortho.__path__[0])}")
    yield Check("python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield from (_library(name) for name in LIBRARIES)
    yield _site()
    yield _startup_file()
    yield _switch()
    if _library("lm_eval").status == "ok":  # else that it is missing has been said
        yield _way()
        yield _model()
        yield _tasks()
    yield _weights()
    yield _device()
    yield _bfloat16()
    yield _kernel()


def _library(name: str) -> Check:
    try:
        return Check(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", f"pip install {name}")


def _site() -> Check:
    if sys.flags.no_site:
        return Check("site", "fail", "python -S", "without site no .pth file is read; use `lm-ortho eval`")
    return Check("site", "ok", "enabled")


def site_folders() -> list[Path]:
    """The folders whose ``.pth`` files this interpreter reads at its start."""
    folders = site.getsitepackages()
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return [Path(folder) for folder in folders]


def _startup_file() -> Check:
    found = [file for folder in site_folders() for name in STARTUP_FILES if (file := folder / name).is_file()]
    if found:
        return Check("start-up file", "ok", ", ".join(map(str, found)))
    package = Path(lm_ortho.__path__[0]).parent
    if any((package / name).is_file() for name in STARTUP_FILES):
        reason = f"only in {package}, which is no site folder (pip --target, PYTHONPATH)"
    else:
        reason = "missing"
    return Check("start-up file", "fail", reason, "pip install into the environment, or use `lm-ortho eval`")


def _switch() -> Check:
    value = os.environ.get(startup.SWITCH)
    if value == "0":
        return Check(startup.SWITCH, "fail", "0: hook switched off", "unset it, or use `lm-ortho eval`")
    return Check(startup.SWITCH, "ok", "not set" if value is None else value)


def _scans_entry_points() -> bool:
    from lm_eval.api import registry

    return hasattr(registry, "load_plugins")


def _way() -> Check:
    way = active_way()
    if way == HOOK:
        return Check("way", "ok", way)
    if way == ENTRY_POINT:
        return Check("way", "warn", f"{way}: the model only", "for our tasks use `lm-ortho eval`")
    return Check("way", "fail", "lm_eval does not know us", "use `lm-ortho eval` in place of `lm_eval`")


def _model() -> Check:
    import lm_eval.models  # noqa: F401
    from lm_eval.api import registry

    from lm_ortho.plugin.bridges import MODEL_NAME

    if hasattr(registry, "load_plugins"):
        named = [entry.name for entry in metadata.entry_points(group="lm_eval.models")]
        known = MODEL_NAME in named
    else:
        known = MODEL_NAME in registry.model_registry
    if known:
        return Check("model", "ok", f"lm_eval knows {MODEL_NAME}")
    return Check("model", "fail", f"lm_eval does not know {MODEL_NAME}", "see `way` above")


def _tasks() -> Check:
    from lm_eval.tasks.manager import TaskManager

    from lm_ortho.plugin.bridges import tasks_bridged, tasks_dir

    try:
        folder = tasks_dir()
    except FileNotFoundError as error:
        return Check("tasks", "fail", str(error), "reinstall lm-ortho")
    found = f"{sum(1 for _ in folder.rglob('*.yaml'))} task files in {folder}"
    if tasks_bridged(TaskManager):
        return Check("tasks", "ok", found)
    return Check("tasks", "fail", f"{found}, not seen by lm_eval", f"add `--include_path {folder}`")


def _weights() -> Check:
    from lm_ortho import world

    try:
        return Check("embedded model", "ok", str(world.path("decomposed")))
    except UserError as error:
        return Check("embedded model", "fail", str(error), "or name a model of your own with `pretrained=`")


def _device() -> Check:
    import torch

    threads = f"{torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        return Check("device", "ok", f"cuda: {torch.cuda.get_device_name()}; cpu: {threads}")
    return Check("device", "ok", f"cpu: {torch.backends.cpu.get_cpu_capability()}, {threads}")


def _bfloat16() -> Check:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return Check("bfloat16", "ok", "in hardware (cuda)")
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Check("bfloat16", "ok", "in hardware (cpu)")
    return Check("bfloat16", "warn", "emulated on this cpu", "slow; `dtype=float32` is faster here")


def _kernel() -> Check:
    """What computes the products of a large decomposed model here, in BF16, with ``kernel=auto``."""
    import torch

    from lm_ortho.kernels import AUTO, Ask, choose, cpu

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = choose(AUTO, Ask(device, torch.bfloat16, 1, 4096, 4096, 4, 64))
    library = cpu.find()
    where = f"{library.isa}, {library.path}" if isinstance(library, cpu.Library) else library.why
    name = chosen.implementation.name
    if name == "cpu":
        return Check("kernel", "ok", f"cpu: {where}")
    if name != "reference":
        return Check("kernel", "ok", f"{name}: {chosen.reason}")
    return Check("kernel", "warn", f"reference: {chosen.reason}", "plain PyTorch: slower; install a C++ compiler (g++)")


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("check", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    colour = {"ok": "green", "warn": "yellow", "fail": "red"}
    for check in checks:
        status = f"[{colour[check.status]}]{check.status}[/]"
        table.add_row(check.name, status, check.found, check.advice)
    Console().print(table)
