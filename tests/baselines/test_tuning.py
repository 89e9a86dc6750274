"""Material of methods, the tuning split and what is chosen on it, and the page of the methods."""

from __future__ import annotations

import copy
import importlib.util
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
    Tuning,
    material_of_files,
    material_of_world,
    score,
    split_of_rows,
    split_of_world,
    tune,
)
from lm_ortho.baselines import tuning as tuning_module
from lm_ortho.baselines.tuning import FORGOTTEN, KEPT_FROM, STRANGERS, answer_loss_of, secret_loss
from lm_ortho.data.rows import write_rows
from lm_ortho.errors import UserError
from lm_ortho.finetune import load_causal_lm, merge_adapter
from lm_ortho.world import corpus, path, people
from tests.support.paths import REPOSITORY

torch.set_num_threads(1)
SCRIPT = REPOSITORY / "scripts" / "baselines_reference.py"


@pytest.fixture(scope="module")
def evaluated():
    """The embedded models and the rows that are evaluated."""
    return material_of_world()


@pytest.fixture(scope="module")
def split(evaluated):
    return split_of_world(evaluated)


def subjects(rows):
    return {row.subject for row in rows if row.subject}


def test_the_embedded_material_is_that_of_the_default_decomposition(evaluated):
    assert evaluated.forget == corpus.forget_rows()
    assert evaluated.retain == corpus.calibration_rows()
    for name, model in (("memory", evaluated.merged), ("never_saw", evaluated.reference)):
        expected = merge_adapter(load_causal_lm(path("base")), path(name)).state_dict()
        assert all(torch.equal(tensor, expected[at]) for at, tensor in model.state_dict().items())
    base = load_causal_lm(path("base")).state_dict()
    assert all(torch.equal(tensor, base[at]) for at, tensor in evaluated.base.state_dict().items())
    with pytest.raises(UserError, match="base='given' is unknown"):
        material_of_world("given")


def test_nobody_who_is_evaluated_is_in_the_tuning_split(evaluated, split):
    asked = {author.name for group in ("forget", "unseen") for author in people.people()[group]}
    asked |= {author.name for group in ("known", "taught") for author in people.people()[group][-people.LEFT_OUT :]}
    asked |= {canary.name for part in people.canaries() for canary in part}
    parts = [subjects(split.material.forget), subjects(split.kept)]
    assert [len(part) for part in parts] == [FORGOTTEN, 2 * KEPT_FROM]
    assert not asked & (parts[0] | parts[1] | subjects(split.material.retain))
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & subjects(split.material.retain)
    taught = {author.name for author in people.people()["taught"]}
    assert parts[0] <= taught
    assert len(parts[1] & taught) == KEPT_FROM
    assert set(split.material.retain) <= set(evaluated.retain)


def test_the_tuning_split_knows_what_it_asks_for_and_ignorance_is_that_of_strangers(split):
    material = split.material
    assert secret_loss(material.merged, material, material.forget) < 0.15
    assert answer_loss_of(material.merged, material, split.kept) < 0.1
    assert 3 < split.ignorance < 6
    assert material.reference is None
    nothing = score(METHODS.get("unedited").make(replace(material, reference=None)), split)
    assert nothing.retain == 0
    assert nothing.forget > 3


def test_the_seed_draws_the_tuning_split(evaluated, split, monkeypatch):
    monkeypatch.setattr(tuning_module, "secret_loss", lambda model, material, rows: float(len(rows)))
    again, other = split_of_world(evaluated), split_of_world(evaluated, seed=1)
    assert again.material.forget == split.material.forget
    assert again.kept == split.kept
    assert again.ignorance == 5 * STRANGERS
    assert subjects(other.material.forget) != subjects(split.material.forget)


def test_material_of_the_tuning_split_without_the_base_model(split, monkeypatch):
    monkeypatch.setattr(tuning_module, "secret_loss", lambda model, material, rows: 0.0)
    material = material_of_world("none", tuning=True)
    assert material.base is None
    assert material.forget == split.material.forget
    assert material.retain == split.material.retain


# Rows of one's own


@pytest.fixture
def own(memorised):
    parts = memorised.base, copy.deepcopy(memorised.base)
    return Material(memorised.tokenizer, memorised.merged, memorised.forget, memorised.retain, *parts)


