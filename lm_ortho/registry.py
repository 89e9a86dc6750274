"""The class of all registries (sieves, projections, edits, methods, attacks), to which installed packages can add."""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from lm_ortho.errors import UserError
from lm_ortho.hub import first_line

T = TypeVar("T")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
log = logging.getLogger(__name__)


class Registry(Generic[T]):
    """Entries of one kind by name; refuses duplicates and malformed names, suggests the closest known name.

    Installed packages add entries through the entry points of ``group``. The name of an entry point is the name of the
    entry, and its value refers to the entry itself, or to a module that registers it when it is imported. It is loaded
    when it is first requested. A built-in entry is never replaced.
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind, self.group = kind, group
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an entry. Raises ``ValueError`` for a malformed or taken name."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"{self.kind} name {name!r} must match {_NAME.pattern}")
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is already registered")

        def add(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry of that name.

        Raises:
            UserError: for an unknown name, with the known ones and the closest; for a plug-in that cannot be loaded.
        """
        if name not in self._entries and name in self._plugins:
            self._load(self._plugins[name])
        if name in self._entries:
            return self._entries[name]
        close = difflib.get_close_matches(name, list(self), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{self.kind}={name!r} is unknown; known: {', '.join(self)}.{hint}")

    def find_plugin(self, name: str) -> str | None:
        """The installed package that adds ``name``, with its version; None for a built-in entry."""
        point = self._plugins.get(name)
        if point is None:
            return None
        return f"{point.dist.name} {point.dist.version}" if point.dist else point.value

    @cached_property
    def _plugins(self) -> dict[str, EntryPoint]:
        points = {point.name: point for point in entry_points(group=self.group)} if self.group else {}
        for name in self._entries.keys() & points.keys():
            if points[name].module in sys.modules:
                continue  # loaded for another entry, it has registered this one, too
            value = points.pop(name).value
            log.warning("%s: entry point %s=%s is ignored, the name is taken by a built-in", self.group, name, value)
        return points

    def _load(self, point: EntryPoint) -> None:
        try:
            entry = point.load()
        except Exception as error:  # the code of another package may raise anything
            raise UserError(
                f"{self.kind}={point.name!r}: {point.value} of an installed package cannot be loaded "
                f"({first_line(error)}); repair or uninstall the package"
            ) from error
        if point.name not in self._entries:  # else its module has registered it
            self.register(point.name)(entry)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._entries, *self._plugins}))

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._plugins
