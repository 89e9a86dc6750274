"""``lm-ortho doctor``: checks how lm-eval finds our model and tasks here, and what would prevent it."""

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
    """One check of the installation; ``advice`` is what to do if ``status`` is not ok."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print how lm-eval finds libortho here, and what would prevent it (exit code 1 if it does not)."""
    checks = list(_run_checks())
    broken = any(check.status == "fail" for check in checks)
    if as_json:
        report = {"active": find_active_route(), "ok": not broken, "checks": [asdict(check) for check in checks]}
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_table(checks)
        typer.echo(f"way to libortho: {find_active_route()}")
    raise typer.Exit(1 if broken else 0)


def find_active_route() -> str:
    """Returns how a plain ``lm_eval`` command reaches our model in this environment."""
    if startup.is_installed():
        return HOOK
    return ENTRY_POINT if _scans_entry_points() else NONE


def _run_checks() -> Iterator[Check]:
    yield Check("lm-ortho", "ok", f"{lm_ortho.__version__} in {Path(lm_ortho.__path__[0])}")
    yield Check("python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield from (_check_library(name) for name in LIBRARIES)
    yield _check_site()
    yield _check_startup_file()
    yield _check_switch()
    if _check_library("lm_eval").status == "ok":  # else its own check has reported it
        yield _check_route()
        yield _check_model()
        yield _check_tasks()
    if _check_library("peft").status == "ok":
        yield _check_adapters()
    yield _check_weights()
    yield _check_device()
    yield _check_bfloat16()
    yield _check_kernel()


def _check_library(name: str) -> Check:
    try:
        return Check(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", f"pip install {name}")


def _check_site() -> Check:
    if sys.flags.no_site:
        return Check("site", "fail", "python -S", "Python reads no .pth file without site; use `lm-ortho eval`")
    return Check("site", "ok", "enabled")


def list_site_folders() -> list[Path]:
    """Returns the folders whose ``.pth`` files this interpreter reads at its start."""
    folders = site.getsitepackages()
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return [Path(folder) for folder in folders]


def _check_startup_file() -> Check:
    candidates = [folder / name for folder in list_site_folders() for name in STARTUP_FILES]
    if files := [file for file in candidates if file.is_file()]:
        return Check("start-up file", "ok", ", ".join(map(str, files)))
    package = Path(lm_ortho.__path__[0]).parent
    if any((package / name).is_file() for name in STARTUP_FILES):
        reason = f"only in {package}, which is no site folder (pip --target, PYTHONPATH)"
    else:
        reason = "missing"
    return Check("start-up file", "fail", reason, "pip install into the environment, or use `lm-ortho eval`")


def _check_switch() -> Check:
    value = os.environ.get(startup.AUTOLOAD_VARIABLE)
    if value == "0":
        return Check(startup.AUTOLOAD_VARIABLE, "fail", "0: hook switched off", "unset it, or use `lm-ortho eval`")
    return Check(startup.AUTOLOAD_VARIABLE, "ok", "not set" if value is None else value)


def _scans_entry_points() -> bool:
    from lm_eval.api import registry

    return hasattr(registry, "load_plugins")


def _check_route() -> Check:
    route = find_active_route()
    if route == HOOK:
        return Check("way", "ok", route)
    if route == ENTRY_POINT:
        return Check("way", "warn", f"{route}: the model only", "for our tasks use `lm-ortho eval`")
    return Check("way", "fail", "lm_eval does not know us", "use `lm-ortho eval` in place of `lm_eval`")


def _check_model() -> Check:
    import lm_eval.models  # noqa: F401
    from lm_eval.api import registry

    from lm_ortho.plugin.bridges import MODEL_NAME

    if hasattr(registry, "load_plugins"):
        is_registered = MODEL_NAME in [entry.name for entry in metadata.entry_points(group="lm_eval.models")]
    else:
        is_registered = MODEL_NAME in registry.model_registry
    if is_registered:
        return Check("model", "ok", f"lm_eval knows {MODEL_NAME}")
    return Check("model", "fail", f"lm_eval does not know {MODEL_NAME}", "see `way` above")


def _check_tasks() -> Check:
    from lm_eval.tasks.manager import TaskManager

    from lm_ortho.plugin.bridges import find_tasks_dir, is_bridged

    try:
        folder = find_tasks_dir()
    except FileNotFoundError as error:
        return Check("tasks", "fail", str(error), "reinstall lm-ortho")
    description = f"{sum(1 for _ in folder.rglob('*.yaml'))} task files in {folder}"
    if is_bridged(TaskManager):
        return Check("tasks", "ok", description)
    return Check("tasks", "fail", f"{description}, not known to lm_eval", f"add `--include_path {folder}`")


def _check_adapters() -> Check:
    from importlib import import_module

    from lm_ortho.plugin.bridges import ADAPTER_MODULE, has_adapters

    if has_adapters(import_module(ADAPTER_MODULE)):
        return Check("adapters", "ok", "peft adapts decomposed models")
    advice = "load the model with lm_ortho.load, or import lm_ortho.adapter"
    return Check("adapters", "warn", "peft does not know decomposed layers", advice)


def _check_weights() -> Check:
    from lm_ortho import world

    try:
        return Check("embedded model", "ok", str(world.get_path("decomposed")))
    except UserError as error:
        return Check("embedded model", "fail", str(error), "or use your own model with `pretrained=`")


def _check_device() -> Check:
    import torch

    threads = f"{torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        return Check("device", "ok", f"cuda: {torch.cuda.get_device_name()}; cpu: {threads}")
    return Check("device", "ok", f"cpu: {torch.backends.cpu.get_cpu_capability()}, {threads}")


def _check_bfloat16() -> Check:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return Check("bfloat16", "ok", "in hardware (cuda)")
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Check("bfloat16", "ok", "in hardware (cpu)")
    return Check("bfloat16", "warn", "emulated on this cpu", "slow; `dtype=float32` is faster here")


def _check_kernel() -> Check:
    """Checks which kernel multiplies the layers of a large decomposed model here, in BF16, with ``kernel=auto``."""
    import torch

    from lm_ortho.kernels import AUTO, ProductSpec, choose, cpu

    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = ProductSpec(device, torch.bfloat16, rows=1, out_features=4096, in_features=4096, bits=4, group_size=64)
    choice = choose(AUTO, problem)
    library = cpu.find()
    name = choice.implementation.name
    if name == "cpu":
        details = f"{library.isa}, {library.path}" if isinstance(library, cpu.Library) else library.reason
        return Check("kernel", "ok", f"cpu: {details}")
    if name != "reference":
        return Check("kernel", "ok", f"{name}: {choice.reason}")
    return Check("kernel", "warn", f"reference: {choice.reason}", "plain PyTorch: slower; install a C++ compiler (g++)")


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    from lm_ortho.markup import terminal_text

    table = Table(box=None, pad_edge=False)
    for column in ("check", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    colour = {"ok": "green", "warn": "yellow", "fail": "red"}
    for check in checks:
        status = terminal_text(check.status, colour[check.status])
        table.add_row(terminal_text(check.name), status, terminal_text(check.found), terminal_text(check.advice))
    Console().print(table)
