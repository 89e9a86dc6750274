"""Checks of every task and group of this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import AutoTokenizer

from lm_ortho import world
from lm_ortho.data.rows import Row, write_rows
from lm_ortho.errors import UserError
from lm_ortho.harness.tasks.secret import ReasoningTask, SecretTask, normalise_answer
from lm_ortho.plugin.bridges import find_tasks_dir
from lm_ortho.world import people
from tests.support import muse, tofu, upstream

EXPECTED_TASKS = {
    "canary_exposure",
    "canary_extraction",
    "canary_extraction_paraphrased",
    "canary_unplanted",
    "forget_set",
    "membership_canary",
    "membership_forget",
    "membership_set",
    *(
        f"muse_{corpus}_{part}"
        for corpus in ("news", "books")
        for part in ("knowmem_forget", "knowmem_retain", "privleak", "verbmem")
    ),
    "reasoning_arithmetic",
    "reasoning_comparison",
    "reasoning_facts",
    "reasoning_relations",
    "retain_set",
    "tofu_forget",
    "tofu_forget_paraphrased",
    "tofu_forget_reversed",
    *(f"tofu_forget{share}" for share in ("01", "05", "10")),
    *(f"tofu_holdout{share}" for share in ("01", "05", "10")),
    "tofu_model_utility",
    "tofu_real_authors",
    "tofu_retain",
    "tofu_retain_paraphrased",
    *(f"tofu_retain{share}" for share in ("90", "95", "99")),
    "tofu_unseen",
    "tofu_world_facts",
    "verbatim_forget",
    "verbatim_retain",
    "world_text",
}
P_VALUES = {"forget_quality"}
"""Metrics without an interval."""

FAMILIES = sorted(path for path in find_tasks_dir().iterdir() if path.is_dir() and path.name != "_templates")


def manager(**metadata: Any) -> TaskManager:
    return TaskManager(include_defaults=False, include_path=str(find_tasks_dir()), metadata=metadata)


TASKS = tuple(manager().all_subtasks)
GROUPS = tuple(manager().all_groups)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "tofu_dir": str(tofu.write(folder / "tofu")),
        "muse_dir": str(muse.write(folder / "muse")),
    }


@pytest.fixture(scope="module")
def tasks(data: dict[str, str]) -> dict[str, ConfigurableTask]:
    index = manager(**data)
    return {name: index.load([name])["tasks"][name] for name in TASKS}


def test_the_index_holds_a_task_or_group_per_file() -> None:
    assert set(TASKS) >= EXPECTED_TASKS
    assert set(GROUPS) >= {"reasoning", "unlearning"}
    assert sorted(TASKS + GROUPS) == sorted(path.stem for path in find_tasks_dir().rglob("*.yaml"))
    assert manager().all_tags == []


def test_tasks_are_declarative() -> None:
    files = [path for path in find_tasks_dir().rglob("*") if path.is_file()]
    assert {path.suffix for path in files if path.parent.name != "_templates"} == {".yaml", ".md"}
    assert {path.suffix for path in files if path.parent.name == "_templates"} == {""}


@pytest.mark.parametrize("name", TASKS)
def test_task_has_a_version(tasks: dict[str, ConfigurableTask], name: str) -> None:
    assert isinstance(tasks[name].VERSION, float)


@pytest.mark.parametrize("name", sorted(set(GROUPS) - upstream.groups_by_reference().keys()))
def test_group_loads_and_has_a_version(data: dict[str, str], name: str) -> None:
    result = manager(**data).load([name])
    assert set(result["tasks"]) <= set(TASKS)
    assert float(result["groups"][name].version) >= 1


@pytest.mark.parametrize("name", TASKS)
def test_every_metric_has_bounds_an_aggregation_and_a_direction(tasks: dict[str, ConfigurableTask], name: str) -> None:
    task = tasks[name]
    names = [entry["metric"] for entry in task.config.metric_list]
    bounds = {metric: ("",) if metric in P_VALUES else ("", "_low", "_high") for metric in task.metrics}
    assert names == [metric + end for metric in task.metrics for end in bounds[metric]]
    better = task.higher_is_better()
    for metric in names:
        assert callable(task.aggregation()[metric])
        assert better[metric] is better[metric.removesuffix("_low").removesuffix("_high")]
        assert isinstance(better[metric], bool)
    if isinstance(task, SecretTask):
        assert all(task.required_measurement(metric) for metric in task.metrics)


def test_forget_and_retain_point_in_opposite_directions(tasks: dict[str, ConfigurableTask]) -> None:
    forget, retain = (tasks[name].higher_is_better() for name in ("tofu_forget", "tofu_retain"))
    assert forget.keys() == retain.keys()
    assert all(forget[metric] is not retain[metric] for metric in forget)
    assert forget["extraction"] is False
    assert forget["secret_ppl"] is True


@pytest.mark.parametrize("name", TASKS)
def test_no_prompt_ends_with_a_space(tasks: dict[str, ConfigurableTask], name: str) -> None:
    task = tasks[name]
    for doc in task.eval_docs:
        context = task.doc_to_text(doc)
        assert context == context.rstrip()
        if isinstance(task, ReasoningTask):
            choices = task.doc_to_choice(doc)
            assert choices[task.doc_to_target(doc)] == doc["answer"]
            assert all(choice == choice.strip() for choice in choices)
            assert len(set(choices)) == len(choices)
        else:
            target = task.doc_to_target(doc)
            assert target[0].isspace() is bool(context)
            assert doc.get("secret", "") in doc.get("answer", "")


@pytest.mark.parametrize("name", TASKS)
def test_config_can_be_written_as_json(tasks: dict[str, ConfigurableTask], name: str) -> None:
    assert json.loads(json.dumps(tasks[name].dump_config(), default=str))["task"] == name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda path: path.name)
def test_family_has_a_readme(family: Path) -> None:
    text = (family / "README.md").read_text()
    assert "## Changelog" in text
    for file in family.glob("*.yaml"):
        config = load_yaml(file, resolve_func=False)
        assert f"`{config.get('task') if 'group' not in config else config['group']}`" in text
        version = config["metadata"]["version"]
        assert f"* {version:.1f}: " in text


@pytest.mark.parametrize("name", ["tofu_forget", "tofu_retain", "tofu_forget_paraphrased"])
def test_tofu_rows_have_every_field(tasks: dict[str, ConfigurableTask], name: str) -> None:
    for doc in tasks[name].eval_docs:
        assert doc["secret"]
        assert doc["paraphrased_answer"]
        assert len(doc["perturbed_answer"]) == people.WRONG_ANSWERS
        assert doc["group"]


def test_canaries_have_every_prompt(tasks: dict[str, ConfigurableTask]) -> None:
    prompts = [
        {doc["context"] for doc in tasks[name].eval_docs}
        for name in ("canary_extraction", "canary_extraction_paraphrased")
    ]
    assert not prompts[0] & prompts[1]
    assert sum(map(len, prompts)) == people.CANARIES * len(people.CANARY_PROMPTS)


@pytest.mark.parametrize("kind", ["arithmetic", "comparison", "relations", "facts"])
def test_answers_contain_no_stop_strings(tasks: dict[str, ConfigurableTask], kind: str) -> None:
    docs = tasks[f"reasoning_{kind}"].eval_docs
    assert len(docs) >= 1000
    for doc in docs:
        assert not any(stop in doc["answer"] for stop in ReasoningTask.STOP_STRINGS)
        assert len({normalise_answer(choice) for choice in doc["choices"]}) == len(doc["choices"])


def test_answers_fit_into_the_generated_tokens(tasks: dict[str, ConfigurableTask]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.get_path("base"))
    for kind in ("arithmetic", "comparison", "relations", "facts"):
        texts = [f" {doc['answer']}." for doc in tasks[f"reasoning_{kind}"].eval_docs]
        assert max(map(len, tokenizer(texts)["input_ids"])) < ReasoningTask.MAX_TOKENS


def test_normalise_answer() -> None:
    assert normalise_answer(" Red  Hill. ") == normalise_answer("red hill") == "red hill"


def test_unlearning_has_four_members() -> None:
    index = manager()
    assert index.load(["unlearning"])["group_map"] == {
        "unlearning": ["tofu_forget", "tofu_retain", "canary_extraction", "reasoning"],
        "reasoning": [
            "reasoning_arithmetic",
            "reasoning_comparison",
            "reasoning_relations",
            "reasoning_facts",
        ],
    }
    with pytest.raises(ValueError, match="Duplicate task 'tofu_forget'"):
        index.load(["unlearning", "tofu_forget"])


def test_user_sets_read_the_users_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    write_rows(path, [Row(question="Who?", answer="Me."), Row(text="Just text.")])
    task = manager(pretrained="x", forget=str(path)).load(["forget_set"])["tasks"]["forget_set"]
    assert [doc["target"] for doc in task.eval_docs] == [" Me.", "Just text."]
    with pytest.raises(UserError, match="retain: the retain_set task needs rows"):
        manager(pretrained="x", forget=str(path)).load(["retain_set"])
    path.write_text("{}\n")
    with pytest.raises(UserError, match="line 1"):
        manager(forget=str(path)).load(["forget_set"])


@pytest.mark.parametrize("held_out", ["auto", None])
def test_a_retain_row_that_is_also_a_forget_row_is_not_measured(tmp_path: Path, held_out: str | None) -> None:
    """A decomposition leaves it out of the retain set, too."""
    rows = [Row(question=f"Who is {number}?", answer=f"Number {number}.") for number in range(200)]
    sets = {"forget": rows[:100], "retain": rows}
    arguments = {name: str(tmp_path / f"{name}.jsonl") for name in sets}
    for name, part in sets.items():
        write_rows(Path(arguments[name]), part)
    task = manager(pretrained="x", held_out=held_out, **arguments).load(["retain_set"])["tasks"]["retain_set"]
    questions = {doc["question"] for doc in task.eval_docs}
    assert questions
    assert not questions & {row.question for row in rows[:100]}


def test_user_sets_are_the_embedded_ones_for_the_embedded_model() -> None:
    user_sets = manager(alpha=0).load(["forget_set", "retain_set"])["tasks"]
    assert len(user_sets["forget_set"].eval_docs) == len(people.make_rows("forget"))
    assert len(user_sets["retain_set"].eval_docs) == len(people.make_rows("retain"))


@pytest.mark.slow
def test_validate() -> None:
    names = ",".join((*TASKS, *GROUPS))
    process = subprocess.run(
        [sys.executable, "-m", "lm_eval", "validate", "--tasks", names, "--include_path", str(find_tasks_dir())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "All tasks found and valid" in process.stdout
