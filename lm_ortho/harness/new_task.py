"""A folder with two tasks, made of two files of rows: what ``lm-ortho new-task`` writes.

The rows stand in the YAML files themselves (``RowsTask``), as a block of JSON lines. So there is no path to a data
file, which lm-eval would resolve against the working directory: the folder works wherever it is put, also among our
own tasks, where nothing but YAML and Markdown may lie. lm-eval reads every YAML file when it starts; a block of text
costs it 10 ms per megabyte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lm_ortho.data.rows import Row, read_rows
from lm_ortho.errors import UserError
from lm_ortho.files import atomic_directory, check_output_directory
from lm_ortho.plugin.bridges import tasks_dir

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_KINDS = ("forget", "retain")
# Breaks a line of YAML, or cannot stand in it.
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True)
class NewTask:
    """What was written: the folder, the names of its tasks, and how many rows each has."""

    folder: Path
    tasks: tuple[str, ...]
    rows: tuple[int, ...]


def new_task(
    name: str, forget: str | Path, retain: str | Path, output: Path = Path(), *, source: str = "", licence: str = ""
) -> NewTask:
    """Writes ``output/name`` with the tasks ``name_forget`` and ``name_retain`` and a README.

    ``source`` and ``licence`` of the rows go into the head of the README, from which the table of tasks is made.

    Raises:
        UserError: for a name that is malformed or taken, a folder that is occupied or cannot be written, a file
            that is missing or broken (with its line), or a row in both files; nothing is left half-written.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"name={name!r} must be lower-case letters, digits and underscores, a letter first")
    tasks = tuple(f"{name}_{kind}" for kind in _KINDS)
    folder = output.expanduser() / name
    check_output_directory(folder, "output")
    rows = [read_rows(forget, "forget"), read_rows(retain, "retain")]
    _refuse_shared(*rows)
    _refuse_taken(tasks, output.expanduser())
    with atomic_directory(folder, "output") as scratch:
        for kind, task, each in zip(_KINDS, tasks, rows, strict=True):
            _write(scratch / f"{task}.yaml", _yaml(kind, task, each))
        _write(scratch / "README.md", _readme(name, rows, source, licence))
    return NewTask(folder, tasks, tuple(map(len, rows)))


def _refuse_shared(forget: Sequence[Row], retain: Sequence[Row]) -> None:
    kept = {(row.context, row.target) for row in retain}
    shared = [row for row in forget if (row.context, row.target) in kept]
    if shared:
        text = (shared[0].context + shared[0].target).replace("\n", " ")
        raise UserError(
            f"forget and retain share {len(shared)} of {len(forget)} rows, the first is {text!r:.80}; "
            "a row cannot be both, take it out of one file"
        )


def _refuse_taken(names: Iterable[str], output: Path) -> None:
    known = find_spec("lm_eval")
    upstream = [Path(folder) / "tasks" for folder in (known.submodule_search_locations or [])] if known else []
    files = [path for folder in (tasks_dir(), *upstream) for path in folder.rglob("*.yaml")]
    for path in [*files, *output.glob("*/*.yaml")]:
        content = path.read_bytes()
        for name in names:
            if name.encode() in content and _defines(content, name):
                raise UserError(f"name: there is a task {name} already, in {path}; choose another name")


def _defines(content: bytes, name: str) -> bool:
    """Whether a YAML file gives this name to a task, group or tag."""
    line = rf"""^[ \t]*(?:-[ \t]+)?["']?(?:task|group|tag)["']?[ \t]*:[ \t]*["']?{name}["']?[ \t]*(?:#.*)?\r?$"""
    return re.search(line.encode(), content, re.MULTILINE) is not None


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _yaml(kind: str, task: str, rows: Iterable[Row]) -> str:
    """The template of ``kind`` with its include resolved, and the rows at the end."""
    template = (tasks_dir() / "_templates" / kind).read_text(encoding="utf-8")
    head = re.sub(r"(?m)^custom_dataset:.*\n", "", template)
    head = re.sub(r"(?m)^class:.*", f"task: {task}\nclass: !function lm_ortho.harness.tasks.inline_rows.RowsTask", head)
    head = re.sub(r"(?m)^( +version:).*", r"\1 1.0", head)
    return f"{head.rstrip()}\nrows: |\n{''.join(f'  {_json_line(row)}{chr(10)}' for row in rows)}"


def _json_line(row: Row) -> str:
    """A row as JSON, empty fields left out, in characters that YAML takes as they are."""
    record = {name: value for name, value in row.as_dict().items() if value}
    text = json.dumps(record, ensure_ascii=False)
    return _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _readme(name: str, rows: Sequence[Sequence[Row]], source: str, licence: str) -> str:
    forget, retain = map(len, rows)
    head = {"source": source, "licence": licence, "needs": "offline; token probabilities"}
    lines = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in head.items())
    return f"---\n{lines}---\n{_README.format(name=name, forget=forget, retain=retain)}"


_README = """# {name}

| task | rows | arrows |
|---|---|---|
| `{name}_forget` | {forget} | towards a model that does not know them |
| `{name}_retain` | {retain} | towards a model that knows them |

    lm_eval --model libortho --include_path FOLDER --tasks {name}_forget,{name}_retain

FOLDER is this folder or one above it. The rows stand in the YAML files under `rows:`, one JSON object per line: the
folder can be moved and needs no other file, and whoever has it has the rows to forget in clear.

## Metrics

Those of the tasks `forget_set` and `retain_set` of lm-ortho, each with a 95 % interval, `<metric>_low` and
`<metric>_high`. What a row needs beside `question` and `answer` (or `text`):

| field | for |
|---|---|
| `secret` | `secret_ppl`, `extraction`: the part of the answer that nobody can guess |
| `paraphrased_answer`, `perturbed_answer` (a list) | `truth_ratio`: the right answer in other words, wrong answers |
| `group` | the unit of the intervals; `subject` if missing, else every row is its own |

A metric that no row has the fields for is not in the table of results.

## How to read them

A model that knows `{name}_forget` has a `ppl` and `secret_ppl` close to 1, `prob` and `extraction` close to 1 and a
`truth_ratio` far below 1. After forgetting, the best value is that of a model that never saw these rows, on *both*
sides: far above its `secret_ppl` a model avoids the true answer, which gives it away just as well. The metrics of
`{name}_retain` should not move.

## Checklist

* [ ] The source of the rows is cited at the top of this file (`source`), with a link to its paper if there is one.
* [ ] Their licence (`licence`) allows to pass them on.
* [x] No row stands in both tasks.
* [ ] The model knows `{name}_forget` before forgetting; otherwise there is nothing to forget.
* [ ] `{name}_retain` is measured on rows that the method did not see.
* [ ] Where numbers are published for these rows, they were compared with ours.

## Changelog

* 1.0: first version.
"""
