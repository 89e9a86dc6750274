"""Groups of ours that name tasks of lm-eval itself, and an index that holds both without the 14,000 other files."""

from __future__ import annotations

from pathlib import Path

import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind

from lm_ortho.plugin.bridges import tasks_dir

UPSTREAM = Path(str(lm_eval.tasks.__file__)).parent
FOLDERS = ("wikitext", "mmlu/default", "gsm8k", "arc", "hellaswag", "wmdp")


def groups_by_reference() -> dict[str, list[str]]:
    """The members of each group of ours that has one which is not ours."""
    ours = TaskManager(include_defaults=False, include_path=str(tasks_dir())).task_index
    members = {name: entry.cfg["task"] for name, entry in ours.items() if entry.kind is Kind.GROUP and entry.cfg}
    return {group: names for group, names in members.items() if not set(names) <= ours.keys()}


def both() -> TaskManager:
    """Our tasks and the folders of lm-eval that our groups name."""
    return TaskManager(include_defaults=False, include_path=[*(UPSTREAM / folder for folder in FOLDERS), tasks_dir()])
