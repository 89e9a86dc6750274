"""``lm-ortho new-task``: the written folder works in any place, and invalid input leaves no files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from lm_ortho.cli.app import app
from lm_ortho.data.rows import Row, parse_rows, write_rows
from lm_ortho.errors import UserError
from lm_ortho.harness import new_task as module
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.harness.tasks.inline_rows import RowsTask
from lm_ortho.world import people
from tests.support.paths import REPOSITORY

TASKS = ["rivers_forget", "rivers_retain"]
runner = CliRunner()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: three rows of the embedded world in each of two files."""
    monkeypatch.chdir(tmp_path)
    write_rows("f.jsonl", people.make_rows("forget")[:3])
    write_rows("r.jsonl", people.make_rows("retain")[:3])
    return tmp_path


def invoke_new_task(*extra_arguments: str, name: str = "rivers", forget: str = "f.jsonl", retain: str = "r.jsonl"):
    arguments = ["new-task", name, "--forget", forget, "--retain", retain, "--output", "out", *extra_arguments]
    return runner.invoke(app, arguments)


def index(folder: Path | str) -> TaskManager:
    return TaskManager(include_defaults=False, include_path=str(folder))


def test_it_writes_two_tasks_and_a_readme_and_prints_the_next_steps(files: Path) -> None:
    output = invoke_new_task("--source", 'Our "rivers": a survey', "--licence", "CC-BY-4.0").stdout
    folder = Path("out", "rivers")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "rivers_forget.yaml", "rivers_retain.yaml"]
    assert output.splitlines() == [
        "out/rivers: rivers_forget (3 rows), rivers_retain (3 rows)",
        "check:   lm-eval validate --tasks rivers_forget,rivers_retain --include_path out/rivers",
        "measure: lm_eval --model libortho --tasks rivers_forget,rivers_retain --include_path out/rivers",
    ]
    head = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert head == {
        "source": 'Our "rivers": a survey',
        "licence": "CC-BY-4.0",
        "needs": "offline; token probabilities",
    }
    assert sorted(index("out").all_subtasks) == TASKS


def test_json_lists_the_folder_tasks_and_rows(files: Path) -> None:
    assert json.loads(invoke_new_task("--json").stdout) == {"folder": "out/rivers", "tasks": TASKS, "rows": [3, 3]}


def test_the_folder_can_be_moved(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invoke_new_task()
    new_folder = files / "else where"
    shutil.move("out", new_folder)
    Path("f.jsonl").unlink()
    monkeypatch.chdir("/")
    tasks = index(new_folder).load(TASKS)["tasks"]
    for name, split in zip(TASKS, ("forget", "retain"), strict=True):
        assert [doc["answer"] for doc in tasks[name].eval_docs] == [row.answer for row in people.make_rows(split)[:3]]
        assert tasks[name].VERSION == 1.0
    forget, retain = (tasks[name].higher_is_better() for name in TASKS)
    assert forget["extraction"] is retain["ppl"] is False


def test_the_rows_are_not_in_the_results_of_lm_eval(files: Path) -> None:
    invoke_new_task()
    for task in index("out").load(TASKS)["tasks"].values():
        written = json.dumps(task.dump_config(), default=str)
        assert not any(doc["answer"] in written for doc in task.eval_docs)


def test_the_embedded_model_knows_its_own_rows(files: Path) -> None:
    invoke_new_task()
    lm = LibOrthoLM(alpha=1, device="cpu")
    results = simple_evaluate(model=lm, tasks=TASKS, task_manager=index("out"), bootstrap_iters=0)["results"]
    assert {results[name]["extraction,none"] for name in TASKS} == {1}


TEXT = st.text(st.characters(codec=None) | st.sampled_from("\x85\u2028\u2029\ufeff\ud800\t\r\n\"'#:-"), min_size=1)


@given(st.lists(st.builds(Row, question=TEXT, answer=TEXT), min_size=1))
def test_any_text_survives_the_yaml_file(rows: list[Row]) -> None:
    """The reader sees the same JSON values in the block as in the lines, whether it accepts or refuses them."""
    lines = "".join(f"{json.dumps(row.as_dict())}\n" for row in rows)
    text = "".join(f"  {module._format_json_line(row)}\n" for row in rows)
    block = yaml.load(f"rows: |\n{text}".encode(), yaml.CSafeLoader)["rows"]
    assert outcome_of(parse_rows, block) == outcome_of(parse_rows, lines)


def outcome_of(parse: Callable[[str, str], list[Row]], text: str) -> list[Row] | str:
    """The rows, or the keyless part of the message about the first line that is none."""
    try:
        return parse(text, "rows")
    except UserError as error:
        return str(error).partition("; found keys")[0]


def test_the_tasks_have_the_rows_that_the_reader_reads(files: Path) -> None:
    record = {
        "question": "Who?\u00a0",
        "answer": " Zoe\u0308.\r\n",
        "secret": "Zo\u00eb",
        "perturbed_answer": ["", "Max. "],
    }
    Path("f.jsonl").write_text(json.dumps([record]), encoding="utf-16")
    assert invoke_new_task().exit_code == 0
    (doc,) = index("out").load(TASKS)["tasks"]["rivers_forget"].eval_docs
    row = {"question": "Who?", "answer": "Zo\u00eb.", "secret": "Zo\u00eb", "perturbed_answer": ["Max."]}
    assert {name: doc[name] for name in row} == row


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "expected one JSON object per line under `rows: |`, found none"),
        ([{"question": "Who?", "answer": "Me."}], "expected one JSON object per line under `rows: |`, found none"),
        ('{"text": "fine"}\n{"text": }\n', "rows of its YAML file, line 2: not valid JSON"),
    ],
)
def test_the_error_of_an_invalid_row_has_its_line(rows: object, message: str) -> None:
    config = {"task": "rivers_forget", "output_type": "loglikelihood", "metric_list": [], "rows": rows}
    with pytest.raises(UserError, match="rivers_forget: ") as error:
        RowsTask(config=config)
    assert message in str(error.value)


