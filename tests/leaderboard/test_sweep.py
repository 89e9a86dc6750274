"""``lm-ortho sweep``: every (alpha, task) a record, resumed after an interruption, readable by lm-eval's tools."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from lm_ortho.cli.app import app
from lm_ortho.data.rows import Row, write_rows
from lm_ortho.errors import UserError
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.harness.tasks.samples import read_samples
from lm_ortho.leaderboard import evaluation as measure_module
from lm_ortho.leaderboard import sweep as sweep_module
from lm_ortho.leaderboard.batch_halving import halve_batch_on_oom, is_out_of_memory
from lm_ortho.leaderboard.store import DONE, FAILED, Store
from lm_ortho.leaderboard.sweep import Sweep, open_store, plan_sweep, run_sweep
from lm_ortho.plugin.bridges import find_tasks_dir
from tests.support.harness import metric_values, run

pytestmark = pytest.mark.usefixtures("isolated_environment")
TASKS = ["forget_set", "retain_set"]


def make_sweep(home: Path, **changes: Any) -> Sweep:
    rows = {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
    defaults: dict[str, Any] = {"tasks": TASKS, "alphas": [0, 1], "device": "cpu"}
    return Sweep(**{**defaults, "model_args": {"pretrained": str(home / "decomposed"), **rows}, **changes})


def run_quietly(sweep: Sweep, out: Path, **options: Any) -> Any:
    return run_sweep(sweep, out, Console(quiet=True), quiet=True, **options)


@pytest.fixture(scope="module")
def swept(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        assert run_quietly(make_sweep(home), out).complete
    return out


def test_an_access_token_is_not_stored(home: Path, tmp_path: Path) -> None:
    """It would be in the pages and in lm-eval's files as well."""
    args = {**make_sweep(home).model_args, "token": "hf_0123456789abcdef"}
    pieces, job = plan_sweep(make_sweep(home, model_args=args), tmp_path)
    assert "hf_" not in json.dumps([dict(piece.config) for piece in pieces])
    assert job.model_args["token"] == "hf_0123456789abcdef"


def test_a_task_without_its_rows_is_refused_before_the_first_piece(home: Path, tmp_path: Path) -> None:
    args = {"pretrained": str(home / "decomposed"), "forget": str(home / "forget.jsonl")}
    with pytest.raises(UserError, match=r"metadata: retain_set needs rows; add retain=rows.jsonl to --metadata"):
        plan_sweep(make_sweep(home, model_args=args, metadata={}), tmp_path)


