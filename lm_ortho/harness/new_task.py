"""``lm-ortho new-task``: writes a folder with two tasks, a forget task and a retain task, from two files of rows.

The rows are part of the YAML files (``RowsTask``), as a block of JSON lines. A path to a data file would be resolved
by lm-eval against the working directory; without one, the folder works in any place. That includes the tasks of this
package, whose folders may contain only YAML and Markdown. lm-eval reads every YAML file at its start, which takes 10 ms
per megabyte for a block of text.
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
from lm_ortho.plugin.bridges import find_tasks_dir

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_KINDS = ("forget", "retain")
# Characters that end a line of YAML, or are not permitted in it.
_YAML_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True)
class NewTask:
    """The written folder, the names of its tasks, and the number of rows of each task."""

    folder: Path
    tasks: tuple[str, ...]
    rows: tuple[int, ...]


def new_task(
    name: str, forget: str | Path, retain: str | Path, output: Path = Path(), *, source: str = "", licence: str = ""
) -> NewTask:
    """Writes ``output/name`` with the tasks ``name_forget`` and ``name_retain`` and a README.

    ``source`` and ``licence`` of the rows are written into the header of the README; the table of tasks reads them.

    Raises:
        UserError: for a malformed name, a name that another task has, a folder that is not empty or cannot be written,
            a file that is missing or invalid (with its line), or a row in both files. No partial folder remains.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"name={name!r:.100} must be lower-case letters, digits and underscores, a letter first")
    tasks = tuple(f"{name}_{kind}" for kind in _KINDS)
    folder = output.expanduser() / name
    check_output_directory(folder, "output")
    rows = [read_rows(forget, "forget"), read_rows(retain, "retain")]
    _check_disjoint(*rows)
    _check_names_available(tasks, output.expanduser())
    with atomic_directory(folder, "output") as scratch:
        for kind, task, task_rows in zip(_KINDS, tasks, rows, strict=True):
            _write_text(scratch / f"{task}.yaml", _format_yaml(kind, task, task_rows))
        _write_text(scratch / "README.md", _format_readme(name, rows, source=source, licence=licence))
    return NewTask(folder, tasks, tuple(map(len, rows)))


def _check_disjoint(forget: Sequence[Row], retain: Sequence[Row]) -> None:
    retain_texts = {(row.context, row.target) for row in retain}
    duplicates = [number for number, row in enumerate(forget, 1) if (row.context, row.target) in retain_texts]
    if duplicates:
        raise UserError(
            f"forget and retain share {len(duplicates)} of {len(forget)} rows, the first is row {duplicates[0]} of "
            "forget; a row cannot be in both, remove it from one file"
        )


def _check_names_available(names: Iterable[str], output: Path) -> None:
    spec = find_spec("lm_eval")
    upstream = [Path(folder) / "tasks" for folder in (spec.submodule_search_locations or [])] if spec else []
    files = [path for folder in (find_tasks_dir(), *upstream) for path in folder.rglob("*.yaml")]
    for path in filter(Path.is_file, [*files, *output.glob("*/*.yaml")]):
        content = path.read_bytes()
        for name in names:
            if name.encode() in content and _defines_name(content, name):
                raise UserError(f"name: a task {name} already exists in {path}; choose another name")


def _defines_name(content: bytes, name: str) -> bool:
    """Returns whether a YAML file defines a task, group or tag of this name."""
    pattern = rf"""^[ \t]*(?:-[ \t]+)?["']?(?:task|group|tag)["']?[ \t]*:[ \t]*["']?{name}["']?[ \t]*(?:#.*)?\r?$"""
    return re.search(pattern.encode(), content, re.MULTILINE) is not None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _format_yaml(kind: str, task: str, rows: Iterable[Row]) -> str:
    """Returns the template of ``kind`` under the name ``task``, with the rows at its end."""
    template = (find_tasks_dir() / "_templates" / kind).read_text(encoding="utf-8")
    head = re.sub(r"(?m)^custom_dataset:.*\n", "", template)
    head = re.sub(r"(?m)^class:.*", f"task: {task}\nclass: !function lm_ortho.harness.tasks.inline_rows.RowsTask", head)
    head = re.sub(r"(?m)^( +version:).*", r"\1 1.0", head)
    lines = "".join(f"  {_format_json_line(row)}\n" for row in rows)
    return f"{head.rstrip()}\nrows: |\n{lines}"


def _format_json_line(row: Row) -> str:
    """Returns a row as JSON without its empty fields; characters that YAML would change are escaped."""
    record = {name: value for name, value in row.as_dict().items() if value}
    text = json.dumps(record, ensure_ascii=False)
    return _YAML_UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _format_readme(name: str, rows: Sequence[Sequence[Row]], *, source: str, licence: str) -> str:
    forget, retain = map(len, rows)
    head = {"source": source, "licence": licence, "needs": "offline; token probabilities"}
    lines = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in head.items())
    return f"---\n{lines}---\n{_README.format(name=name, forget=forget, retain=retain)}"


_README = """# {name}

| task | rows | arrows point towards |
|---|---|---|
| `{name}_forget` | {forget} | a model that does not know them |
| `{name}_retain` | {retain} | a model that knows them |

    lm_eval --model libortho --include_path FOLDER --tasks {name}_forget,{name}_retain

FOLDER is this folder or one above it. The YAML files contain the rows under `rows:`, one JSON object per line. The
folder can therefore be moved and needs no other file; note that it contains the forget set in plain text.

## Metrics

The metrics are those of the tasks `forget_set` and `retain_set` of lm-ortho, each with a 95 % confidence interval,
`<metric>_low` and `<metric>_high`. Some need more fields than `question` and `answer` (or `text`):

| field | metrics that need it |
|---|---|
| `secret` | `secret_ppl`, `extraction`: the part of the answer that cannot be guessed |
| `paraphrased_answer`, `perturbed_answer` (a list) | `truth_ratio`: the right answer in other words, wrong answers |
| `group` | the cluster of the bootstrap; by default `subject`, or else each row on its own |

A metric is missing from the table of results if no row has the fields that it needs.

## How to read them

A model that knows `{name}_forget` has a `ppl` and `secret_ppl` close to 1, a `prob` and `extraction` close to 1, and a
`truth_ratio` far below 1. After forgetting, the best value is that of a model that never saw these rows, and deviations
count in *both* directions: a model with a far higher `secret_ppl` avoids the true answer, which also reveals it. The
metrics of `{name}_retain` should not change.

## Checklist

* [ ] The source of the rows is cited at the top of this file (`source`), with a link to its paper if there is one.
* [ ] Their licence (`licence`) permits redistribution.
* [x] No row is in both tasks.
* [ ] The model knows `{name}_forget` before forgetting; otherwise there is nothing to forget.
* [ ] `{name}_retain` is measured on rows that the method did not see.
* [ ] Published numbers for these rows, where they exist, were compared with the measured ones.

## Changelog

* 1.0: first version.
"""
