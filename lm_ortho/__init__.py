"""A language model whose memories sit in a separate sparse stream behind one dial, alpha.

Importing this package loads neither torch nor lm-eval; the public names below are loaded at first use.
"""

import os

TYPE_CHECKING = False  # true for type checkers; `typing` is too slow for a module every interpreter loads
if TYPE_CHECKING:
    from typing import Any

    from lm_ortho.checkpoint import load
    from lm_ortho.errors import UserError
    from lm_ortho.harness.model import LibOrthoLM
    from lm_ortho.layer import OrthoLinear, alpha_scope, set_alpha
    from lm_ortho.pipeline.python_api import decompose

__version__ = "0.1.0"

__all__ = [
    "LibOrthoLM",
    "OrthoLinear",
    "UserError",
    "__version__",
    "alpha_scope",
    "decompose",
    "load",
    "set_alpha",
]

_HOMES = {
    "LibOrthoLM": "lm_ortho.harness.model",
    "OrthoLinear": "lm_ortho.layer",
    "UserError": "lm_ortho.errors",
    "alpha_scope": "lm_ortho.layer",
    "decompose": "lm_ortho.pipeline.python_api",
    "load": "lm_ortho.checkpoint",
    "set_alpha": "lm_ortho.layer",
}

# A checkout has kernels/ and tasks/ beside this folder, a wheel inside it; the same names import in both.
if not os.path.isdir(os.path.join(__path__[0], "kernels")):
    # A new list: the one of the module's spec is what tools that read the source tree go by.
    __path__ = [*__path__, os.path.dirname(os.path.abspath(__path__[0]))]


def __getattr__(name: str) -> "Any":
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