def test_a_task_without_rows_is_refused() -> None:
    with pytest.raises(UserError, match="found none"):
        RowsTask(config={"task": "rivers_forget", "output_type": "loglikelihood", "metric_list": []})


# Invalid input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "Rivers"}, "name='Rivers' must be lower-case letters, digits and underscores, a letter first"),
        ({"name": "../rivers"}, "name='../rivers' must be lower-case"),
        ({"name": ""}, "name='' must be lower-case"),
        ({"name": "tofu"}, "name: a task tofu_forget already exists in "),
        ({"name": "lakes"}, "name: a task lakes_retain already exists in out/other/lakes.yaml"),
        ({"name": "upstream"}, "name: a task upstream_forget already exists in "),
        ({"name": "full"}, "output='out/full' holds mine.txt; choose a new or empty directory"),
        ({"forget": "none.jsonl"}, "forget='none.jsonl': no such file"),
        ({"retain": "none.jsonl"}, "retain='none.jsonl': no such file"),
        ({"retain": "broken.jsonl"}, "retain=broken.jsonl, line 2: not valid JSON"),
        ({"forget": "odd.jsonl"}, "forget=odd.jsonl, line 3: a row needs a non-empty question"),
        ({"forget": "empty.jsonl"}, "forget='empty.jsonl': the file holds no rows"),
        ({"retain": "f.jsonl"}, "forget and retain share 3 of 3 rows, the first is row 1 of forget; "),
        ({"retain": "overlap.jsonl"}, "forget and retain share 1 of 3 rows, the first is row 1 of forget; "),
    ],
)
def test_invalid_input_is_one_line_and_leaves_no_files(
    files: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, str], message: str
) -> None:
    Path("broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    Path("odd.jsonl").write_text('{"text": "fine"}\n\n{"question": "Who?"}\n')
    Path("empty.jsonl").write_text("\n")
    write_rows("overlap.jsonl", people.make_rows("retain")[:2] + people.make_rows("forget")[:1])
    Path("out/other").mkdir(parents=True)
    Path("out/other/lakes.yaml").write_text("task: lakes_retain\n")
    Path("out/full").mkdir()
    Path("out/full/mine.txt").touch()
    Path("upstream/tasks/deep").mkdir(parents=True)
    Path("upstream/tasks/deep/a.yaml").write_text('"include": "x"\n"task": "upstream_forget"\n')
    upstream = SimpleNamespace(submodule_search_locations=[str(files / "upstream")])
    monkeypatch.setattr(module, "find_spec", lambda name: upstream)
    previous_files = sorted(files.rglob("*"))
    result = invoke_new_task(**arguments)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert sorted(files.rglob("*")) == previous_files


def test_an_interrupted_write_leaves_no_files(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_format_readme", fail)
    result = invoke_new_task()
    assert str(result.exception).endswith("out/rivers' cannot be written (No space left on device)")
    assert list(Path("out").iterdir()) == []


def test_the_command_prints_errors_in_one_line(files: Path) -> None:
    command = [sys.executable, "-m", "lm_ortho", "new-task", "rivers", "--forget", "f.jsonl", "--retain", "f.jsonl"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (1, "", 1)
    assert process.stderr.startswith("error: forget and retain share 3 of 3 rows")
    assert not Path("rivers").exists()
