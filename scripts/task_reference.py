#!/usr/bin/env python
"""Writes docs/tasks.md, the table of tasks, from the index of lm-eval and the READMEs of the task families.

    python scripts/task_reference.py

Metrics, directions and versions come from the YAML files. The source, the licence of the data and the requirements of a
task come from the header of the family's README, between two lines ``---``; ``tasks:`` lists what differs for a task:

    ---
    source: Maini et al. 2024, [arXiv 2401.06121](https://arxiv.org/abs/2401.06121)
    licence: MIT
    needs: offline; token probabilities
    tasks:
      tofu_holdout01: {needs: network; token probabilities, note: only on the hub}
    ---

A test fails if the page is not up to date, and for a task without declarations.
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
from lm_ortho.plugin.bridges import find_tasks_dir

PAGE = Path(__file__).parents[1] / "docs" / "tasks.md"
REQUIRED_KEYS = ("source", "licence", "needs")
INTRODUCTION = """# Tasks

Written by `python scripts/task_reference.py`; do not edit. Metrics and directions come from the YAML files in `tasks/`.
The remaining columns come from the header of the README of each family, which also explains how to read the numbers.

The arrow is the direction in lm-eval's table. For a forget set, it points to a model that does not know the set; the
best value is always that of the never-saw-it model, and not beyond. Every metric of this package except a p-value also
has `_low` and `_high`, the bounds of its 95 % confidence interval. *Token probabilities* means log-likelihoods of given
texts (`--model hf`, `vllm`, `libortho`, but not a chat service). *Offline* means that no network is needed, *network*
that lm-eval downloads data from the hub.
"""

Config = Mapping[str, Any]


def render_page(folder: Path | None = None) -> str:
    """Returns the page, with a section per family and a row per task and group.

    Raises:
        UserError: for a task without source, licence or needs, and for a README with an invalid header.
    """
    folder = folder or find_tasks_dir()
    configs = _read_configs(folder)
    families = {path.parent for path, _ in configs.values()}
    return INTRODUCTION + "".join(_render_section(family, configs, folder) for family in sorted(families))


def _read_configs(folder: Path) -> dict[str, tuple[Path, Config]]:
    """Returns the file and configuration of each task and group in lm-eval's index of ``folder``."""
    index = TaskManager(include_defaults=False, include_path=str(folder)).task_index
    files = {name: entry.yaml_path for name, entry in index.items() if entry.yaml_path}
    return {name: (path, load_yaml(path, resolve_func=False)) for name, path in sorted(files.items())}


def _render_section(family: Path, configs: Mapping[str, tuple[Path, Config]], folder: Path) -> str:
    readme = family / "README.md"
    label = Path("tasks", readme.relative_to(folder))
    names = [name for name, (path, _) in configs.items() if path.parent == family]
    header, text = _read_header(readme, label, names)
    title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), family.name)
    rows = "".join(_render_row(name, configs, _read_declarations(name, header, label)) for name in names)
    columns = "| task | version | metrics | source | licence of the data | needs |\n|---|---|---|---|---|---|\n"
    return f"\n## {title}\n\n[How to read them](../{label.as_posix()})\n\n{columns}{rows}"


def _read_header(readme: Path, label: Path, names: list[str]) -> tuple[Config, str]:
    """Returns the header of a README, and the text below it."""
    if not readme.is_file():
        raise UserError(f"{label}: missing; every family of tasks has a README with source, licence and needs")
    text = readme.read_text(encoding="utf-8")
    has_header = text.startswith("---\n")
    block, _, body = text.removeprefix("---\n").partition("\n---\n")
    try:
        header = yaml.safe_load(block) if has_header else {}
    except yaml.YAMLError as error:
        raise UserError(f"{label}: its header is not valid YAML ({' '.join(str(error).split())})") from None
    per_task = (header.get("tasks") or {}) if isinstance(header, dict) else None
    if not isinstance(per_task, dict) or not all(isinstance(entry, dict) for entry in per_task.values()):
        raise UserError(f"{label}: its header must be `name: value` lines, and so must each task under `tasks:`")
    entries = [header, *per_task.values()]
    unknown = [f"key {key}" for entry in entries for key in entry if key not in (*REQUIRED_KEYS, "note", "tasks")]
    unknown += [f"task {name}" for name in per_task if name not in names]
    if unknown:
        known = ", ".join((*REQUIRED_KEYS, "note", "tasks"))
        raise UserError(f"{label}: unknown {unknown[0]} in its header; known keys: {known}")
    return header, body if has_header else text


