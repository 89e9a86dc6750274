"""Build hook: what a wheel carries besides the package folder itself."""

from __future__ import annotations

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
