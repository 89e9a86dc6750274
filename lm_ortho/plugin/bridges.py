"""What lm-eval and transformers are told about us, once they are there; a bridge may run twice harmlessly."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_ortho
from lm_ortho.plugin import startup

MODEL_NAME = "libortho"
MODEL_TARGET = "lm_ortho.harness.model:LibOrthoLM"  # lm-eval compares it with module:ClassName
_MARK = "_lm_ortho_bridged"


def tasks_dir() -> Path:
    """The folder of our lm-eval tasks. Raises ``FileNotFoundError`` for a damaged installation."""
    for root in lm_ortho.__path__:
        folder = Path(root) / "tasks"
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no tasks folder in {', '.join(lm_ortho.__path__)}")


def bridge_models(module: ModuleType) -> None:
    """Adds ``libortho`` to the model registry, after ``lm_eval.models`` has added the built-in ones.

    lm-eval imports those only while the registry is empty, so an earlier entry of ours would hide them all.
    Where lm-eval scans entry points itself (``load_plugins``) there is nothing to do.
    """
    registry = import_module("lm_eval.api.registry")
    if not hasattr(registry, "load_plugins") and MODEL_NAME not in registry.model_registry:
        registry.model_registry.register(MODEL_NAME, target=MODEL_TARGET)


def bridge_tasks(module: ModuleType) -> None:
    """Puts our task folder in front of ``include_path``: over the built-in tasks, under the user's own."""
    manager = module.TaskManager
    init = manager.__init__
    if tasks_bridged(manager):
        return
    signature = inspect.signature(init)

    @functools.wraps(init)
    def with_our_tasks(self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        if call.arguments.get("include_defaults", True):
            call.arguments["include_path"] = _in_front(tasks_dir(), call.arguments.get("include_path"))
        init(*call.args, **call.kwargs)

    setattr(with_our_tasks, _MARK, True)
    manager.__init__ = with_our_tasks


def _in_front(ours: Path, given: Any) -> list[Any]:
    paths = [] if not given else list(given) if isinstance(given, list | tuple) else [given]
    return paths if any(Path(path).resolve() == ours.resolve() for path in paths) else [ours, *paths]


def tasks_bridged(manager: Any) -> bool:
    """Whether this ``TaskManager`` class already looks into our task folder."""
    return getattr(manager.__init__, _MARK, False)


def bridge_quantizers(module: ModuleType) -> None:
    """Lets ``from_pretrained`` of transformers read our checkpoints."""
    from lm_ortho.checkpoint import hf

    if hasattr(hf, "register"):  # else it is hf that imports transformers just now; it registers at its end
        hf.register()


BRIDGES: dict[str, Callable[[ModuleType], None]] = dict(
    zip(startup.WATCHED, (bridge_models, bridge_tasks, bridge_quantizers), strict=True)
)


def bridge_now() -> None:
    """Bridges lm-eval at once, whatever the start-up hook did, and transformers when it gets imported."""
    for name in startup.WATCHED[:2]:
        BRIDGES[name](import_module(name))
    startup.install(force=True)
