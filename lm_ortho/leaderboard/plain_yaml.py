"""Reads YAML of any origin as plain data, within limits of size, depth and number of values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lm_ortho.errors import UserError, printable

MAX_BYTES = 2**16
"""Size of a file; the largest board of this repository has two kilobytes."""
MAX_VALUES = 10_000
"""Number of values of a file, where everything that an alias (``*name``) stands for counts again."""
MAX_DEPTH = 20
"""Levels of mappings and lists inside each other."""
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {f"{_TAG}{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}
_KINDS = {
    f"{_TAG}int": "a number",
    f"{_TAG}float": "a number",
    f"{_TAG}bool": "true or false",
    f"{_TAG}null": "nothing",
}


class _PlainLoader(yaml.SafeLoader):
    """Leaves dates as text, because no schema of ours has a date."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the loader reads this attribute of the class
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_plain_yaml(path: Path, source: str) -> Any:
    """The content of a YAML file: mappings with texts as keys, lists, texts, finite numbers, true, false and None.

    Raises:
        UserError: begins with ``source``; for a file that cannot be read or is too large, for text that is not YAML,
            and for a tag, a key that is no text, a key that occurs twice or a number that is not finite, with its line.
    """
    content = _read_bytes(path, source)
    try:
        # 1. Parse into nodes, and check them before any value is made: a short file can stand for billions of values.
        loader = _PlainLoader(content)
        root = loader.get_single_node()
        if root is None:
            return None
        for number, (node, depth) in enumerate(_walk(root)):
            if number >= MAX_VALUES:
                raise UserError(f"{source} holds more than {MAX_VALUES} values")
            if depth > MAX_DEPTH:
                raise UserError(f"{source}, line {_line(node)}: more than {MAX_DEPTH} levels inside each other")
            _check_node(node, f"{source}, line {_line(node)}")
        # 2. Make the values.
        return loader.construct_document(root)
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{source} is nested too deeply; at most {MAX_DEPTH} levels") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {printable(error)}") from None
    except (ValueError, LookupError) as error:  # a number that is too long, a tag !!int or !!bool before another word
        raise UserError(f"{source} holds a value that YAML cannot read ({printable(error)})") from None


def _read_bytes(path: Path, source: str) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{source} is {'a folder' if path.is_dir() else 'not a regular file'}; name a YAML file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{source} has {size} bytes; a file of this kind has at most {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror})") from None
    except UserError:
        raise
    except ValueError as error:  # a zero byte in the name
        raise UserError(f"{source} cannot be read ({error})") from None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _walk(root: yaml.Node) -> Iterator[tuple[yaml.Node, int]]:
    """Every node with its depth, an alias like the node that it stands for; without recursion, without end."""
    waiting = [(root, 1)]
    while waiting:
        node, depth = waiting.pop()
        yield node, depth
        if isinstance(node, yaml.MappingNode):
            waiting += [(part, depth + 1) for pair in reversed(node.value) for part in reversed(pair)]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in reversed(node.value)]


def _check_node(node: yaml.Node, location: str) -> None:
    if node.tag not in _PLAIN_TAGS:
        raise UserError(f"{location}: the tag {printable(node.tag, 80)} is refused; only plain values are read")
    is_float = node.tag == f"{_TAG}float" and isinstance(node, yaml.ScalarNode)
    if is_float and not math.isfinite(_PlainLoader("").construct_yaml_float(node)):
        raise UserError(f"{location}: {printable(node.value, 80)} is not a finite number")
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, location)


def _check_keys(node: yaml.MappingNode, location: str) -> None:
    names = set[str]()
    for key, _ in node.value:
        if key.tag == f"{_TAG}merge":
            continue
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{location}: a list or a mapping cannot be a key")
        text = printable(key.value, 80)
        if key.tag in _KINDS:
            raise UserError(
                f"{location}: the key {text or '(empty)'} means {_KINDS[key.tag]} in YAML; write it in quotes if it is "
                "a name"
            )
        if key.value in names:
            raise UserError(f"{location}: the key {text!r} occurs twice")
        names.add(key.value)
