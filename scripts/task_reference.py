#!/usr/bin/env python
"""Writes docs/tasks.md, the table of our tasks, from the index of lm-eval and the READMEs of the families.

    python scripts/task_reference.py

Metrics, directions and versions are those of the YAML files. Source, licence of the data and what a task needs stand
at the head of the family's README, between two lines ``---``; ``tasks:`` in it says what is different for one of them:

    ---
    source: Maini et al. 2024, [arXiv 2401.06121](https://arxiv.org/abs/2401.06121)
    licence: MIT
    needs: offline; token probabilities
    tasks:
      tofu_holdout01: {needs: network; token probabilities, note: only on the hub}
    ---

A test fails while the page differs from what this would write, and for a task that declares nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.api.registry import is_higher_better
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from lm_ortho.errors import UserError
from lm_ortho.plugin.bridges import tasks_dir

PAGE = Path(__file__).parents[1] / "docs" / "tasks.md"
REQUIRED = ("source", "licence", "needs")
HEAD = """# Tasks

Written by `python scripts/task_reference.py`; do not edit. Metrics and directions are those of the YAML files in
`tasks/`, the rest stands at the head of the README of each family, which also says how the numbers are to be read.

The arrow is the direction in lm-eval's table: where something should be forgotten it points to a model that does not
know it. Best is always like a model that never saw it, not further. Every metric of ours but a p-value also has `_low`
and `_high`, the ends of its 95 % interval. *Token probabilities* means log-likelihoods of given texts (`--model hf`,
`vllm`, `libortho`, not a chat service); *offline* that no network is needed, *network* that lm-eval fetches data from
the hub.
"""

Config = Mapping[str, Any]


def page(folder: Path | None = None) -> str:
    """The page: a section per family, a row per task and group.

    Raises:
        UserError: for a task without source, licence or needs, and for a README whose head is wrong.
    """
    folder = folder or tasks_dir()
    configs = _configs(folder)
    families = {path.parent for path, _ in configs.values()}
    return HEAD + "".join(_section(family, configs, folder) for family in sorted(families))


def _configs(folder: Path) -> dict[str, tuple[Path, Config]]:
    """File and configuration of each task and group in lm-eval's index of ``folder``."""
    index = TaskManager(include_defaults=False, include_path=str(folder)).task_index
    files = {name: entry.yaml_path for name, entry in index.items() if entry.yaml_path}
    return {name: (path, load_yaml(path, resolve_func=False)) for name, path in sorted(files.items())}


def _section(family: Path, configs: Mapping[str, tuple[Path, Config]], folder: Path) -> str:
    readme = family / "README.md"
    shown = Path("tasks", readme.relative_to(folder))
    names = [name for name, (path, _) in configs.items() if path.parent == family]
    declared, text = _declared(readme, shown, names)
    title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), family.name)
    rows = "".join(_row(name, configs, _about(name, declared, shown)) for name in names)
    head = "| task | version | metrics | source | licence of the data | needs |\n|---|---|---|---|---|---|\n"
    return f"\n## {title}\n\n[How to read them](../{shown.as_posix()})\n\n{head}{rows}"


def _declared(readme: Path, shown: Path, names: list[str]) -> tuple[Config, str]:
    """The head of a README and the text below it."""
    if not readme.is_file():
        raise UserError(f"{shown}: missing; every family of tasks has a README with source, licence and needs")
    text = readme.read_text(encoding="utf-8")
    head, _, rest = text.removeprefix("---\n").partition("\n---\n")
    try:
        declared = yaml.safe_load(head) if text.startswith("---\n") else {}
    except yaml.YAMLError as error:
        raise UserError(f"{shown}: its head is not valid YAML ({' '.join(str(error).split())})") from None
    own = (declared.get("tasks") or {}) if isinstance(declared, dict) else None
    if not isinstance(own, dict) or not all(isinstance(entry, dict) for entry in own.values()):
        raise UserError(f"{shown}: its head must be `name: value` lines, and so must each task under `tasks:`")
    entries = [declared, *own.values()]
    unknown = [f"key {key}" for entry in entries for key in entry if key not in (*REQUIRED, "note", "tasks")]
    unknown += [f"task {name}" for name in own if name not in names]
    if unknown:
        raise UserError(f"{shown}: unknown {unknown[0]} in its head; known keys: {', '.join(REQUIRED)}, note, tasks")
    return declared, rest if text.startswith("---\n") else text


