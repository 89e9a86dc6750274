"""A board asks in the chat template, makes its models with the same prompts, and feeds forget quality itself."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import pytest
from rich.console import Console
from scipy.stats import ks_2samp

from lm_ortho.baselines import Material, training
from lm_ortho.baselines import ortho as ortho_method
from lm_ortho.baselines.interface import METHODS, Run
from lm_ortho.data.chat import render_forms
from lm_ortho.data.encoding import encode
from lm_ortho.errors import UserError
from lm_ortho.leaderboard import makers
from lm_ortho.leaderboard.board import run_board
from lm_ortho.leaderboard.config import make_board
from lm_ortho.leaderboard.plan import plan_board
from lm_ortho.leaderboard.report.formats import read_results, render_csv, render_markdown
from lm_ortho.leaderboard.report.page import render_html
from lm_ortho.leaderboard.retain_samples import explain_absence
from lm_ortho.leaderboard.store import DONE, FAILED, Store
from lm_ortho.runtime.device import Decision
from tests.support import tofu as tiny_tofu
from tests.support.chat import DATE, SYSTEM, make_chat_tokenizer
from tests.support.harness import ROWS, make_model

pytestmark = pytest.mark.usefixtures("isolated_environment")
CHAT = {"apply_chat_template": True, "system_instruction": SYSTEM, "chat_template_args": DATE}
TASK = "tofu_forget01"


@pytest.fixture(scope="module", autouse=True)
def real_makers() -> Iterator[None]:
    """The methods of the package, also after other tests have registered tiny ones under their names."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("never_saw", "unedited"):
            patch.delitem(makers.MAKERS._entries, name, raising=False)
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two models with a chat template, the rows of a board, and a data directory of TOFU."""
    folder, tokenizer = tmp_path_factory.mktemp("places"), make_chat_tokenizer()
    for number, name in enumerate(("full", "retain90")):
        model = make_model(len(tokenizer), seed=number)
        model.config.max_position_embeddings = 128
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, start in (("forget", 3990), ("retain", 0)):
        lines = [json.dumps(tiny_tofu.row(start + number)) + "\n" for number in range(4)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    tiny_tofu.write(folder / "tofu", holdout=False)
    return {name: str(folder / name) for name in ("full", "retain90", "forget.jsonl", "retain.jsonl", "tofu")}


def board_content(places: dict[str, str], **changes: Any) -> dict[str, Any]:
    model = {
        "pretrained": places["full"],
        "never_saw": places["retain90"],
        "base": "none",
        "forget": places["forget.jsonl"],
        "retain": places["retain.jsonl"],
    }
    return {
        "name": "chat",
        "models": {"m": model},
        "tasks": [TASK],
        "methods": [{"method": "unedited"}, {"method": "retain_tuning"}, {"method": "never_saw"}],
        "budget": {"steps": 1, "forget_rows": 1, "retain_rows": 1},
        "device": "cpu",
        "metadata": {"tofu_dir": places["tofu"], "tofu_first": 4},
        "frontier": {
            "forget": [{"task": TASK, "metric": "truth_ratio"}],
            "retain": [{"task": TASK, "metric": "ppl"}],
        },
        **CHAT,
        **changes,
    }


def run(places: dict[str, str], out: Path, only: str = "", **changes: Any) -> Any:
    lm_eval.evaluator.add_env_info = lambda storage: None  # runs a dozen subprocesses
    board = make_board(board_content(places, **changes))
    return run_board(board, out, Console(quiet=True), command="lm-ortho board run chat.yaml", only=only, quiet=True)


@pytest.fixture(scope="module")
def whole(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    tally = run(places, out)
    assert tally is not None
    assert tally.complete, [record.error for record in Store(out).records() if record.error]
    return out


def evaluations(out: Path) -> dict[str, Any]:
    records = [record for record in Store(out).records() if record.piece.kind == "evaluate"]
    return {record.piece.config["method"]: record for record in records}


def read_samples(out: Path, method: str) -> list[dict[str, Any]]:
    (name,) = [name for name in evaluations(out)[method].result["files"] if "samples" in name]
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def test_every_model_is_asked_in_the_chat_template(whole: Path) -> None:
    for method in ("unedited", "never_saw", "retain_tuning"):
        for sample in read_samples(whole, method):
            context = sample["arguments"]["gen_args_0"]["arg_0"]
            assert context.startswith(f"<s>[[system]]\n\nToday is 10 Apr 2025.\n\n{SYSTEM}<end>[[user]]\n\nWhere was")


def test_forget_quality_is_computed_against_the_row_that_never_saw(whole: Path) -> None:
    """The retain-only model is listed last and measured first; its samples are those of the other rows."""
    ratios = {
        method: [sample["forget_quality"][0] for sample in read_samples(whole, method)]
        for method in ("unedited", "never_saw", "retain_tuning")
    }
    records = evaluations(whole)
    for method in ("unedited", "retain_tuning"):
        values = records[method].result["values"][TASK]
        expected = ks_2samp(ratios[method], ratios["never_saw"])
        assert values["forget_quality"][0] == pytest.approx(expected.pvalue)
        assert values["forget_ks"][0] == pytest.approx(expected.statistic)
        source = {"argument": "tofu_retain_samples", "piece": records["never_saw"].piece.key}
        assert records[method].piece.config["retain_samples"] == source
        assert len(records[method].result["retain_samples"]) == 64
    assert "forget_quality" not in records["never_saw"].result["values"][TASK]
    assert "retain_samples" not in records["never_saw"].piece.config


def test_the_page_says_how_the_tasks_asked_and_what_is_missing(whole: Path) -> None:
    results = read_results(whole)
    assert (TASK, "forget_quality") in results.columns
    asked = (
        f"Questions are asked in the chat template of the tokenizer, after the system message '{SYSTEM}', "
        "with date_string='10 Apr 2025'."
    )
    missing = f"{TASK}: no priv_leak: no held-out rows among those evaluated here and with the retrained model."
    assert results.notes == (asked, missing)
    assert asked in render_markdown(results)
    assert "after the system message &#39;You are" in render_html(results)
    commands = [shlex.split(command) for row in results.rows for command in row.commands]
    for command in commands:
        assert json.loads(command[4])["chat_template_args"] == DATE
        assert "--apply_chat_template" in command
        assert command[command.index("--system_instruction") + 1] == SYSTEM
    metadata = [json.loads(command[command.index("--metadata") + 1]) for command in commands]
    folders = [entry.get("tofu_retain_samples") for entry in metadata]
    assert folders[2] is None
    assert all((whole / folder).is_dir() for folder in folders[:2])
    assert "--apply_chat_template" in render_csv(results)


def test_another_template_is_another_piece(places: dict[str, str], tmp_path: Path) -> None:
    def keys(**changes: Any) -> dict[str, set[str]]:
        plan = plan_board(make_board(board_content(places, **changes)), tmp_path)
        jobs = {job.cell.method: set(job.keys) for job in plan.cells if job.cell}
        assert all(len(job_keys) == 2 for job_keys in jobs.values())
        return jobs

    expected = keys()
    assert keys() == expected
    without = {"system_instruction": None, "chat_template_args": {}}
    changes: list[dict[str, Any]] = [
        {"chat_template_args": {"date_string": "11 Apr 2025"}},
        {"system_instruction": "Be brief."},
        without,
        {**without, "apply_chat_template": False},
    ]
    found = [expected, *(keys(**change) for change in changes)]
    for method in expected:
        measured = set.union(*(job_keys[method] for job_keys in found))
        # Without a system message and variables the models are made as without a chat, and measured in another way.
        assert len(measured) == 2 * len(found) - 1
    assert keys(prompts="chat")["unedited"].isdisjoint(expected["unedited"])


def test_only_a_method_brings_the_pieces_whose_samples_it_needs(places: dict[str, str], tmp_path: Path) -> None:
    board = make_board(board_content(places, tasks=[TASK, "tofu_retain99"], limits={"tofu_retain99": 3}))
    plan = plan_board(board, tmp_path, only="unedited")
    jobs = [(job.cell.method if job.cell else "", [piece.config["task"] for piece in job.pieces]) for job in plan.cells]
    assert jobs == [("unedited", [TASK, "tofu_retain99"]), ("never_saw", [TASK])]
    with pytest.raises(UserError, match="no cell of the board"):
        plan_board(board, tmp_path, only="npo")


def test_a_retain_only_model_that_fails_is_the_reason_of_the_others(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(lm: Any, config: dict[str, Any], results: Path) -> dict[str, Any]:
        if "never_saw" in config["folder"]:
            raise RuntimeError("no")
        return {"values": {}, "samples": {}, "groups": {}, "files": []}

    monkeypatch.setattr("lm_ortho.leaderboard.evaluation.evaluate", fail)
    changes = {"tasks": [TASK, "tofu_retain99"], "methods": [{"method": "unedited"}, {"method": "never_saw"}]}
    tally = run(places, tmp_path / "out", **changes)
    assert (tally.done, tally.failed) == (3, 3)
    records = Store(tmp_path / "out").records()
    states = {(r.piece.config["method"], r.piece.config["task"]): r for r in records if r.piece.kind == "evaluate"}
    assert states["unedited", "tofu_retain99"].status == DONE
    assert states["unedited", TASK].status == FAILED
    assert states["unedited", TASK].error == ("the retain-only model (never_saw) could not be measured on this task")


def test_without_samples_the_page_says_why(places: dict[str, str], tmp_path: Path) -> None:
    def pieces(**changes: Any) -> tuple[list[Any], list[str]]:
        board = make_board(board_content(places, **changes))
        plan = plan_board(board, tmp_path)
        found = [piece for job in plan.cells for piece in job.pieces]
        limits = {piece.config["task"]: piece.config["limit"] for piece in found}
        return [piece.config.get("retain_samples") for piece in found], explain_absence(board, limits)

    samples, reasons = pieces()
    assert (len(list(filter(None, samples))), reasons) == (2, [])
    samples, reasons = pieces(methods=[{"method": "unedited"}])
    assert samples == [None]
    assert reasons[0].endswith("is left out: the board has no row `method: never_saw`.")
    samples, reasons = pieces(limit=3)
    assert samples == [None] * 3
    assert "`metadata: {tofu_first: N}`" in reasons[0]
    own = {"tofu_dir": places["tofu"], "tofu_retain_samples": "logs"}
    assert pieces(metadata=own) == ([None] * 3, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"apply_chat_template": False}, "system_instruction needs apply_chat_template: true"),
        ({"apply_chat_template": 1}, "apply_chat_template"),
        ({"prompts": "plain"}, "prompts: plain would make models without the system_instruction"),
        ({"chat_template_args": {"tokenize": True}}, "chat_template_args: 'tokenize' is set by the evaluation"),
        ({"chat_template_args": "today"}, "chat_template_args: a mapping of names to values is needed"),
    ],
)
def test_values_of_the_chat_that_contradict(places: dict[str, str], change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_board(board_content(places, **change))
    assert "\n" not in str(error.value)


def test_a_template_that_cannot_do_it_is_refused_before_the_work(places: dict[str, str], tmp_path: Path) -> None:
    embedded = {"models": {"embedded": {}}, "tasks": ["tofu_forget"]}
    with pytest.raises(UserError, match=r"models\.embedded: apply_chat_template: the tokenizer has no chat template"):
        plan_board(make_board(board_content(places, **embedded)), tmp_path)
    with pytest.raises(
        UserError, match=r"models\.m: apply_chat_template='short': the tokenizer has one without a name"
    ):
        plan_board(make_board(board_content(places, apply_chat_template="short")), tmp_path)
    tokenizer, model = make_chat_tokenizer(), tmp_path / "model"
    make_model(len(tokenizer)).save_pretrained(model)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    tokenizer.save_pretrained(model)
    content = board_content(places)
    content["models"]["m"]["pretrained"] = str(model)
    with pytest.raises(UserError, match=r"models\.m: system_instruction: the chat template of the tokenizer leaves it"):
        plan_board(make_board(content), tmp_path)
    assert not (tmp_path / "store.sqlite").exists()


def test_models_are_made_on_the_device_of_the_board(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A board with a GPU made its models on the CPU."""
    devices = []

    def move(material: Material, device: Any) -> Material:
        devices.append(str(device))
        return material

    monkeypatch.setattr(Material, "to", move)
    monkeypatch.setattr(makers, "choose_device", lambda device: Decision(f"{device}:1", "named"))
    board = make_board(board_content(places, methods=[{"method": "unedited"}]))
    (job,) = plan_board(board, tmp_path).cells
    assert job.cell is not None
    assert replace(job.cell, device=None).key == job.cell.key
    (tmp_path / "model").mkdir()
    makers.find_maker("unedited").make(job.cell, tmp_path / "model", lambda *_: None)
    assert devices == ["cpu:1", "cpu"]
    assert (tmp_path / "model" / "config.json").is_file()


