"""Groups of this package that name tasks of lm-eval, and an index of both without the 14,000 other files."""

from __future__ import annotations

from pathlib import Path

import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind

from lm_ortho.plugin.bridges import find_tasks_dir

UPSTREAM = Path(str(lm_eval.tasks.__file__)).parent
FOLDERS = ("wikitext", "mmlu/default", "gsm8k", "arc", "hellaswag", "wmdp")


def groups_by_reference() -> dict[str, list[str]]:
    """Returns the members of each group of this package that has a member of lm-eval."""
    index = TaskManager(include_defaults=False, include_path=str(find_tasks_dir())).task_index
    members = {name: entry.cfg["task"] for name, entry in index.items() if entry.kind is Kind.GROUP and entry.cfg}
    return {group: names for group, names in members.items() if not set(names) <= index.keys()}


def index_with_upstream() -> TaskManager:
    """Returns an index of the tasks of this package and of those folders of lm-eval that its groups name."""
    return TaskManager(
        include_defaults=False, include_path=[*(UPSTREAM / folder for folder in FOLDERS), find_tasks_dir()]
    )