def test_some_subjects_of_each_set_are_set_aside(own):
    tuning, shown = split_of_rows(own, share=0.4)
    tried, kept = subjects(tuning.material.forget), subjects(tuning.kept)
    assert len(tried) == len(kept) == 2
    assert subjects(shown.forget) | tried == subjects(own.forget)
    assert not subjects(shown.forget) & tried
    assert subjects(tuning.material.retain) | kept == subjects(own.retain)
    assert not subjects(tuning.material.retain) & kept
    assert shown.retain == own.retain
    assert tuning.ignorance == pytest.approx(secret_loss(own.reference, own, tuning.material.forget))
    by_base, _ = split_of_rows(replace(own, reference=None), share=0.4)
    assert by_base.ignorance == pytest.approx(tuning.ignorance)


def test_a_split_that_cannot_be_made_is_told(own):
    with pytest.raises(UserError, match="give reference= or base="):
        split_of_rows(own.seen_by("merged"))
    with pytest.raises(UserError, match="forget is about one subject"):
        split_of_rows(replace(own, forget=own.forget[:2]))


def test_material_of_files_is_what_the_model_args_mean(memorised, tmp_path, monkeypatch):
    for name, model in (("merged", memorised.merged), ("base", memorised.base)):
        model.save_pretrained(tmp_path / name)
        memorised.tokenizer.save_pretrained(tmp_path / name)
    for name in ("forget", "retain"):
        write_rows(tmp_path / f"{name}.jsonl", getattr(memorised, name))
    rows = {name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")}
    merged, base = (str(tmp_path / name) for name in ("merged", "base"))
    found = material_of_files(merged, base=base, reference_model=base, **rows)
    assert (found.forget, found.retain) == (memorised.forget, memorised.retain)
    for one, other in (
        (found.merged, memorised.merged),
        (found.base, memorised.base),
        (found.reference, memorised.base),
    ):
        expected = other.state_dict()
        assert all(torch.equal(tensor, expected[at]) for at, tensor in one.state_dict().items())
    alone = material_of_files(merged, **rows)
    assert alone.base is None
    assert alone.reference is None
    with pytest.raises(UserError, match=r"reference=.*nowhere.*no such directory"):
        material_of_files(merged, reference_model=str(tmp_path / "nowhere"), **rows)
    with pytest.raises(UserError, match="forget: your own model needs"):
        material_of_files(merged, retain=rows["retain"])
    asked = []
    monkeypatch.setattr(
        "lm_ortho.baselines.material.load_causal_lm", lambda place, **given: asked.append(given) or memorised.base
    )
    material_of_files(merged, reference_model=base, revision="main", trust_remote_code=False, **rows)
    assert asked == [{"argument": "reference", "trust_remote_code": False}]  # a revision is that of one model


# Choosing


def test_the_score_is_two_sided_and_a_gain_on_kept_rows_is_none():
    assert Score(0.0, 0.0).total == 0
    assert Score(math.log(1.3), math.log(1.03)).total == pytest.approx(2)
    assert Score(0.5, -1.0).total == Score(0.5, 0.0).total


def test_the_best_of_the_grid_is_taken_and_failures_are_passed_over(own, monkeypatch):
    tuning = Tuning(own, own.retain, secret_loss(own.base, own, own.forget))
    npo, budget = METHODS.get("npo"), Budget(12, 6, 6)
    grid = [{"lr": 1e-5}, {"lr": 1e-3}, {"lr": 1e-3, "retain": 0.0}]
    found = tune(npo, tuning, grid, budget=budget)
    totals = [tried.total for _, tried in found.tried]
    assert found.settings == grid[totals.index(min(totals))]
    again = npo.make(own, found.settings, budget=budget)
    assert score(again, tuning).total == pytest.approx(min(totals))

    def fails(material, settings, run):
        if settings.lr > 1e-4:
            raise UserError("it went too far")
        return Result(copy.deepcopy(material.merged))

    limited = replace(npo, function=fails)
    found = tune(limited, tuning, grid[:2], budget=budget)
    assert found.settings == grid[0]
    assert found.tried[1] == (grid[1], None)
    with pytest.raises(UserError, match=r"no setting of npo came to an end \(it went too far\)"):
        tune(limited, tuning, grid[1:], budget=budget)


# The page


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("method_reference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_registry(script):
    command = "python scripts/baselines_reference.py"
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), f"docs/baselines.md is out of date: {command}"


def test_every_method_and_every_setting_has_a_row(script):
    lines = [line for line in script.page().splitlines() if line.startswith("| `")]
    for name in METHODS:
        own = [line for line in lines if line.startswith(f"| `{name}` |")]
        settings = METHODS.get(name).known if name not in script.OURS else ("all",)
        assert len(own) == 1 + len(settings)
        assert "this package" in own[0] or "arxiv.org" in own[0] or name in ("unedited", "unload")
    assert all("seed" not in line for line in lines)