def test_all_methods_are_made_with_the_prompts_of_the_board(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_chat_tokenizer()
    model = make_model(len(tokenizer)).float()
    model.config.max_position_embeddings = 512
    prompts = make_board(
        {"name": "b", "methods": [{"method": "npo"}], "tasks": ["t"], "prompts": "chat", **CHAT}
    ).recipe_keys
    rows = [row for row in ROWS if row.question]
    material = Material(tokenizer, model, rows, rows, prompts=prompts)
    # 1. Methods that train, prune or round.
    sets = training.encode_material(material)
    options = {"system_instruction": SYSTEM, "chat_template_args": DATE}
    expected = encode(tokenizer, render_forms(rows, tokenizer, "chat", **options))
    assert sets.forget == sets.retain == expected
    # 2. The decomposition; a setting of its own comes first.
    recipes = []

    def decompose(model: Any, tokenizer: Any, forget: Any, retain: Any, recipe: Any, **_: Any) -> Any:
        recipes.append(recipe)
        raise RuntimeError("enough")

    monkeypatch.setattr(ortho_method, "decompose", decompose)
    for settings in ({}, {"prompts": "both"}):
        with pytest.raises(RuntimeError, match="enough"):
            METHODS.get("ortho_merged").function(material, METHODS.get("ortho_merged").check(settings), Run(seed=3))
    assert [recipe.prompts for recipe in recipes] == ["chat", "both"]
    assert all(recipe.chat_options == options and recipe.seed == 3 for recipe in recipes)
