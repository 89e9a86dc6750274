"""Groups that name tasks of lm-eval: every name exists, and no task is reached twice.

Loading such a task downloads its data from the hub, so placeholders without data replace them.
"""

from __future__ import annotations

from typing import Any

import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.group import GroupConfig
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._yaml_loader import load_yaml

from lm_ortho.plugin.bridges import bridge_lm_eval
from tests.support.upstream import groups_by_reference, index_with_upstream

GROUPS = groups_by_reference()
SUBJECTS = 57


class PlaceholderTask(ConfigurableTask):
    """A task without data, with its name and the overrides of the groups above it."""

    def __init__(self, name: str, overrides: dict[str, Any] | None) -> None:
        self._config = TaskConfig(task=name)
        self.overrides = overrides or {}


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    """Returns an index of both kinds of tasks, which loads placeholders."""
    monkeypatch.setattr(
        TaskFactory, "_build_task", lambda self, entry, overrides: PlaceholderTask(entry.name, overrides)
    )
    return index_with_upstream()


def reachable_tasks(index: TaskManager, *names: str) -> list[str]:
    """Returns the names of all tasks that are reached, repeated if they are reached more than once."""
    groups = index.load(list(names))["groups"]
    return [task.task_name for group in (groups[name] for name in names) for task in group.get_all_tasks()]


def test_three_groups_name_tasks_of_lm_eval() -> None:
    assert set(GROUPS) == {"unlearning_utility", "unlearning_utility_mmlu", "wmdp_unlearning"}


@pytest.mark.parametrize("name", GROUPS)
def test_every_member_exists_and_is_unchanged(index: TaskManager, name: str) -> None:
    assert set(GROUPS[name]) <= set(index.all_tasks)
    path = index.task_index[name].yaml_path
    assert path is not None
    assert load_yaml(path).keys() <= GroupConfig.__dataclass_fields__.keys()  # other keys would change the members
    result = index.load([name])
    assert float(result["groups"][name].version) >= 1
    for task in result["tasks"].values():
        assert isinstance(task, PlaceholderTask)
        assert task.overrides.keys() <= {"task"}


def test_unlearning_and_its_utility_can_be_combined(index: TaskManager) -> None:
    names = reachable_tasks(index, "unlearning", "unlearning_utility")
    assert len(names) == len(set(names)) == 7 + 5 + 8
    assert {"tofu_forget", "reasoning_facts", "wikitext", "gsm8k", "arc_challenge", "hellaswag"} <= set(names)


def test_the_subset_of_mmlu_has_two_subjects_of_each_area(index: TaskManager) -> None:
    areas = [index.task_index[f"mmlu_{area}_tasks"].tags for area in ("stem", "humanities", "social_sciences", "other")]
    subset = set(GROUPS["unlearning_utility_mmlu"])
    assert [len(subset & area) for area in areas] == [2, 2, 2, 2]
    assert len(set().union(*areas)) == SUBJECTS


def test_wmdp_includes_all_of_mmlu(index: TaskManager) -> None:
    names = reachable_tasks(index, "wmdp_unlearning", "unlearning")
    assert len(names) == len(set(names)) == 3 + SUBJECTS + 7
    assert {"wmdp_bio", "wmdp_chem", "wmdp_cyber"} <= set(names)


def test_utility_and_wmdp_share_subjects_of_mmlu(index: TaskManager) -> None:
    with pytest.raises(ValueError, match="Duplicate task 'mmlu_"):
        index.load(["unlearning_utility", "wmdp_unlearning"])
    names = reachable_tasks(index, "unlearning_utility", "wmdp")
    assert len(names) == len(set(names)) == 13 + 3


@pytest.mark.slow
def test_all_tasks_of_lm_eval_and_this_package_in_one_index(index: TaskManager) -> None:
    bridge_lm_eval()
    full_index = TaskManager()
    for names in (["unlearning", "unlearning_utility"], ["wmdp_unlearning"]):
        assert reachable_tasks(full_index, *names) == reachable_tasks(index, *names)
