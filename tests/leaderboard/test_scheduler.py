"""Boards: bad input, planning, tuning, failures, resuming."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lm_ortho.cli.app import app
from lm_ortho.errors import UserError
from lm_ortho.leaderboard.board import status
from lm_ortho.leaderboard.config import make_board, read_board
from lm_ortho.leaderboard.plan import expand_limits, plan_board
from lm_ortho.leaderboard.store import DONE, Store
from tests.support.board import BOARD, HOME, board_text, numbers, run_and_kill, run_tiny
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.usefixtures("isolated_environment")
SMALL: dict[str, Any] = {"methods": [{"method": "tiny"}], "tasks": ["retain_set"]}


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    tally = run_tiny(home, out)
    assert tally is not None
    assert tally.complete
    return out


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"imports": ["tests.support.board"]}, "imports"),
        (
            {"models": {"m": {"pretrained": "x", "forget": "f", "retain": "r", "trust_remote_code": True}}},
            "models.m.trust_remote_code",
        ),
        ({"metadata": {"pretrained": "x", "trust_remote_code": True}}, "metadata.trust_remote_code"),
    ],
)
def test_a_board_runs_no_code_unless_it_is_asked_for(change: dict[str, Any], key: str, tmp_path: Path) -> None:
    content = {"name": "b", "methods": [{"method": "none"}], "tasks": ["tofu_forget"], **change}
    (tmp_path / "board.yaml").write_text(yaml.safe_dump(content))
    arguments = ["board", "run", str(tmp_path / "board.yaml"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 1
    assert f"{key} runs code; read it, then pass --trust-remote-code" in result.output
    assert not (tmp_path / "out").exists()


def test_the_matrix(whole: Path) -> None:
    records = Store(whole).records()
    assert {record.status for record in records} == {DONE}
    assert sum(record.piece.kind == "make" for record in records) == 4
    measured = [r.piece.config for r in records if r.piece.kind == "evaluate"]
    assert [(c["method"], c["alpha"], c["task"]) for c in measured] == [
        *(("tiny", None, task) for task in ("forget_set", "retain_set")),
        *(("tiny_dial", alpha, task) for alpha in (0.0, 1.0) for task in ("forget_set", "retain_set")),
        *((method, None, t) for method in ("never_saw", "unedited") for t in ("forget_set", "retain_set")),
    ]
    assert {path.name.split("-")[0] for path in (whole / "models").iterdir()} == {c["method"] for c in measured}
    makes = [record.result for record in records if record.piece.kind == "make"]
    assert all(len(result["checkpoint"]) == 64 for result in makes)
    assert sum("layers" in result for result in makes) == 1
    assert (whole / "logs" / "run-1.log").read_text()


def test_only_the_owner_can_reach_what_a_board_stores(whole: Path) -> None:
    """Samples, logs and models hold the memory in clear; the store and the log have numbers and errors."""

    def open_to_others(path: Path) -> bool:
        folders = [folder for folder in path.parents if folder.is_relative_to(whole)]
        return bool(path.stat().st_mode & 0o044) and all(folder.stat().st_mode & 0o011 for folder in folders)

    files = [path for path in whole.rglob("*") if path.is_file()]
    assert any("samples" in path.name for path in files)
    assert any(path.suffix == ".safetensors" for path in files)
    assert [path for path in files if open_to_others(path)] == []
    assert (whole / "logs" / "run-1.log").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": []}, "method is unknown; did you mean 'methods'?"),
        ({"methods": [{"method": "tiny", "seed": 1}]}, "methods.0.seed is unknown; did you mean 'seeds'?"),
        ({"frontier": {"forgot": []}}, "frontier.forgot is unknown; did you mean 'forget'?"),
        ({"frontier": {"forget": [{"taks": "x"}]}}, "frontier.forget.0.taks is unknown; did you mean 'task'?"),
        ({"models": {"mine": {"pretraind": "x"}}}, "models.mine.pretraind is unknown; did you mean 'pretrained'?"),
        ({"models": {"mine": {"pretrained": "x"}}}, "needs forget= and retain="),
        ({"tasks": []}, "tasks=[]: "),
        ({"alphas": [2]}, "alpha 2"),
        ({"name": "No Name"}, "name='No Name': "),
        ({"methods": [{"method": "tiny", "tune": True, "grid": {"a": [1]}}]}, "give one of them"),
        ({"methods": 3}, "methods=3: "),
        ({"budget": {"step": 3}}, "budget.step is unknown; did you mean 'steps'?"),
        ({"budget": {"steps": 0}}, "budget: steps=0: Input should be greater than or equal to 1"),
        ({"tuning": {"budget": {"forget_rows": 0}}}, "tuning.budget: forget_rows=0: "),
    ],
)
def test_a_bad_board_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_board({**yaml.safe_load(BOARD), **change}, "board='x.yaml'")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["forget_sett"]}, "did you mean 'forget_set'"),
        ({"imports": ["no_such_module"]}, "no_such_module"),
        ({"imports": ["module_with_an_error"]}, "module_with_an_error.*ZeroDivisionError"),
        ({"seeds": [-1]}, "seeds.0=-1: Input should be greater than or equal to 0"),
        (
            {"methods": [{"method": "tiny", "seeds": [2**32]}]},
            "seeds.0=4294967296: Input should be less than 4294967296",
        ),
        ({"limits": {"forget_set": 0}}, "limits.forget_set=0: Input should be greater than or equal to 1"),
        ({"dtype": "float3"}, "dtype='float3' is unknown"),
        ({"batch_size": "many"}, "batch_size='many': must be a whole number from 1 on, auto, or auto:N"),
        ({"metadata": {"retain": date(2026, 1, 1)}}, "metadata: .*date.* quotes"),
        ({"methods": [{"method": "tiny", "grid": {"rate": []}}]}, r"grid.rate=\[\]: List should have at least 1 item"),
        ({"alphas": [], "methods": [{"method": "ortho"}]}, r"alphas=\[\]: Tuple should have at least 1 item"),
        ({"limits": {"forget_sett": 1}}, "did you mean 'forget_set'"),
        ({"limits": {"tofu_forget": 1}}, "limits names 'tofu_forget', which is not among the tasks"),
        ({"methods": [{"method": "tiny"}, {"method": "tiny"}]}, "listed twice"),
        ({"resources": {"executor": "ray", "cpus": 1e9}}, "resources"),
    ],
)
def test_unknown_names_in_a_board_are_refused(
    change: dict[str, Any], message: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_ortho.leaderboard import evaluation

    if "resources" in change:
        pytest.importorskip("ray", reason="Ray is not installed")
        import ray

        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    (tmp_path / "module_with_an_error.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    load = evaluation._load_task_manager
    monkeypatch.setattr(evaluation, "_load_task_manager", lambda defaults, metadata: load(False, metadata))
    with pytest.raises(UserError, match=message):
        run_tiny(home, tmp_path / "out", **change)
    assert not (tmp_path / "out" / "models").exists()


@pytest.mark.parametrize("path", sorted((REPOSITORY / "boards").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_ready_boards_can_be_read(path: Path) -> None:
    board = read_board(path)
    assert board.name == path.stem
    methods = {entry.method for entry in board.methods}
    assert {"ortho", "ortho_merged", "never_saw", "unedited"} <= methods
    axes = (*board.frontier.forget, *board.frontier.retain)
    assert {axis.task for axis in axes} <= set(board.tasks)


def test_a_missing_key_of_a_board_is_named() -> None:
    with pytest.raises(UserError, match=r"x\.yaml: methods is missing$"):
        make_board({"name": "b", "tasks": ["forget_set"]}, "x.yaml")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_board(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is not YAML"):
        read_board(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(UserError, match="must hold keys"):
        read_board(tmp_path / "list.yaml")


def test_a_limit_of_a_group_applies_to_its_tasks_unless_a_narrower_one_does() -> None:
    changes = {"tasks": ["unlearning"], "limit": 9, "limits": {"tofu_forget": 2, "unlearning": 5}}
    board = make_board({**yaml.safe_load(BOARD), **changes})
    limits = expand_limits(board, {})
    assert limits["tofu_forget"] == 2
    assert {limit for task, limit in limits.items() if task != "tofu_forget"} == {5}
    assert set(expand_limits(make_board({**yaml.safe_load(BOARD), "limit": 9}), {}).values()) == {9}


def test_a_model_that_was_made_before_its_piece_could_say_so(home: Path, tmp_path: Path) -> None:
    """As after a kill between the rename of the folder and the record."""
    dial = {**SMALL, "methods": [{"method": "tiny_dial"}], "alphas": [0]}
    run_tiny(home, tmp_path / "whole", **dial)
    (cell,) = (tmp_path / "whole" / "models").iterdir()
    (tmp_path / "again" / "models").mkdir(parents=True)
    shutil.copytree(cell, tmp_path / "again" / "models" / cell.name)
    tally = run_tiny(home, tmp_path / "again", **dial)
    assert tally is not None
    assert tally.complete
    first, again = (Store(tmp_path / name).records()[0] for name in ("whole", "again"))
    assert again.piece.kind == "make"
    assert again.result == first.result


def test_the_command_of_a_row_reproduces_it(whole: Path) -> None:
    commands = [r.piece.config["command"] for r in Store(whole).records() if r.piece.kind == "evaluate"]
    plain, dial = shlex.split(commands[0]), shlex.split(commands[2])
    assert plain[:3] == ["lm_eval", "--model", "hf"]
    assert plain[4].endswith(",dtype=float32,softmax_dtype=float32")
    assert dial[4].endswith(",alpha=0,dtype=float32")
    assert set(json.loads(plain[plain.index("--metadata") + 1])) == {"forget", "retain"}


def test_a_failing_cell_does_not_stop_the_others(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    methods = [{"method": "tiny", "settings": {"fail": True}}, {"method": "tiny_other"}]
    tally = run_tiny(home, out, **SMALL | {"methods": methods})
    assert tally is not None
    assert (tally.done, tally.failed) == (2, 2)
    summary = status(out)
    assert [(e["piece"], e["error"].splitlines()[0]) for e in summary["errors"]] == [
        ("model", "ValueError: no such weights"),
        ("retain_set", "its model could not be made"),
    ]
    before = Store(out).records()
    assert run_tiny(home, out, **SMALL | {"methods": methods}) == tally
    assert [r.attempts for r in Store(out).records()] == [r.attempts for r in before]
    again = run_tiny(home, out, retry_failed=True, **SMALL | {"methods": methods})
    assert again == tally
    assert [r.attempts for r in Store(out).records()] == [2, 0, 1, 1]
    assert not [path for path in (out / "models").iterdir() if path.name.startswith(".")]


def test_only_one_cell(home: Path, tmp_path: Path) -> None:
    methods = [{"method": "tiny"}, {"method": "tiny_other"}]
    tally = run_tiny(home, tmp_path / "out", only="tiny_other", **SMALL | {"methods": methods})
    assert tally is not None
    assert (tally.done, tally.total) == (2, 2)
    assert [record.status for record in Store(tmp_path / "out").records()] == ["waiting", "waiting", "done", "done"]
    with pytest.raises(UserError, match="only='abc'"):
        run_tiny(home, tmp_path / "out", only="abc", **SMALL)


def test_tuning_chooses_before_anything_is_measured(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tally = run_tiny(home, out, **SMALL | {"methods": [{"method": "tiny", "tune": True}]})
    assert tally is not None
    assert (tally.done, tally.failed, tally.total) == (4, 1, 5)
    records = Store(out).records()
    assert [(r.piece.kind, r.status) for r in records][:3] == [("tune", "failed"), ("tune", "done"), ("tune", "done")]
    (make_record,) = [record for record in records if record.piece.kind == "make"]
    assert make_record.result["settings"] == {"shift": 0.1}
    assert "tiny shift=0.1 (tuned)" in numbers(out)


def test_tuning_is_for_the_embedded_model(home: Path) -> None:
    rows = {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
    changes = {"models": {"mine": {"pretrained": str(home / "plain"), **rows}}}
    board = make_board({**yaml.safe_load(BOARD), **changes, "methods": [{"method": "tiny", "tune": True}]})
    with pytest.raises(UserError, match="tuning split for the embedded model only"):
        plan_board(board, Path("x"))


def test_a_folder_holds_one_board(whole: Path, home: Path) -> None:
    with pytest.raises(UserError, match="holds the board 'tiny'"):
        run_tiny(home, whole, name="other")


def test_more_alphas_and_seeds_keep_what_is_there(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dial = [{"method": "tiny_dial"}]
    run_tiny(home, out, **SMALL | {"methods": dial, "alphas": [0]})
    first = {record.piece.key: record.attempts for record in Store(out).records()}
    run_tiny(home, out, **SMALL | {"methods": dial, "alphas": [0, 0.5]})
    later = {record.piece.key: record.attempts for record in Store(out).records()}
    assert set(first.values()) == set(later.values()) == {1}
    assert len(first) == 2
    assert len(later) == 3


def _run_with_kills(home: Path, out: Path, kills: int, seconds: float) -> None:
    draw = random.Random(7)
    count = 0
    for _ in range(4 * kills):
        count += run_and_kill(home, out, draw.uniform(0.05, seconds))
        if count == kills:
            break
    assert count == kills
    run_tiny(home, out)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_table_is_that_of_an_undisturbed_run(
    kills: int, whole: Path, home: Path, tmp_path: Path
) -> None:
    start_time = time.monotonic()
    run_and_kill(home, tmp_path / "first", 60)
    seconds = time.monotonic() - start_time
    _run_with_kills(home, tmp_path / "out", kills, seconds / 3)
    assert numbers(tmp_path / "out") == numbers(whole)
    assert {record.status for record in Store(tmp_path / "out").records()} == {DONE}
    assert not list((tmp_path / "out").glob("*/.*.tmp-*"))


def test_the_commands(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME, str(home))
    board, out = tmp_path / "tiny.yaml", tmp_path / "out"
    board.write_text(board_text(home, **SMALL | {"methods": [{"method": "tiny"}, {"method": "unedited"}]}))
    result = CliRunner().invoke(
        app, ["board", "run", str(board), "-o", str(out), "--trust-remote-code"], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "4 of 4 pieces done" in result.stderr
    names = [Path(line).name for line in result.stdout.split()]
    assert names == [f"leaderboard.{suffix}" for suffix in ("html", "md", "csv")]
    text = CliRunner().invoke(app, ["board", "status", str(out)], catch_exceptions=False).stdout
    assert "tiny: 4 of 4 done, 0 failed" in text
    summary = json.loads(CliRunner().invoke(app, ["board", "status", str(out), "--json"]).stdout)
    assert (summary["done"], summary["seconds_left"], len(summary["runs"])) == (4, 0, 1)
    assert summary["runs"][0]["alive"] is False
    assert (out / summary["runs"][0]["log"]).is_file()
    page = CliRunner().invoke(app, ["board", "page", str(out), "--to", str(tmp_path / "page")], catch_exceptions=False)
    assert page.exit_code == 0
    assert len(list((tmp_path / "page").iterdir())) == 3
    missing = CliRunner().invoke(app, ["board", "status", str(tmp_path / "nothing")])
    assert isinstance(missing.exception, UserError)
