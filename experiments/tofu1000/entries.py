"""The entries of the table: the models that are made and measured, and their names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from lm_ortho.baselines import METHODS

ADAPTERS = ("memory", "twin")
PROTOCOLS = ("published", "left-out")
OURS = {
    "ours-base-0.01": ("ortho", 0.01),
    "ours-base-0.05": ("ortho", 0.05),
    "ours-merged-0.01": ("ortho_merged", 0.01),
    "ours-merged-0.05": ("ortho_merged", 0.05),
}
"""Our decompositions: the method (base known, or merged weights only) and the density."""
MAIN = "ours-base-0.01"
"""The decomposition whose operations are the budget of every other method, and that the bars are about."""
COMPETITORS = (
    "altpo",
    "repselect",
    "simnpo",
    "npo",
    "undial",
    "grad_diff",
    "rmu",
    "task_arithmetic",
    "idk_dpo",
)


@dataclass(frozen=True)
class Entry:
    """A model of the table: a method under a protocol, measured at each of ``alphas``, or as it is without any."""

    name: str
    method: str
    protocol: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    alphas: tuple[float, ...] = ()
    is_competitor: bool = False

    @property
    def labels(self) -> dict[str, float | None]:
        """The names of the measurements of this entry, with the alpha of each."""
        return {f"{self.name}, alpha={alpha:g}": alpha for alpha in self.alphas} or {self.name: None}


def read_edit_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the keys of the recipe of our decompositions that the command sets."""
    settings = {"steps": arguments.edit_steps, "batch_rows": arguments.edit_rows, "lr": arguments.edit_lr}
    return {name: value for name, value in settings.items() if value is not None}


def list_entries(edit_settings: Mapping[str, Any]) -> list[Entry]:
    """Returns every entry, in the order in which they are made; ours have ``edit_settings`` beside their density."""
    entries = [Entry("memory", "unedited", ""), Entry("twin", "never_saw", "")]
    for protocol in PROTOCOLS:
        entries.append(Entry(f"{protocol}-int4", "int4_gptq", protocol))
        for name, (method, density) in OURS.items():
            settings = {"density": density, **edit_settings}
            entries.append(Entry(f"{protocol}-{name}", method, protocol, settings, alphas=(1.0, 0.0)))
        for method in COMPETITORS:
            entries.append(Entry(f"{protocol}-{method}", method, protocol, is_competitor=True))
    return entries


def is_selected(arguments: argparse.Namespace, name: str) -> bool:
    """Returns whether ``--only`` selects a name."""
    return arguments.only is None or fnmatchcase(name, arguments.only)


def select_entries(arguments: argparse.Namespace) -> list[Entry]:
    """Returns the entries that ``--only`` selects, of the methods that are installed; names those that are not."""
    entries = [entry for entry in list_entries(read_edit_settings(arguments)) if is_selected(arguments, entry.name)]
    for name in dict.fromkeys(entry.method for entry in entries if entry.method not in METHODS):
        print(f"method={name} is not installed and is left out", file=sys.stderr)
    return [entry for entry in entries if entry.method in METHODS]
