"""The start-up hook: waits for modules of lm-eval, transformers and peft and bridges each after its body has run.

``lm_ortho.pth`` (and ``lm_ortho.start`` from Python 3.15 on) runs ``install`` in every interpreter. Therefore this file
imports nothing but ``sys`` and ``os``, and does nothing until one of them is imported.
``LM_ORTHO_AUTOLOAD=0`` switches it off.
"""

import os
import sys

TYPE_CHECKING = False  # true for type checkers, without importing `typing` at every start
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

WATCHED_MODULES = (
    "lm_eval.models",
    "lm_eval.tasks.manager",
    "lm_eval.config.evaluate_config",
    "transformers.quantizers.auto",
    "peft.tuners.lora.model",
)
AUTOLOAD_VARIABLE = "LM_ORTHO_AUTOLOAD"


class BridgeFinder:
    """Import finder that delegates to the other finders and bridges a watched module after its body has run."""

    def __init__(self) -> None:
        self._pending: set[str] = set()

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Returns the spec of the other finders with its loader wrapped; ``None`` for a module that is not watched."""
        if name not in WATCHED_MODULES or name in self._pending:
            return None
        # Another package's finder may delegate as well, to us: without the mark, the two would recurse.
        self._pending.add(name)
        try:
            spec = self._delegate(name, path, target)
        finally:
            self._pending.discard(name)
        if spec is not None and spec.loader is not None:
            _bridge_after_body(spec.loader, name)
        return spec

    def _delegate(self, name: str, path: "Sequence[str] | None", target: "ModuleType | None") -> "ModuleSpec | None":
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec: ModuleSpec | None = find_spec(name, path, target)
            if spec is not None:
                return spec
        return None


def _bridge_after_body(loader: object, name: str) -> None:
    """Wraps ``exec_module`` of this one loader instance."""
    try:
        run_body = loader.exec_module  # type: ignore[attr-defined]

        def exec_module(module: "ModuleType") -> None:
            run_body(module)
            if module.__name__ == name:  # a zip archive shares one loader among its modules
                bridge(name, module)

        loader.exec_module = exec_module  # type: ignore[attr-defined]
    except AttributeError as error:
        _warn(name, error)


def bridge(name: str, module: "ModuleType") -> None:
    """Runs the bridge of a watched module; a failure is a ``RuntimeWarning``, never a broken lm-eval."""
    try:
        from lm_ortho.plugin import bridges

        bridges.BRIDGES[name](module)
    except Exception as error:
        _warn(name, error)


def _warn(name: str, error: Exception) -> None:
    import warnings

    message = f"lm-ortho could not extend {name} ({type(error).__name__}: {error}); see `lm-ortho doctor`"
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def is_installed() -> bool:
    """Whether the hook is installed in this interpreter."""
    return any(isinstance(finder, BridgeFinder) for finder in sys.meta_path)


def install(force: bool = False) -> None:
    """Installs the hook and bridges watched modules that are already loaded; ``force`` ignores the switch."""
    if not force and os.environ.get(AUTOLOAD_VARIABLE) == "0":
        return
    if not is_installed():
        sys.meta_path.insert(0, BridgeFinder())
    for name in WATCHED_MODULES:
        module = sys.modules.get(name)
        if module is not None:
            bridge(name, module)