def _read_declarations(name: str, header: Config, label: Path) -> dict[str, str]:
    """Returns the source, licence, needs and note of a task."""
    declarations = {**header, **(header.get("tasks") or {}).get(name, {})}
    for key in REQUIRED_KEYS:
        if not str(declarations.get(key) or "").strip():
            raise UserError(f"{label}: {name} declares no {key}; write `{key}: ...` between the `---` at its top")
    return {key: " ".join(str(declarations.get(key) or "").split()) for key in (*REQUIRED_KEYS, "note")}


def _render_row(name: str, configs: Mapping[str, tuple[Path, Config]], declarations: Mapping[str, str]) -> str:
    config = configs[name][1]
    own_configs = {own_name: own_config for own_name, (_, own_config) in configs.items()}
    version = (config.get("metadata") or {}).get("version")
    if version is None:
        raise UserError(f"{name}: its YAML file declares no metadata.version")
    metrics = _render_group(config, own_configs) if "group" in config else ", ".join(_render_metrics(config))
    metrics += f" ({declarations['note']})" if declarations["note"] else ""
    cells = [f"`{name}`", f"{version:.1f}", metrics, *(declarations[key] for key in REQUIRED_KEYS)]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _render_group(config: Config, own_configs: Mapping[str, Config]) -> str:
    """Returns the members of a group, those of lm-eval with their metrics, and the aggregates over them."""
    members = [f"`{name}`{_upstream_metrics(name) if name not in own_configs else ''}" for name in _members(config)]
    means = [
        f"`{entry['metric']}` {_arrow(_find_direction(entry['metric'], config, own_configs))}"
        for entry in config.get("aggregate_metric_list") or []
    ]
    return f"group of {', '.join(members)}" + (f"; {', '.join(means)}: mean over them" if means else "")


def _members(config: Config) -> list[str]:
    members = config["task"] if isinstance(config["task"], list) else [config["task"]]
    return [member if isinstance(member, str) else member.get("task") or member["group"] for member in members]


def _upstream_metrics(name: str) -> str:
    config = _read_upstream(name)
    metric_list = config.get("aggregate_metric_list") or config.get("metric_list") or []
    return f" ({', '.join(_render_metrics({'metric_list': metric_list}))})" if metric_list else ""


def _render_metrics(config: Config) -> Iterator[str]:
    for entry in config.get("metric_list") or []:
        name = str(entry["metric"])
        if not name.endswith(("_low", "_high")):
            yield f"`{name}` {_arrow(_is_higher_better(entry))}"


def _is_higher_better(entry: Config) -> bool:
    """Returns the direction of a metric from its entry, or from lm-eval for its own metrics."""
    direction = entry.get("higher_is_better")
    return bool(is_higher_better(entry["metric"]) if direction is None else direction)


def _find_direction(metric: str, group: Config, own_configs: Mapping[str, Config]) -> bool:
    """Returns the direction of a metric in the first member that has it."""
    for name in _members(group):
        config = own_configs.get(name) or _read_upstream(name)
        for entry in config.get("metric_list") or []:
            if entry["metric"] == metric:
                return _is_higher_better(entry)
    return _is_higher_better({"metric": metric})


def _arrow(is_higher_better: bool) -> str:
    return "↑" if is_higher_better else "↓"


def _read_upstream(name: str) -> Config:
    """Returns the configuration of a task or group of lm-eval.

    Raises:
        UserError: when lm-eval has no such task.
    """
    for path in _upstream_files().get(name, []):
        config = load_yaml(path, resolve_func=False)
        if name in (config.get("task"), config.get("group")):
            return dict(config)
    raise UserError(f"{name}: a group names this task, and neither this package nor lm-eval has it")


@cache
def _upstream_files() -> dict[str, list[Path]]:
    """Returns the YAML files of lm-eval by their stem, without a leading underscore."""
    files: dict[str, list[Path]] = {}
    for path in sorted(Path(str(lm_eval.tasks.__file__)).parent.rglob("*.yaml")):
        files.setdefault(path.stem.lstrip("_"), []).append(path)
    return files


def main() -> None:
    """Writes the page; a missing declaration is reported in one line."""
    try:
        text = render_page()
    except UserError as error:
        sys.exit(f"error: {error}")
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
