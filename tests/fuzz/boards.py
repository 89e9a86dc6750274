"""Fuzzes board files: the boards of this repository, changed as trees and as text."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from lm_ortho.leaderboard.config import MAX_CELLS, Board, make_board, read_board
from tests.fuzz.oracle import ODD_TEXTS, REFUSED, RIGHT, Refusal, attempt, fuzz_case, mutate, odd_value
from tests.support.paths import REPOSITORY

WEIGHT = 0.25
"""Share of the cases of a campaign relative to other domains; YAML takes longer."""
Tree = Any
SHORT = """
name: short
tasks: [tofu_forget, tofu_retain]
models:
  mine: {pretrained: org/name, peft: org/adapter, forget: f.jsonl, retain: r.jsonl, never_saw: other, base: none}
methods:
  - {method: npo, tune: true, seeds: [0, 1], alphas: [0, 0.5]}
  - {method: grad_diff, grid: {lr: [1.0e-5, 3.0e-5], beta: [1, 2]}, settings: {steps: 3}}
resources: {executor: local, cpus: 1, gpus: 0, memory_gb: 2}
frontier:
  forget: [{task: tofu_forget, metric: ppl, scale: log, better: lower}]
batch_size: auto:4
metadata: {a: 1, b: [x, y]}
apply_chat_template: true
system_instruction: Be brief.
chat_template_args: {date_string: 10 Apr 2025, enable_thinking: false}
imports: [tests.support.board]
"""


@lru_cache(maxsize=1)
def read_sources() -> dict[str, str]:
    """The texts of boards by name."""
    files = sorted((REPOSITORY / "boards").glob("*.yaml"))
    return {"short": SHORT} | {file.stem: file.read_text(encoding="utf-8") for file in files}


# --- Mutators of the tree --------------------------------------------------------------------------------------------


def _containers(tree: Tree) -> list[Any]:
    """Every mapping and list of the tree that is not empty."""
    result, waiting, numbers = [], [tree], set[int]()
    while waiting:
        part = waiting.pop()
        if isinstance(part, (dict, list)) and part and id(part) not in numbers:  # a part may contain itself
            numbers.add(id(part))
            result.append(part)
            waiting += part.values() if isinstance(part, dict) else part
    return result


def _pick(draw: random.Random, tree: Tree) -> tuple[Any, Any]:
    """A container of the tree and one of its keys or indices; a new list where there is none."""
    containers = _containers(tree)
    container = draw.choice(containers) if containers else [0]
    return container, draw.choice(list(container) if isinstance(container, dict) else range(len(container)))


def replace_value(draw: random.Random, tree: Tree) -> Tree:
    container, key = _pick(draw, tree)
    container[key] = odd_value(draw)
    return tree


def replace_by_yaml_word(draw: random.Random, tree: Tree) -> Tree:
    container, key = _pick(draw, tree)
    container[key] = draw.choice(
        ["yes", "no", "on", "off", "true", "1", "1e3", "2026-01-01", "0x1F", "1:30", "~", "=", "<<"]
    )
    return tree


def replace_by_path(draw: random.Random, tree: Tree) -> Tree:
    container, key = _pick(draw, tree)
    paths = ["../x", "/etc/passwd", "a/../../b", "x\x00y", "C:\\x", "~root", "name\n", "..", ".", "-rf", "x" * 300]
    container[key] = draw.choice(paths)
    return tree


def rename_key(draw: random.Random, tree: Tree) -> Tree:
    mappings = [part for part in _containers(tree) if isinstance(part, dict)]
    if mappings:
        mapping = draw.choice(mappings)
        key = draw.choice(list(mapping))
        text = str(key)
        other = draw.choice(
            [text[:-1], text + "s", text.upper(), text[::-1], 1, True, None, 2.5, "", "../x", "\x1b[0m", "k" * 5000]
        )
        mapping[other] = mapping.pop(key)
    return tree


def drop_part(draw: random.Random, tree: Tree) -> Tree:
    container, key = _pick(draw, tree)
    del container[key]
    return tree


def copy_part(draw: random.Random, tree: Tree) -> Tree:
    """The same object twice, which is dumped as an anchor and an alias."""
    container, key = _pick(draw, tree)
    other, _ = _pick(draw, tree)
    if isinstance(other, list):
        other.append(container[key])
    else:
        other[draw.choice(["budget", "settings", "grid", "copy", str(key)])] = container[key]
    return tree


def nest_part(draw: random.Random, tree: Tree) -> Tree:
    container, key = _pick(draw, tree)
    for _ in range(draw.choice([1, 2, 30, 300])):
        container[key] = [container[key]] if draw.random() < 0.5 else {"settings": container[key]}
    return tree


def enlarge_part(draw: random.Random, tree: Tree) -> Tree:
    if isinstance(tree, dict):
        count = draw.choice([20, 20, 400])
        tree |= draw.choice([
            {"seeds": list(range(count))}, {"alphas": [0.5] * count}, {"tasks": ["tofu_forget"] * count},
            {"methods": [{"method": "npo"}] * count}, {"models": {f"m{i}": {} for i in range(count)}},
            {"methods": [{"method": "npo", "grid": {f"s{i}": list(range(9)) for i in range(count // 20)}}]},
        ])  # fmt: skip
    return tree


TREE_MUTATORS = [
    replace_value, replace_by_yaml_word, replace_by_path, rename_key, drop_part, copy_part, nest_part, enlarge_part,
]  # fmt: skip


# --- Mutators of the text --------------------------------------------------------------------------------------------


def insert_text(draw: random.Random, text: str) -> str:
    part = draw.choice([
        "\t", "&a ", "*a", "*", "<<: *a", "!!python/object/apply:os.system [touch marker]", "!!python/name:os.system",
        "---\n",
        "!!binary ", "!!int ", "!!bool ", "!!float ", "!!set ", "!!timestamp ", "!x ", "%YAML 9.9\n", "? ", ": ",
        "- ", "| ", "> ",
        "[", "]", "{", "}", ",", "#", "\n", "'", '"', "\\", "\x00", "\u2028", "\ufeff", "@", "`", "...\n", "0o9",
        "9" * 5000, *ODD_TEXTS,
    ])  # fmt: skip
    place = draw.randint(0, len(text))
    return text[:place] + part + text[place:]


def duplicate_line(draw: random.Random, text: str) -> str:
    lines = text.split("\n")
    index = draw.randrange(len(lines))
    return "\n".join([*lines[: index + 1], lines[index], *lines[index + 1 :]])


def drop_line(draw: random.Random, text: str) -> str:
    lines = text.split("\n")
    del lines[draw.randrange(len(lines))]
    return "\n".join(lines)


def change_character(draw: random.Random, text: str) -> str:
    place = draw.randrange(len(text)) if text else 0
    return text[:place] + chr(draw.choice([draw.randrange(32, 127), draw.randrange(1, 0x2FF)])) + text[place + 1 :]


def truncate(draw: random.Random, text: str) -> str:
    return text[: draw.randint(0, len(text))]


def add_bomb(draw: random.Random, text: str) -> str:
    """Few lines that stand for very many values, by aliases, merges or themselves."""
    width, depth = draw.choice([2, 9, 30]), draw.choice([3, 9, 30])
    kind = draw.choice(["list", "merge", "self", "deep"])
    if kind == "self":
        return text + "\nmetadata: &a {a: *a}\n"
    if kind == "deep":
        return text + "\nmetadata: " + draw.choice("[{") * draw.choice([50, 800]) + "\n"
    lines = ["metadata:", "  l0: &l0 {x: 1}" if kind == "merge" else "  l0: &l0 [x]"]
    for level in range(1, depth):
        if kind == "merge":
            lines.append(f"  l{level}: &l{level} {{<<: [{', '.join([f'*l{level - 1}'] * width)}]}}")
        else:
            lines.append(f"  l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * width)}]")
    return text + "\n" + "\n".join(lines) + "\n"


TEXT_MUTATORS = [insert_text, insert_text, duplicate_line, drop_line, change_character, truncate, add_bomb]


# --- Cases -----------------------------------------------------------------------------------------------------------


@fuzz_case
def run_case(seed: int) -> str:
    """Reads one board. Raises ``AssertionError`` unless it is what the file says, or refused, and nothing runs."""
    draw = random.Random(seed)
    name = "short" if draw.random() < 0.6 else draw.choice(sorted(read_sources()))
    text = read_sources()[name]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-boards-"))
    path = folder / "board.yaml"
    try:
        if draw.random() < 0.1:
            return _run_valid(draw, path, text)
        if draw.random() < 0.5:
            tree = mutate(draw, yaml.load(text, yaml.CSafeLoader), TREE_MUTATORS)
            try:
                text = yaml.dump(tree, Dumper=draw.choice([yaml.CSafeDumper, yaml.CDumper]))
            except (yaml.YAMLError, ValueError, RecursionError):
                text = repr(tree)
        else:
            text = mutate(draw, text, TEXT_MUTATORS)
        _write(draw, path, text)
        result = attempt(lambda: read_board(path), names=[str(path)])
        left = sorted(os.listdir(folder))
        assert left in ([path.name], []), f"reading a board wrote {left}"
        assert not Path("marker").exists(), "a tag of a board was run"
        return REFUSED if isinstance(result, Refusal) else _check_board(result)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_valid(draw: random.Random, path: Path, text: str) -> str:
    """Every key and value of an untouched board arrives, whatever harmless form the file has."""
    tree = yaml.load(text, yaml.CSafeLoader)
    if draw.random() < 0.5:
        text = yaml.safe_dump(tree, sort_keys=draw.random() < 0.5, default_flow_style=draw.random() < 0.5)
    content = draw.choice([text, text.replace("\n", "\r\n"), text + "\n\n# end\n"])
    path.write_bytes(content.encode(draw.choice(["utf-8", "utf-8-sig", "utf-16"])))
    board = attempt(lambda: read_board(path), names=[])
    assert isinstance(board, Board), f"a right board is refused: {board}"
    plain = json.loads(json.dumps(board.model_dump(mode="json", exclude_unset=True)))
    expected = json.loads(json.dumps(tree))
    assert plain == expected, f"{plain!r:.300} is not {expected!r:.300}"
    return _check_board(board)


def _write(draw: random.Random, path: Path, text: str) -> None:
    """Writes the board, in one case of twenty as something else than a file of text."""
    content = text.encode("utf-8", "surrogatepass")
    kind = draw.choice(["folder", "missing", "fifo", "device", "binary", "empty", "huge", "utf-16", "latin-1"])
    if draw.random() > 0.05:
        path.write_bytes(content)
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "binary":
        path.write_bytes(draw.randbytes(300))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "huge":
        path.write_bytes(content + b"# comment\n" * 10**5)
    elif kind != "missing":
        path.write_bytes(text.encode(kind, "replace"))


def _check_board(board: Any) -> str:
    """A board that was accepted can be stored, read again, and run: its names are safe and its size is bounded."""
    assert isinstance(board, Board)
    stored = json.dumps(board.model_dump(mode="json"), allow_nan=False)
    assert make_board(json.loads(stored)) == board, "a stored board is another one"
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,99}", board.name), f"the name {board.name!r}"
    cells = 0
    for entry in board.methods:
        assert re.fullmatch(r"[a-z][a-z0-9_]{0,99}", entry.method), f"the method {entry.method!r}"
        combinations = 1
        for values in entry.grid.values():
            combinations *= len(values)
        cells += combinations * len(entry.seeds or board.seeds) * len(board.models)
        assert all(0 <= alpha <= 1 for alpha in entry.alphas or board.alphas)
    assert 0 < cells <= MAX_CELLS, f"{cells} cells"
    for text in (*board.models, *board.tasks):
        assert text.isprintable(), f"the name {text!r}"
        assert text.strip() == text != "", f"the name {text!r}"
    return RIGHT
