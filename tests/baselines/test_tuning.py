"""Material of methods, the tuning split and what is chosen on it, and the page of the methods."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from lm_ortho.baselines import (
    METHODS,
    Budget,
    Material,
    Result,
    Score,
    TuningSplit,
    material_from_files,
    material_from_world,
    score_result,
    split_rows,
    split_world,
    tune,
)
from lm_ortho.baselines import tuning as tuning_module
from lm_ortho.baselines.tuning import FORGET_AUTHORS, HELD_OUT_AUTHORS, UNKNOWN_AUTHORS, answer_loss, secret_loss
from lm_ortho.data.rows import write_rows
from lm_ortho.errors import UserError
from lm_ortho.finetune import load_causal_lm, merge_adapter
from lm_ortho.world import corpus, get_path, people
from tests.support.paths import REPOSITORY
from tests.support.scripts import load_script

torch.set_num_threads(1)
SCRIPT = REPOSITORY / "scripts" / "baselines_reference.py"


@pytest.fixture(scope="module")
def evaluated():
    """The embedded models and the rows that are evaluated."""
    return material_from_world()


@pytest.fixture(scope="module")
def split(evaluated):
    return split_world(evaluated)


def subjects(rows):
    return {row.subject for row in rows if row.subject}


def test_the_embedded_material_is_that_of_the_default_decomposition(evaluated):
    assert evaluated.forget == corpus.make_forget_rows()
    assert evaluated.retain == corpus.make_calibration_rows()
    for name, model in (("memory", evaluated.merged), ("never_saw", evaluated.reference)):
        expected = merge_adapter(load_causal_lm(get_path("base")), get_path(name)).state_dict()
        assert all(torch.equal(tensor, expected[at]) for at, tensor in model.state_dict().items())
    base = load_causal_lm(get_path("base")).state_dict()
    assert all(torch.equal(tensor, base[at]) for at, tensor in evaluated.base.state_dict().items())
    with pytest.raises(UserError, match="base='given' is unknown"):
        material_from_world("given")


def test_nobody_who_is_evaluated_is_in_the_tuning_split(evaluated, split):
    evaluated_names = {author.name for group in ("forget", "unseen") for author in people.draw_groups()[group]}
    evaluated_names |= {
        a.name for group in ("known", "taught") for a in people.draw_groups()[group][-people.LEFT_OUT_AUTHORS :]
    }
    evaluated_names |= {canary.name for part in people.draw_canaries() for canary in part}
    parts = [subjects(split.material.forget), subjects(split.held_out)]
    assert [len(part) for part in parts] == [FORGET_AUTHORS, 2 * HELD_OUT_AUTHORS]
    assert not evaluated_names & (parts[0] | parts[1] | subjects(split.material.retain))
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & subjects(split.material.retain)
    taught = {author.name for author in people.draw_groups()["taught"]}
    assert parts[0] <= taught
    assert len(parts[1] & taught) == HELD_OUT_AUTHORS
    assert set(split.material.retain) <= set(evaluated.retain)


def test_the_merged_model_knows_the_tuning_split_but_no_invented_authors(split):
    material = split.material
    assert secret_loss(material.merged, material, material.forget) < 0.15
    assert answer_loss(material.merged, material, split.held_out) < 0.1
    assert 3 < split.ignorance < 6
    assert material.reference is None
    score = score_result(METHODS.get("unedited").make(replace(material, reference=None)), split)
    assert score.retain == 0
    assert score.forget > 3


def test_the_seed_draws_the_tuning_split(evaluated, split, monkeypatch):
    monkeypatch.setattr(tuning_module, "secret_loss", lambda model, material, rows: float(len(rows)))
    again, other = split_world(evaluated), split_world(evaluated, seed=1)
    assert again.material.forget == split.material.forget
    assert again.held_out == split.held_out
    assert again.ignorance == 5 * UNKNOWN_AUTHORS
    assert subjects(other.material.forget) != subjects(split.material.forget)


def test_material_of_the_tuning_split_without_the_base_model(split, monkeypatch):
    monkeypatch.setattr(tuning_module, "secret_loss", lambda model, material, rows: 0.0)
    material = material_from_world("none", tuning=True)
    assert material.base is None
    assert material.forget == split.material.forget
    assert material.retain == split.material.retain


# Your own rows


@pytest.fixture
def own(memorised_models):
    return Material(
        memorised_models.tokenizer,
        memorised_models.merged,
        memorised_models.forget,
        memorised_models.retain,
        base=memorised_models.base,
        reference=copy.deepcopy(memorised_models.base),
    )


def test_some_subjects_of_each_set_are_set_aside(own):
    tuning, evaluation = split_rows(own, share=0.4)
    tuning_subjects, held_out_subjects = subjects(tuning.material.forget), subjects(tuning.held_out)
    assert len(tuning_subjects) == len(held_out_subjects) == 2
    assert subjects(evaluation.forget) | tuning_subjects == subjects(own.forget)
    assert not subjects(evaluation.forget) & tuning_subjects
    assert subjects(tuning.material.retain) | held_out_subjects == subjects(own.retain)
    assert not subjects(tuning.material.retain) & held_out_subjects
    assert evaluation.retain == own.retain
    assert tuning.ignorance == pytest.approx(secret_loss(own.reference, own, tuning.material.forget))
    by_base, _ = split_rows(replace(own, reference=None), share=0.4)
    assert by_base.ignorance == pytest.approx(tuning.ignorance)


def test_an_impossible_split_is_refused(own):
    with pytest.raises(UserError, match="give reference= or base="):
        split_rows(own.restrict("merged"))
    with pytest.raises(UserError, match="forget is about one subject"):
        split_rows(replace(own, forget=own.forget[:2]))


def test_material_of_files_is_what_the_model_args_mean(memorised_models, tmp_path, monkeypatch):
    for name, model in (("merged", memorised_models.merged), ("base", memorised_models.base)):
        model.save_pretrained(tmp_path / name)
        memorised_models.tokenizer.save_pretrained(tmp_path / name)
    for name in ("forget", "retain"):
        write_rows(tmp_path / f"{name}.jsonl", getattr(memorised_models, name))
    rows = {name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")}
    merged, base = (str(tmp_path / name) for name in ("merged", "base"))
    material = material_from_files(merged, base=base, reference_model=base, **rows)
    assert (material.forget, material.retain) == (memorised_models.forget, memorised_models.retain)
    for one, other in (
        (material.merged, memorised_models.merged),
        (material.base, memorised_models.base),
        (material.reference, memorised_models.base),
    ):
        expected = other.state_dict()
        assert all(torch.equal(tensor, expected[at]) for at, tensor in one.state_dict().items())
    alone = material_from_files(merged, **rows)
    assert alone.base is None
    assert alone.reference is None
    with pytest.raises(UserError, match=r"reference=.*nowhere.*no such directory"):
        material_from_files(merged, reference_model=str(tmp_path / "nowhere"), **rows)
    with pytest.raises(UserError, match="forget: your own model needs"):
        material_from_files(merged, retain=rows["retain"])
    calls = []
    monkeypatch.setattr(
        "lm_ortho.baselines.material.load_causal_lm",
        lambda place, **options: calls.append(options) or memorised_models.base,
    )
    material_from_files(merged, reference_model=base, revision="main", trust_remote_code=False, **rows)
    assert calls == [{"argument": "reference", "trust_remote_code": False}]  # a revision is that of one model


# Choosing


def test_the_score_is_two_sided_and_a_gain_on_kept_rows_is_none():
    assert Score(0.0, 0.0).total == 0
    assert Score(math.log(1.3), math.log(1.03)).total == pytest.approx(2)
    assert Score(0.5, -1.0).total == Score(0.5, 0.0).total


def test_the_best_of_the_grid_is_taken_and_failures_are_passed_over(own, monkeypatch):
    tuning = TuningSplit(own, own.retain, secret_loss(own.base, own, own.forget))
    npo, budget = METHODS.get("npo"), Budget(steps=12, forget_rows=6, retain_rows=6)
    grid = [{"lr": 1e-5}, {"lr": 1e-3}, {"lr": 1e-3, "retain": 0.0}]
    result = tune(npo, tuning, grid, budget=budget)
    totals = [score.total for _, score in result.trials]
    assert result.settings == grid[totals.index(min(totals))]
    again = npo.make(own, result.settings, budget=budget)
    assert score_result(again, tuning).total == pytest.approx(min(totals))

    def fail(material, settings, run):
        if settings.lr > 1e-4:
            raise UserError("it went too far")
        return Result(copy.deepcopy(material.merged))

    failing_method = replace(npo, function=fail)
    result = tune(failing_method, tuning, grid[:2], budget=budget)
    assert result.settings == grid[0]
    assert result.trials[1] == (grid[1], None)
    with pytest.raises(UserError, match=r"no setting of npo finished \(it went too far\)"):
        tune(failing_method, tuning, grid[1:], budget=budget)


# The page


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


def test_the_page_is_that_of_the_registry(script):
    command = "python scripts/baselines_reference.py"
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), f"docs/baselines.md is out of date: {command}"


def test_every_method_and_every_setting_has_a_row(script):
    lines = [line for line in script.page().splitlines() if line.startswith("| `")]
    for name in METHODS:
        method_lines = [line for line in lines if line.startswith(f"| `{name}` |")]
        settings = METHODS.get(name).setting_names if name not in script.PACKAGE_METHODS else ("all",)
        assert len(method_lines) == 1 + len(settings)
        first = method_lines[0]
        assert "this package" in first or "arxiv.org" in first or name in ("unedited", "unload")
    assert all("seed" not in line for line in lines)
