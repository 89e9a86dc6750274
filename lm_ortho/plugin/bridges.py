"""Bridges: functions that register us with lm-eval, transformers and peft, once these are imported.

A bridge may run twice without harm. This module does not import the start-up hook, which imports it on demand.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_ortho

MODEL_NAME = "libortho"
MODEL_TARGET = "lm_ortho.harness.model:LibOrthoLM"  # lm-eval compares it with module:ClassName
ADAPTER_MODULE = "peft.tuners.lora.model"
_MARK = "_lm_ortho_bridged"


def find_tasks_dir() -> Path:
    """Returns the folder of our lm-eval tasks.

    Raises:
        FileNotFoundError: For a damaged installation.
    """
    for root in lm_ortho.__path__:
        folder = Path(root) / "tasks"
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no tasks folder in {', '.join(lm_ortho.__path__)}")


def bridge_models(module: ModuleType) -> None:
    """Adds ``libortho`` to the model registry, after ``lm_eval.models`` has added the built-in models.

    lm-eval imports those only while the registry is empty, so an earlier entry of ours would hide them all. An lm-eval
    that scans entry points itself (``load_plugins``) needs no bridge.
    """
    registry = import_module("lm_eval.api.registry")
    if not hasattr(registry, "load_plugins") and MODEL_NAME not in registry.model_registry:
        registry.model_registry.register(MODEL_NAME, target=MODEL_TARGET)


def bridge_tasks(module: ModuleType) -> None:
    """Prepends our task folder to ``include_path``: it overrides built-in tasks, and the user's own override it."""
    manager = module.TaskManager
    init = manager.__init__
    if is_bridged(manager):
        return
    signature = inspect.signature(init)

    @functools.wraps(init)
    def init_with_our_tasks(self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        if call.arguments.get("include_defaults", True):
            call.arguments["include_path"] = _prepend_path(find_tasks_dir(), call.arguments.get("include_path"))
        init(*call.args, **call.kwargs)

    setattr(init_with_our_tasks, _MARK, True)
    manager.__init__ = init_with_our_tasks


def _prepend_path(folder: Path, include_path: Any) -> list[Any]:
    """Returns the paths of ``include_path``, preceded by ``folder`` unless it is one of them."""
    if not include_path:
        return [folder]
    paths = list(include_path) if isinstance(include_path, list | tuple) else [include_path]
    return paths if any(Path(path).resolve() == folder.resolve() for path in paths) else [folder, *paths]


def is_bridged(manager: Any) -> bool:
    """Whether this ``TaskManager`` class already reads our task folder."""
    return getattr(manager.__init__, _MARK, False)


def bridge_config(module: ModuleType) -> None:
    """Checks the model args of ``libortho`` before ``lm_eval`` indexes its tasks, which takes ten seconds."""
    config = module.EvaluatorConfig
    process = config.process_tasks
    if getattr(process, _MARK, False):
        return

    @functools.wraps(process)
    def check_and_process(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model == MODEL_NAME:
            import_module(MODEL_TARGET.partition(":")[0]).check_model_args(self.model_args)
        return process(self, *args, **kwargs)

    setattr(check_and_process, _MARK, True)
    config.process_tasks = check_and_process


def bridge_quantizers(module: ModuleType) -> None:
    """Registers our checkpoint format with transformers, for ``from_pretrained``."""
    from lm_ortho.checkpoint import hf

    # Without the function, `hf` itself is importing transformers at this moment; it registers at its end.
    if hasattr(hf, "register"):
        hf.register()


def bridge_adapters(module: ModuleType) -> None:
    """Registers our layers with peft, for ``get_peft_model``."""
    from lm_ortho import adapter

    # As above: without the function, `adapter` itself is importing peft at this moment.
    if hasattr(adapter, "register"):
        adapter.register()


def has_adapters(module: ModuleType) -> bool:
    """Whether LoRA of peft (this module) knows our layers."""
    return hasattr(module.LoraModel._create_new_module, _MARK)


BRIDGES: dict[str, Callable[[ModuleType], None]] = {
    "lm_eval.models": bridge_models,
    "lm_eval.tasks.manager": bridge_tasks,
    "lm_eval.config.evaluate_config": bridge_config,
    "transformers.quantizers.auto": bridge_quantizers,
    ADAPTER_MODULE: bridge_adapters,
}
"""The bridge of each module that the start-up hook waits for (``startup.WATCHED_MODULES``)."""


def bridge_lm_eval() -> None:
    """Imports lm-eval and bridges it at once, whatever the start-up hook did."""
    for name in ("lm_eval.models", "lm_eval.tasks.manager"):
        BRIDGES[name](import_module(name))
