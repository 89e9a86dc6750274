"""Which code and which packages decide a result, so that kept ones are known to be stale."""

from __future__ import annotations

import inspect
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import lm_ortho
from lm_ortho.kernels import calls
from lm_ortho.plugin.bridges import tasks_dir

DECOMPOSING = (
    "calibration", "checkpoint", "edit", "implant", "kernels", "layer", "projection", "reference", "sieve", "streams",
    "target", "decompose.py", "workbench.py", "registry.py", "settings.py",
)  # fmt: skip
"""Rooms and files whose code decides what a decomposition is."""
_NO_CODE = (".md", ".pyc", ".so")


def versions() -> dict[str, str]:
    """The packages that decide what is measured."""
    others = {name: version(name) for name in ("lm_eval", "torch", "transformers")}
    return {"lm_ortho": lm_ortho.__version__, **others}


@lru_cache
def code_files() -> dict[str, Path]:
    """Files of the package, of the kernels in any language and of the tasks, by a name that no machine decides."""
    kernels = Path(inspect.getfile(calls)).parent
    roots = {Path(lm_ortho.__file__).parent: "*.py", kernels: "*", tasks_dir(): "*"}
    found = {
        f"{root.name}/{path.relative_to(root)}": path
        for root, pattern in roots.items()
        for path in root.rglob(pattern)
        if path.is_file() and path.suffix not in _NO_CODE
    }
    return dict(sorted(found.items()))
