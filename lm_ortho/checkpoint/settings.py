"""Checks ``config.json`` of a checkpoint before anything is built from it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lm_ortho.checkpoint import limits
from lm_ortho.errors import UserError, printable
from lm_ortho.streams import BITS, DEFAULT_MEMORY, MAX_GROUP_SIZE, is_valid_memory_name

FORMAT_VERSION = 2
"""The newest format: 1 holds one memory; 2 holds several, each with a name and an ortho file."""

_LAYERS = re.compile(r"(.*_)?(layers?|num_blocks|depth)", re.IGNORECASE)
_EXPERTS = re.compile(r".*experts", re.IGNORECASE)
_SIZES = re.compile(
    r".*(size|dim|positions?|embeddings|heads|length|ctx|embd|inner|rank|width|features)", re.IGNORECASE
)
_FOREIGN = ("transformers_weights", "attn_implementation", "_attn_implementation", "experts_implementation")
"""Fields with which transformers would read another file or fetch code of a kernel."""


def check_version(version: Any, location: object) -> None:
    """Raises ``UserError`` for a format that this version of lm-ortho cannot read; ``location`` begins the message."""
    if type(version) is not int or version < 1:
        raise UserError(f"{location}: no valid format_version ({printable(repr(version))})")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{location}: written by a newer lm-ortho (format {_short(version)}, this one reads up to "
            f"{FORMAT_VERSION}); upgrade lm-ortho"
        )


def check_settings(settings: Mapping[str, Any], location: object) -> None:
    """Raises ``UserError`` for an impossible lattice, list of layers or of memories in ``quantization_config``."""
    where = f"{location}: quantization_config"
    bits, size = settings.get("bits"), settings.get("group_size")
    if type(bits) is not int or bits not in BITS:
        raise UserError(f"{where} has bits={_short(bits)}; expected one of {', '.join(map(str, BITS))}")
    if type(size) is not int or size < 8 or size % 8 or size > MAX_GROUP_SIZE:
        raise UserError(
            f"{where} has group_size={_short(size)}; expected a positive multiple of 8, at most {MAX_GROUP_SIZE}"
        )
    for name in ("density", "bits_per_weight"):
        value = settings.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            raise UserError(f"{where} has {name}={_short(value)}; expected a number")
    modules = settings.get("modules")
    if not isinstance(modules, list) or not modules:
        raise UserError(f"{where} lists no decomposed modules")
    _check_names(modules, limits.MODULES, f"{where}: modules")
    memories = settings.get("memories")
    if memories is None:
        return
    if not isinstance(memories, list) or not memories:
        raise UserError(f"{where} has memories={_short(memories)}; expected a list of names")
    _check_names(memories, limits.MEMORIES, f"{where}: memories")
    for name in memories:
        if name != DEFAULT_MEMORY and not is_valid_memory_name(name):
            raise UserError(f"{where}: memories holds {_short(name)}, which is no name of a memory")


def check_references(config: Mapping[str, Any], location: object) -> None:
    """Raises ``UserError`` for a field of ``config.json`` with which transformers would read other files."""
    for name, value in _walk(config):
        if name in _FOREIGN and value is not None:
            raise UserError(f"{location}: {name}={_short(value)} is not possible in a checkpoint; remove the field")


def check_sizes(config: Mapping[str, Any], location: object) -> None:
    """Checks the numbers of a ``config.json`` before a model is built from them.

    Raises:
        UserError: for more layers, experts or a larger size than ``limits`` allows.
    """
    for name, value in _walk(config):
        if isinstance(value, list) and name == "per_layer_config":
            limit = limits.LAYERS
            number = len(value)
        elif type(value) is int:
            limit, number = _limit(name), abs(value)
        else:
            continue
        if number > limit:
            raise UserError(f"{location}: {printable(name)}={_short(value)} is too large; at most {limit} is possible")


def _limit(name: str) -> int:
    if _LAYERS.fullmatch(name):
        return limits.LAYERS
    if _EXPERTS.fullmatch(name):
        return limits.EXPERTS
    return limits.SIZE if _SIZES.fullmatch(name) else 2**63 - 1


def _walk(content: Any) -> Iterator[tuple[str, Any]]:
    """Every name in nested objects with its value; those of ``quantization_config`` are not of transformers."""
    nodes = [content]
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes += [part for part in node if isinstance(part, dict | list)]
            continue
        for name, value in node.items():
            if name == "quantization_config":
                continue
            yield name, value
            if isinstance(value, dict | list):
                nodes.append(value)


def _check_names(names: list[Any], limit: int, where: str) -> None:
    if len(names) > limit:
        raise UserError(f"{where} holds {len(names)} names; at most {limit} are possible")
    earlier_names = set[str]()
    for name in names:
        if not isinstance(name, str) or not name or len(name) > limits.NAME_LENGTH or not name.isprintable():
            raise UserError(
                f"{where} holds {_short(name)}; expected a printable name of at most {limits.NAME_LENGTH} characters"
            )
        if name in earlier_names:
            raise UserError(f"{where} holds {_short(name)} twice")
        earlier_names.add(name)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the range of floats
        return False


def _short(value: Any) -> str:
    """``repr`` of a value of a file, at most 80 characters; an int of too many digits cannot be printed in full."""
    try:
        return printable(repr(value), 80)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