def _about(name: str, declared: Config, shown: Path) -> dict[str, str]:
    """Source, licence, needs and note of a task."""
    own = {**declared, **(declared.get("tasks") or {}).get(name, {})}
    for key in REQUIRED:
        if not str(own.get(key) or "").strip():
            raise UserError(f"{shown}: {name} declares no {key}; write `{key}: ...` between the `---` at its head")
    return {key: " ".join(str(own.get(key) or "").split()) for key in (*REQUIRED, "note")}


def _row(name: str, configs: Mapping[str, tuple[Path, Config]], about: Mapping[str, str]) -> str:
    config = configs[name][1]
    known = {known: config for known, (_, config) in configs.items()}
    version = (config.get("metadata") or {}).get("version")
    if version is None:
        raise UserError(f"{name}: its YAML file declares no metadata.version")
    metrics = _of_group(config, known) if "group" in config else ", ".join(_metrics(config))
    metrics += f" ({about['note']})" if about["note"] else ""
    cells = [f"`{name}`", f"{version:.1f}", metrics, *(about[key] for key in REQUIRED)]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _of_group(config: Config, known: Mapping[str, Config]) -> str:
    """Its members, those of lm-eval itself with their metrics, and what it aggregates over them."""
    members = [f"`{name}`{_upstream_metrics(name) if name not in known else ''}" for name in _members(config)]
    means = [
        f"`{entry['metric']}` {_arrow(_direction(entry['metric'], config, known))}"
        for entry in config.get("aggregate_metric_list") or []
    ]
    return f"group of {', '.join(members)}" + (f"; {', '.join(means)}: mean over them" if means else "")


def _members(config: Config) -> list[str]:
    listed = config["task"] if isinstance(config["task"], list) else [config["task"]]
    return [each if isinstance(each, str) else each.get("task") or each["group"] for each in listed]


def _upstream_metrics(name: str) -> str:
    config = _upstream(name)
    found = config.get("aggregate_metric_list") or config.get("metric_list") or []
    return f" ({', '.join(_metrics({'metric_list': found}))})" if found else ""


def _metrics(config: Config) -> Iterator[str]:
    for entry in config.get("metric_list") or []:
        name = str(entry["metric"])
        if not name.endswith(("_low", "_high")):
            yield f"`{name}` {_arrow(_given(entry))}"


def _given(entry: Config) -> bool:
    """The direction that a metric's entry gives, or lm-eval for its own metrics."""
    given = entry.get("higher_is_better")
    return bool(is_higher_better(entry["metric"]) if given is None else given)


def _direction(metric: str, group: Config, known: Mapping[str, Config]) -> bool:
    """The direction of a metric in the first member that has it."""
    for name in _members(group):
        config = known.get(name) or _upstream(name)
        for entry in config.get("metric_list") or []:
            if entry["metric"] == metric:
                return _given(entry)
    return _given({"metric": metric})


def _arrow(up: bool) -> str:
    return "↑" if up else "↓"


def _upstream(name: str) -> Config:
    """The configuration of a task or group of lm-eval itself.

    Raises:
        UserError: when lm-eval has no such task.
    """
    for path in _upstream_files().get(name, []):
        config = load_yaml(path, resolve_func=False)
        if name in (config.get("task"), config.get("group")):
            return dict(config)
    raise UserError(f"{name}: a group of ours names this task, and neither we nor lm-eval have it")


@cache
def _upstream_files() -> dict[str, list[Path]]:
    """YAML files of lm-eval by their stem, a leading underscore left out."""
    files: dict[str, list[Path]] = {}
    for path in sorted(Path(str(lm_eval.tasks.__file__)).parent.rglob("*.yaml")):
        files.setdefault(path.stem.lstrip("_"), []).append(path)
    return files


def main() -> None:
    """Writes the page; a declaration that is missing ends in one line."""
    try:
        text = page()
    except UserError as error:
        sys.exit(f"error: {error}")
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