def test_the_chat_is_part_of_the_key_and_of_the_command(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "decomposed"
    shutil.copytree(home / "decomposed", folder)
    rows = {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
    args = {"pretrained": str(folder), **rows}
    with pytest.raises(UserError, match="apply_chat_template: the tokenizer has no chat template"):
        plan_sweep(make_sweep(home, model_args=args, apply_chat_template=True), tmp_path)
    with pytest.raises(UserError, match="system_instruction needs apply_chat_template"):
        plan_sweep(make_sweep(home, model_args=args, system_instruction="Be brief."), tmp_path)
    template = "{{ date_string }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    keys = set()
    for instruction, template_args in ((None, {}), ("Be brief.", {}), (None, {"date_string": "10 Apr 2025"})):
        sweep = make_sweep(
            home,
            model_args={**args, **({"chat_template_args": template_args} if template_args else {})},
            apply_chat_template=True,
            system_instruction=instruction,
        )
        pieces, _ = plan_sweep(sweep, tmp_path)
        keys |= {piece.key for piece in pieces}
        command = shlex.split(pieces[0].config["command"])
        assert "--apply_chat_template" in command
        assert ("Be brief." in command) == bool(instruction)
        assert ("10 Apr 2025" in command[4]) == bool(template_args)
    plain, _ = plan_sweep(make_sweep(home, model_args=args), tmp_path)
    assert len(keys | {piece.key for piece in plain}) == 4 * len(plain)


def test_the_rows_that_are_held_out_are_part_of_the_key(home: Path, tmp_path: Path) -> None:
    args, file = make_sweep(home).model_args, tmp_path / "rows.jsonl"
    keys = set()
    for held_out, content in ((None, "a"), ("auto", "a"), (str(file), "a"), (str(file), "b")):
        write_rows(file, [Row(question="Who?", answer=content)])
        pieces, _ = plan_sweep(make_sweep(home, model_args={**args, "held_out": held_out}), tmp_path)
        keys |= {piece.key for piece in pieces}
    assert len(keys) == 4 * len(pieces)


def test_the_tasks_that_need_rows_are_those_of_the_yaml_files() -> None:
    arguments = {}
    for file in find_tasks_dir().rglob("*.yaml"):
        task, argument = (re.search(rf"^ *{key}: (\w+)$", file.read_text(), re.M) for key in ("task", "argument"))
        if task and argument:
            arguments[task[1]] = (argument[1],)
    assert {**arguments, "membership_set": ("forget", "holdout")} == sweep_module._ROWS


def test_every_alpha_and_task_is_a_record_with_what_made_it(swept: Path) -> None:
    records = Store(swept, create=False).records()
    assert [(r.piece.config["alpha"], r.piece.config["task"]) for r in records] == [
        (alpha, task) for alpha in (0.0, 1.0) for task in TASKS
    ]
    for record in records:
        assert record.status == DONE
        assert record.seconds > 0
        assert {"lm_ortho", "lm_eval", "torch", "transformers"} <= set(record.piece.config["versions"])
        assert record.piece.config["seeds"] == {"random": 0, "numpy": 1234, "torch": 1234}
        assert len(record.result["checkpoint"]) == 64
        assert all(name.startswith("reference") for name in record.result["kernel"])
    assert records[0].result["kernel"] == ["reference.base"]
    first, second = (r.result["values"]["forget_set"]["secret_ppl"][0] for r in records[::2])
    assert first != second


def test_the_numbers_are_those_of_lm_eval(swept: Path, home: Path) -> None:
    lm = LibOrthoLM(str(home / "decomposed"), alpha=1, device="cpu")
    direct = metric_values(
        run(lm, ["forget_set"], {"forget": str(home / "forget.jsonl"), "pretrained": lm.pretrained_argument}),
        "forget_set",
    )
    (record,) = [
        r for r in Store(swept).records() if r.piece.config["alpha"] == 1 and r.piece.config["task"] == "forget_set"
    ]
    for metric, (value, low, high, _) in record.result["values"]["forget_set"].items():
        assert (value, low, high) == tuple(direct[metric + end] for end in ("", "_low", "_high"))
    assert len(record.result["groups"]["forget_set"]) == 6
    extraction = record.result["samples"]["forget_set"]["extraction"]
    assert [value is None for value in extraction] == [False, False, False, True, True, False]


def test_lm_evals_own_files_are_written(swept: Path) -> None:
    records = Store(swept).records()
    for record in records:
        results, samples = (swept / file for file in record.result["files"])
        content = json.loads(results.read_text())
        task = record.piece.config["task"]
        assert results.name.startswith("results_")
        assert content["config"]["alpha"] == record.piece.config["alpha"]
        assert {"results", "configs", "versions", "n-shot", "task_hashes", "model_name", "date"} <= set(content)
        assert content["results"][task]["ppl,none"] == record.result["values"][task]["ppl"][0]
        assert len(read_samples(samples, task, "samples")) == content["n-samples"][task]["effective"]
    folders = {path.name for path in (swept / "results").iterdir()}
    assert folders == {"decomposed__alpha_0", "decomposed__alpha_1"}


def test_a_finished_sweep_does_nothing_and_a_larger_one_only_what_is_new(
    swept: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [record.as_json() for record in Store(swept).records()]
    monkeypatch.setattr(measure_module, "load_lm", lambda *_: pytest.fail("nothing to load"))
    assert run_quietly(make_sweep(home), swept).complete
    assert [record.as_json() for record in Store(swept).records()] == before
    monkeypatch.undo()


def test_rows_that_changed_and_other_limits_are_other_pieces(home: Path, tmp_path: Path) -> None:
    rows = {name: str(shutil.copy(home / f"{name}.jsonl", tmp_path)) for name in ("forget", "retain")}
    sweep = make_sweep(home, alphas=[0], model_args={"pretrained": str(home / "decomposed"), **rows})
    (first, _), _ = plan_sweep(sweep, tmp_path)
    assert plan_sweep(sweep, tmp_path)[0][0].key == first.key
    (limited_piece, _), _ = plan_sweep(replace(sweep, limit=2), tmp_path)
    assert limited_piece.config["row"] != first.config["row"]
    assert limited_piece.config["label"] == "decomposed limit=2"
    assert "--limit 2" in limited_piece.config["command"]
    lines = Path(rows["forget"]).read_text().splitlines()
    Path(rows["forget"]).write_text("\n".join(lines[:-1]))
    pieces, _ = plan_sweep(sweep, tmp_path)
    assert pieces[0].key != first.key


def test_an_interrupted_sweep_redoes_one_task_at_most(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations: list[tuple[Any, str]] = []
    loads: list[int] = []
    original, load = measure_module.evaluate, measure_module.load_lm

    def evaluate(lm: Any, config: Any, results: Path) -> Any:
        evaluations.append((config["alpha"], config["task"]))
        if len(evaluations) == 3:
            raise KeyboardInterrupt
        return original(lm, config, results)

    monkeypatch.setattr(measure_module, "evaluate", evaluate)
    monkeypatch.setattr(measure_module, "load_lm", lambda *arguments: loads.append(1) or load(*arguments))
    with pytest.raises(KeyboardInterrupt):
        run_quietly(make_sweep(home), tmp_path / "out")
    assert len(evaluations) == 3
    assert sorted(Store(tmp_path / "out").statuses().values()) == ["done", "done", "waiting", "waiting"]
    assert run_quietly(make_sweep(home), tmp_path / "out").complete
    assert evaluations == [(0.0, "forget_set"), (0.0, "retain_set"), *[(1.0, "forget_set")] * 2, (1.0, "retain_set")]
    assert len(loads) == 2


def test_a_failing_task_does_not_stop_the_others_and_is_retried_when_asked(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = measure_module.evaluate

    def evaluate(lm: Any, config: Any, results: Path) -> Any:
        if config["task"] == "forget_set":
            raise RuntimeError("no such thing")
        return original(lm, config, results)

    monkeypatch.setattr(measure_module, "evaluate", evaluate)
    out = tmp_path / "out"
    tally = run_quietly(make_sweep(home), out)
    assert (tally.done, tally.failed) == (2, 2)
    failed = [record for record in Store(out).records() if record.status == FAILED]
    assert [record.piece.config["task"] for record in failed] == ["forget_set"] * 2
    assert failed[0].error.startswith("RuntimeError: no such thing\n")
    monkeypatch.undo()
    assert run_quietly(make_sweep(home), out).failed == 2
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    assert run_quietly(make_sweep(home), out, retry_failed=True).complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alphas": [2]}, "between 0"),
        ({"alphas": [1, 1.0]}, "twice"),
        ({"alphas": []}, "alpha is empty"),
        ({"alphas": ["alice:1"]}, "there is no memory 'alice'; the model has memory"),
        ({"tasks": []}, "tasks is empty"),
        ({"dtype": "float3"}, "dtype='float3' is unknown"),
        ({"batch_size": "many"}, "batch_size='many' must be a whole number"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number"),
        ({"batch_size": "auto:x"}, "batch_size='auto:x' must be"),
        ({"metadata": {"day": date(2026, 1, 1)}}, "metadata: .*date.* quotes"),
        ({"tasks": ["forget_sets"]}, "forget_set"),
        ({"model_args": {"pretrained": "no/such/model"}}, "pretrained="),
        ({"model_args": {"pretrainde": "x"}}, "did you mean pretrained"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_module, "_load_task_manager", _load_package_tasks)
    with pytest.raises(UserError, match=message) as error:
        run_quietly(make_sweep(home, **changes), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_bad_model_is_found_before_the_tasks_are_indexed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def index(names: Any, metadata: Any) -> Any:
        pytest.fail("the tasks were indexed first")

    monkeypatch.setattr("lm_ortho.leaderboard.sweep.expand_groups", index)
    with pytest.raises(UserError, match="did you mean pretrained"):
        plan_sweep(make_sweep(home, model_args={"pretrainde": "x"}), home / "out")


def test_a_folder_holds_a_sweep_or_a_board(home: Path, tmp_path: Path) -> None:
    Store(tmp_path).plan([], facts={"name": "mine", "kind": "board"})
    with pytest.raises(UserError, match="holds the board 'mine'; choose another folder for the sweep"):
        run_quietly(make_sweep(home), tmp_path)
    assert Store(tmp_path).get_fact("kind") == "board"
    assert Store(tmp_path).statuses() == {}
    Store(tmp_path).plan([], facts={"name": "mine", "kind": "sweep"})
    with pytest.raises(UserError, match="holds the sweep 'mine'; choose another folder for the board 'mine'"):
        open_store(tmp_path, "board", "mine")


def _load_package_tasks(defaults: bool, metadata: str) -> Any:
    """lm-eval's own tasks are not indexed, which takes ten seconds."""
    from lm_eval.tasks import TaskManager

    from lm_ortho.plugin.bridges import find_tasks_dir

    return TaskManager(include_path=[str(find_tasks_dir())], include_defaults=False, metadata=json.loads(metadata))


def test_groups_are_expanded() -> None:
    leaves = measure_module.expand_groups(["unlearning"], {})
    assert leaves[:3] == ["tofu_forget", "tofu_retain", "canary_extraction"]
    assert all(leaf.startswith("reasoning_") for leaf in leaves[3:])
    assert len(leaves) == 7


class Small:
    """A model whose memory holds three rows."""

    def __init__(self) -> None:
        self.most_rows: int | None = 16
        self.batch_sizes: list[int | None] = []

    def loglikelihood(self, requests: list[str]) -> list[float]:
        self.batch_sizes.append(self.most_rows)
        if (self.most_rows or 0) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [0.0] * len(requests)

    loglikelihood_rolling = generate_until = token_scores = loglikelihood


def test_out_of_memory_halves_the_batch_with_a_warning() -> None:
    lm, warnings = Small(), list[str]()
    halve_batch_on_oom(lm, warnings.append)
    assert lm.loglikelihood(["a"] * 5) == [0.0] * 5
    assert lm.batch_sizes == [16, 8, 4, 2]
    assert warnings[-1] == "out of memory with 4 rows at once; retrying with 2"
    lm.most_rows = None  # one row at once: there is nothing to halve
    lm.generate_until(["a"])
    lm.most_rows = 1
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_the_batch_of_a_real_model_is_halved(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LibOrthoLM._model_call

    def full(self: LibOrthoLM, inputs: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        if inputs.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, inputs, *more, **options)

    monkeypatch.setattr(LibOrthoLM, "_model_call", full)
    assert run_quietly(make_sweep(home, alphas=[0], tasks=["forget_set"]), tmp_path / "out").complete
    (record,) = Store(tmp_path / "out").records()
    assert "retrying with 2" in record.result["notes"][-1]


def test_one_model_across_devices(swept: Path, home: Path, tmp_path: Path) -> None:
    sweep = make_sweep(home, alphas=[0], tasks=["retain_set"], parallelize=True)
    assert run_quietly(sweep, tmp_path / "out").complete
    (record,) = Store(tmp_path / "out").records()
    assert record.result["values"] == Store(swept).records()[1].result["values"]


def test_the_command(home: Path, tmp_path: Path) -> None:
    args = f"pretrained={home / 'decomposed'},forget={home / 'forget.jsonl'},retain={home / 'retain.jsonl'}"
    command = ["sweep", "--tasks", "retain_set", "--alpha", "0.5", "--model-args", args, "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    (record,) = json.loads(result.stdout)
    assert record["status"] == "done"
    assert "--tasks retain_set" in record["config"]["command"]
    assert "1 of 1 pieces done" in result.stderr
    again = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "ppl" in again.stdout
    bad = CliRunner().invoke(app, ["sweep", "--model-args", "alpha=1", "-o", str(tmp_path / "other")])
    assert isinstance(bad.exception, UserError)
    assert not (tmp_path / "other").exists()
