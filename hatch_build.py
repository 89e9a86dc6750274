"""Build hook: what a wheel carries besides the package folder itself."""

from __future__ import annotations

import importlib.util
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

STARTUP_FILES = ("lm_ortho.pth", "lm_ortho.start")
ROOMS = ("tasks", "kernels")


class WheelContents(BuildHookInterface):
    """Puts the start-up files at the root of site-packages and the top-level rooms inside the package.

    An editable install gets the start-up files only: there the rooms are reached through
    ``lm_ortho.__path__``.
    """

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        startup = {name: name for name in STARTUP_FILES}
        build_data["force_include"].update(startup | {room: f"lm_ortho/{room}" for room in ROOMS})
        build_data["force_include_editable"].update(startup)
        if version != "editable":
            self._compile(build_data)

    def _compile(self, build_data: dict[str, Any]) -> None:
        """Adds the compiled CPU kernel and the tag of this platform; without a compiler the wheel stays pure Python."""
        build = _module(Path(self.root, "kernels", "cpu", "build.py"))
        self._scratch = tempfile.TemporaryDirectory()
        library = Path(self._scratch.name, build.BUNDLED)
        try:
            build.compile_library(library)
        except build.BuildError as error:
            self.app.display_warning(f"CPU kernel not compiled, it will be at first use: {error}")
            return
        build_data["force_include"][str(library)] = f"lm_ortho/kernels/cpu/{build.BUNDLED}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_scratch"):
            self._scratch.cleanup()


def _module(path: Path) -> ModuleType:
    """A file of the package as a module by itself: the package needs torch, which is not here."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
