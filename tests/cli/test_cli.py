"""The commands of ``lm-ortho``, in the same process and from the command line."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lm_ortho
from lm_ortho import cli
from lm_ortho.cli import doctor as doctor_module
from lm_ortho.cli.app import app
from lm_ortho.errors import UserError
from lm_ortho.plugin import bridges, startup
from tests.support.paths import REPOSITORY
from tests.support.scripts import load_script

COMMANDS = (
    "eval",
    "implant",
    "decompose",
    "inspect",
    "export",
    "new-task",
    "verdict",
    "sweep",
    "demo",
    "doctor",
    "cache",
)
runner = CliRunner()


def _lm_ortho(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lm_ortho", *arguments],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_help_loads_nothing_heavy_and_names_every_command() -> None:
    process = _lm_ortho("--help", PYTHONPROFILEIMPORTTIME="1")
    assert process.returncode == 0
    import_lines = [line for line in process.stderr.splitlines() if line.startswith("import time:")]
    modules = {line.rsplit("|", 1)[-1].strip() for line in import_lines}
    assert "lm_ortho" in modules
    assert not modules & {"torch", "transformers", "lm_eval", "datasets", "peft", "numpy"}
    assert all(command in process.stdout for command in COMMANDS)


def test_the_reference_page_is_up_to_date() -> None:
    """`python scripts/cli_reference.py` writes it."""
    script = REPOSITORY / "scripts" / "cli_reference.py"
    module = load_script(script)
    assert module.PAGE.read_text(encoding="utf-8") == module.make_page()


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).stdout == f"lm-ortho {lm_ortho.__version__}\n"


def test_an_unknown_command_is_a_usage_error() -> None:
    assert runner.invoke(app, ["nonsense"]).exit_code == 2


def test_bad_input_ends_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("alpha=2 must be a number between 0 and 1")

    monkeypatch.setattr("lm_ortho.cli.app.app", fail)
    with pytest.raises(SystemExit) as error_info:
        cli.main()
    assert error_info.value.code == 1
    assert capsys.readouterr().err == "error: alpha=2 must be a number between 0 and 1\n"


@pytest.fixture
def lm_eval_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The ``sys.argv`` of each call of lm-eval's command line."""
    calls: list[list[str]] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: calls.append(sys.argv))
    monkeypatch.setattr(bridges, "bridge_lm_eval", lambda: None)
    monkeypatch.setattr(startup, "install", lambda force: None)
    return calls


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "libortho", "--model_args", "alpha=0", "--tasks", "tofu_forget,tofu_retain"],
        ["run", "--model", "hf", "--limit", "2", "-t", "a", "b"],
        ["ls", "tasks"],
        ["validate", "--tasks", "tofu_forget"],
        ["--help"],
        [],
    ],
)
def test_eval_passes_its_arguments_to_lm_eval(lm_eval_calls: list[list[str]], arguments: list[str]) -> None:
    argv_before = sys.argv
    result = runner.invoke(app, ["eval", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    assert [argv[1:] for argv in lm_eval_calls] == [arguments]
    assert sys.argv is argv_before


def test_eval_needs_no_hook(tmp_path: Path) -> None:
    (tmp_path / "upstream.yaml").write_text("task: upstream_task\ndataset_path: none\n")
    # In place of the folder of 14,700 built-in tasks, which takes lm-eval many seconds to index.
    small = f"import sys, lm_eval.tasks.manager as m; m.__file__ = {str(tmp_path / 'manager.py')!r}\n"
    code = small + "sys.argv[1:] = ['eval', 'ls', 'subtasks']\nfrom lm_ortho.cli import main; main()"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "LM_ORTHO_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert "|tofu_forget " in process.stdout
    assert "|upstream_task " in process.stdout


def test_eval_reports_bad_usage_as_lm_eval_does() -> None:
    process = _lm_ortho("eval", "validate")
    assert process.returncode == 2
    assert "--tasks" in process.stderr


def test_doctor_reports_a_switched_off_hook_and_exits_with_1() -> None:
    process = _lm_ortho("doctor", "--json", LM_ORTHO_AUTOLOAD="0")
    report = json.loads(process.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert process.returncode == 1
    assert report["active"] == "none"
    assert report["ok"] is False
    assert checks["LM_ORTHO_AUTOLOAD"]["status"] == "fail"
    assert checks["model"]["status"] == checks["tasks"]["status"] == "fail"
    assert str(REPOSITORY / "tasks") in checks["tasks"]["advice"]
    assert checks["torch"]["status"] == "ok"
    assert checks["adapters"]["status"] == "warn"
    assert {"device", "bfloat16", "embedded model"} <= set(checks)


def test_doctor_prints_paths_as_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    doctor_module._print_table([doctor_module.Check("[/x]", "fail", "/home/[/me]\x1b[2J/site-packages", "[red]x")])
    assert capsys.readouterr().out.split("\n")[1].split() == [
        "[/x]",
        "fail",
        r"/home/[/me]\x1b[2J/site-packages",
        "[red]x",
    ]


def test_doctor_prints_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [doctor_module.Check("model", "ok", "known"), doctor_module.Check("bfloat16", "warn", "emulated")]
    monkeypatch.setattr(doctor_module, "_run_checks", lambda: checks)
    monkeypatch.setattr(startup, "is_installed", lambda: True)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "emulated" in result.stdout
    assert result.stdout.splitlines()[-1] == "way to libortho: start-up hook"


def test_an_lm_eval_with_entry_points_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api import registry

    monkeypatch.setattr(startup, "is_installed", lambda: False)
    assert doctor_module.find_active_route() == doctor_module.NONE
    monkeypatch.setattr(registry, "load_plugins", lambda *args: [], raising=False)
    assert doctor_module.find_active_route() == doctor_module.ENTRY_POINT


def test_the_start_up_file_is_searched_in_site_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_module, "list_site_folders", lambda: [tmp_path])
    assert doctor_module._check_startup_file().status == "fail"
    (tmp_path / "lm_ortho.pth").touch()
    assert doctor_module._check_startup_file().status == "ok"


@pytest.fixture
def cache_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only entry of a cache folder, which also holds a file that is no entry."""
    monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path))
    entry = tmp_path / ("ab" * 32)
    entry.mkdir()
    (entry / "base.safetensors").write_bytes(bytes(3_000_000))
    (tmp_path / "mine.txt").touch()
    return entry


def test_cache_list_shows_entries_and_warns(cache_entry: Path) -> None:
    output = runner.invoke(app, ["cache", "list"], catch_exceptions=False).stdout
    assert "abababababab" in output
    assert "1 entries, 3.0 MB of 20,000.0 MB" in output
    assert "memory in clear" in output
    report = json.loads(runner.invoke(app, ["cache", "list", "--json"]).stdout)
    assert report["folder"] == str(cache_entry.parent)
    assert [entry["path"] for entry in report["entries"]] == [str(cache_entry)]


def test_cache_clear_removes_entries_only(cache_entry: Path) -> None:
    output = runner.invoke(app, ["cache", "clear"], catch_exceptions=False).stdout
    assert "removed 1 entries, 3.0 MB" in output
    assert [path.name for path in cache_entry.parent.iterdir()] == ["mine.txt"]
    assert "0 entries" in runner.invoke(app, ["cache", "list"]).stdout


def test_a_bad_cache_limit_is_one_line() -> None:
    process = _lm_ortho("cache", "list", LM_ORTHO_CACHE_LIMIT_GB="many")
    assert process.returncode == 1
    assert process.stderr == "error: LM_ORTHO_CACHE_LIMIT_GB='many' must be a number of gigabytes, 0 or more\n"


# verdict


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "maybe"], "base='maybe': the verdict takes auto and none"),
        (["--out", "nowhere/page.md"], "out='nowhere/page.md': there is no folder 'nowhere'"),
        (["--out", "."], "out='.' is a directory; name a file in it"),
        (["--out", "/proc/page.md"], "out='/proc/page.md' cannot be written"),
        (["--weights", "nowhere"], "weights='nowhere': no model or adapter in base/"),
    ],
)
def test_the_verdict_refuses_bad_arguments_before_it_measures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["verdict", *arguments])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--tasks", "tofu_forgt"], "tasks: 'tofu_forgt' is unknown; did you mean 'tofu_forget'"),
        (["demo", "--alpha", "0,2"], "alpha='2' must be a number between 0"),
        (["decompose", "--device", "cuda", "-o", "x"], "device='cuda': this machine has no CUDA device"),
        (["sweep", "--device", "cuda:1", "-o", "x"], "device='cuda:1': this machine has no CUDA device"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    from lm_ortho.leaderboard import evaluation

    make_manager = evaluation._load_task_manager
    monkeypatch.setattr(evaluation, "_load_task_manager", lambda defaults, metadata: make_manager(False, metadata))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_the_verdict_runs_three_seeds_of_both_modes_and_writes_its_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_module = importlib.import_module("lm_ortho.verdict.runner")
    calls: list[tuple[object, ...]] = []

    def run(modes: object, seeds: object, quick: bool, **_: object) -> object:
        calls.append((modes, seeds, quick))
        return run_module.Outcome("FAIL", [], {})

    monkeypatch.setattr(run_module, "run", run)
    page = tmp_path / "page.md"
    assert runner.invoke(app, ["verdict", "--out", str(page)]).exit_code == 1
    assert runner.invoke(app, ["verdict", "--quick"]).exit_code == 1
    assert runner.invoke(app, ["verdict", "--base", "none", "--seed", "7", "--seed", "8"]).exit_code == 1
    assert calls == [(("auto", "none"), (0, 1, 2), False), (("auto",), (0,), True), (("none",), (7, 8), False)]
    assert page.read_text().startswith("# Verdict: FAIL")
