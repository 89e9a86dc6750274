"""Groups that name tasks of lm-eval itself: every name is there and no task is reached twice.

Loading such a task fetches its data from the hub, so light stand-ins take their places.
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

from lm_ortho.plugin.bridges import bridge_now
from tests.support.upstream import both, groups_by_reference

GROUPS = groups_by_reference()
SUBJECTS = 57


class StandIn(ConfigurableTask):
    """A task without data: its name, and what the groups above it changed."""

    def __init__(self, name: str, overrides: dict[str, Any] | None) -> None:
        self._config = TaskConfig(task=name)
        self.overrides = overrides or {}


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    """Both kinds of tasks, stand-ins once they are loaded."""
    monkeypatch.setattr(TaskFactory, "_build_task", lambda self, entry, overrides: StandIn(entry.name, overrides))
    return both()


def leaves(index: TaskManager, *names: str) -> list[str]:
    """Names of all tasks that are reached, as often as they are."""
    loaded = index.load(list(names))
    top = {name: loaded["groups"][name] for name in names}
    return [task.task_name for group in top.values() for task in group.get_all_tasks()]


def test_which_groups_name_tasks_of_lm_eval() -> None:
    assert set(GROUPS) == {"unlearning_utility", "unlearning_utility_mmlu", "wmdp_unlearning"}


@pytest.mark.parametrize("name", GROUPS)
def test_every_member_is_known_and_left_as_it_is(index: TaskManager, name: str) -> None:
    assert set(GROUPS[name]) <= set(index.all_tasks)
    path = index.task_index[name].yaml_path
    assert path is not None
    assert load_yaml(path).keys() <= GroupConfig.__dataclass_fields__.keys()  # else members would be changed
    loaded = index.load([name])
    assert float(loaded["groups"][name].version) >= 1
    for task in loaded["tasks"].values():
        assert isinstance(task, StandIn)
        assert task.overrides.keys() <= {"task"}


def test_unlearning_and_its_utility_are_one_line(index: TaskManager) -> None:
    reached = leaves(index, "unlearning", "unlearning_utility")
    assert len(reached) == len(set(reached)) == 7 + 5 + 8
    assert {"tofu_forget", "reasoning_facts", "wikitext", "gsm8k", "arc_challenge", "hellaswag"} <= set(reached)


def test_the_subset_of_mmlu_has_two_subjects_of_each_area(index: TaskManager) -> None:
    areas = [index.task_index[f"mmlu_{area}_tasks"].tags for area in ("stem", "humanities", "social_sciences", "other")]
    subset = set(GROUPS["unlearning_utility_mmlu"])
    assert [len(subset & area) for area in areas] == [2, 2, 2, 2]
    assert len(set().union(*areas)) == SUBJECTS


def test_wmdp_comes_with_all_of_mmlu(index: TaskManager) -> None:
    reached = leaves(index, "wmdp_unlearning", "unlearning")
    assert len(reached) == len(set(reached)) == 3 + SUBJECTS + 7
    assert {"wmdp_bio", "wmdp_chem", "wmdp_cyber"} <= set(reached)


def test_what_the_readme_says_about_asking_for_both(index: TaskManager) -> None:
    with pytest.raises(ValueError, match="Duplicate task 'mmlu_"):
        index.load(["unlearning_utility", "wmdp_unlearning"])
    reached = leaves(index, "unlearning_utility", "wmdp")
    assert len(reached) == len(set(reached)) == 13 + 3


@pytest.mark.slow
def test_all_of_lm_eval_and_ours_in_one_index(index: TaskManager) -> None:
    bridge_now()
    everything = TaskManager()
    for names in (["unlearning", "unlearning_utility"], ["wmdp_unlearning"]):
        assert leaves(everything, *names) == leaves(index, *names)
