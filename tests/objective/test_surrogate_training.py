"""The surrogate: when its training stops, that it can be interrupted, and who shares it."""

from __future__ import annotations

import copy
import dataclasses
import math
import random

import pytest
import torch

from lm_ortho.config import make_recipe
from lm_ortho.data.encoding import mean_loss
from lm_ortho.objective import LossWeights, surrogate_training
from lm_ortho.objective.surrogate import compute_key, surrogate_target
from lm_ortho.objective.surrogate_training import (
    SurrogatePlan,
    SurrogateTraining,
    count_max_steps,
    draw_batches,
    make_plan,
    measure_loss,
)
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.runtime import resume as resume_module
from lm_ortho.runtime.progress import no_progress
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder

torch.set_num_threads(1)
PLAN = SurrogatePlan(max_steps=30, max_loss=-math.inf, seed=0)


class InterruptionError(Exception):
    """Stands for the interruption of a run."""


def short_phases(monkeypatch):
    for name, value in {"CHECK_STEPS": 2, "DECAY_STEPS": 4, "WARM_UP_STEPS": 2, "BATCH_TOKENS": 100}.items():
        monkeypatch.setattr(surrogate_training, name, value)


def train(memorised_models, plan, resume=NO_RESUME, progress=no_progress):
    training = SurrogateTraining(memorised_models.base, memorised_models.examples()[1], plan)
    training.run(progress, resume)
    return training


def test_it_stops_when_its_loss_is_within_the_threshold(memorised_models, monkeypatch):
    short_phases(monkeypatch)
    retain = memorised_models.examples()[1]
    before = measure_loss(memorised_models.base, retain)
    plan = SurrogatePlan(max_steps=200, max_loss=before - 0.3, seed=0)
    reports = []
    training = train(memorised_models, plan, progress=lambda *report: reports.append(report))
    assert training.steps < plan.max_steps
    assert training.loss <= plan.max_loss
    assert training.loss == pytest.approx(measure_loss(training.model, retain), rel=1e-5)
    assert training.loss == pytest.approx(mean_loss(training.model, retain), rel=1e-5)
    # The last report is that of the last step, so that a bar is closed; it says where the loss is and has to be.
    assert reports[-1][:3] == ("surrogate", training.steps, training.steps)
    assert reports[0][2] == plan.max_steps
    assert reports[-1][3] == f"loss {training.loss:.3f}, stops at {plan.max_loss:.3f}"


def test_far_from_the_threshold_the_loss_is_measured_at_the_end_only(memorised_models, monkeypatch):
    short_phases(monkeypatch)
    measured_steps, original = [], surrogate_training.measure_loss

    def train_to(max_loss):
        measured_steps.clear()
        training = SurrogateTraining(
            memorised_models.base, memorised_models.examples()[1], SurrogatePlan(12, max_loss, seed=0, tolerance=0.01)
        )
        monkeypatch.setattr(
            surrogate_training,
            "measure_loss",
            lambda *arguments: measured_steps.append(training.steps) or original(*arguments),
        )
        training.run(no_progress, NO_RESUME)
        return training

    monkeypatch.setattr(surrogate_training, "MEASURED_DISTANCE", 0.1)
    assert train_to(0.0).steps == 12
    assert measured_steps == [12]
    before = original(memorised_models.base, memorised_models.examples()[1])
    assert train_to(before - 0.1).loss <= before - 0.1
    assert len(measured_steps) > 1


def test_it_ends_with_its_budget_at_a_rate_of_zero(memorised_models, monkeypatch):
    short_phases(monkeypatch)
    rates, original = [], torch.optim.AdamW.step

    def record_rate(optimiser, *args):
        rates.append(optimiser.param_groups[0]["lr"])
        return original(optimiser, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", record_rate)
    training = train(memorised_models, dataclasses.replace(PLAN, max_steps=11))
    assert training.steps == 11
    peak = surrogate_training.LEARNING_RATE
    expected = [0.5, *[1.0] * 6, 1.0, 0.75, 0.5, 0.25]  # warm-up, constant, and a decay that ends with the budget
    assert rates == pytest.approx([peak * factor for factor in expected])


def test_a_decay_that_began_too_early_is_followed_by_another_one(memorised_models, monkeypatch):
    short_phases(monkeypatch)
    before = measure_loss(memorised_models.base, memorised_models.examples()[1])
    plan = SurrogatePlan(max_steps=300, max_loss=before - 0.3, seed=0, tolerance=4.0)
    training = train(memorised_models, plan)  # the decay begins at once, and ends far from the threshold
    assert training._near < 4.0
    assert training.loss <= before - 0.3
    assert training.steps < 300


@pytest.mark.parametrize("step", [3, 8, 15])
def test_a_stopped_training_goes_on_with_the_same_bits(memorised_models, monkeypatch, tmp_path, step):
    short_phases(monkeypatch)
    monkeypatch.setattr(resume_module, "SAVE_INTERVAL", 0.0)
    before = measure_loss(memorised_models.base, memorised_models.examples()[1])
    plan = SurrogatePlan(max_steps=24, max_loss=before - 0.5, seed=3)
    expected = train(memorised_models, plan)
    assert expected.steps > 15

    def interrupt(stage, current_step, *_):
        if current_step == step + 1:
            raise InterruptionError

    resume = ResumeFolder(tmp_path)
    with pytest.raises(InterruptionError):
        train(memorised_models, plan, resume, interrupt)
    steps = []
    result = train(memorised_models, plan, resume, lambda stage, current_step, *_: steps.append(current_step))
    assert steps[0] == step + 1
    assert result.steps == expected.steps
    assert result.loss == expected.loss
    for one, other in zip(result.state()["adapter"], expected.state()["adapter"], strict=True):
        assert torch.equal(one, other)


def test_weights_are_shared_with_the_base_model_and_not_changed(memorised_models):
    base = copy.deepcopy(memorised_models.base)
    pointers = {parameter.data_ptr() for parameter in base.parameters()}
    training = SurrogateTraining(base, memorised_models.examples()[1], PLAN)
    own = [p for p in training.model.parameters() if p.data_ptr() not in pointers]
    assert sum(p.numel() for p in own) == sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), memorised_models.base.parameters(), strict=True))
    half = copy.deepcopy(memorised_models.base).bfloat16()
    training = SurrogateTraining(half, memorised_models.examples()[1], PLAN)
    assert {p.dtype for p in training.model.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_the_budget_is_that_of_the_edit(memorised_models, monkeypatch):
    """As many tokens as the edit goes through, or one step."""
    forget, retain = memorised_models.examples()
    monkeypatch.setattr(surrogate_training, "BATCH_TOKENS", 60)
    edit_tokens = 20 * sum(len(example.ids) for example in [*forget, *retain])  # all rows are in every step
    steps = count_max_steps(forget, retain, 20, forget_rows=48)
    batches = draw_batches(retain, random.Random(0))
    tokens = sum(len(retain[i].ids) for _ in range(steps) for i in next(batches))
    assert tokens == pytest.approx(edit_tokens, rel=0.1)
    many = retain * 40  # a step has some of them only
    weights = LossWeights(forget_rows=48)
    mean = sum(len(example.ids) for example in retain) / len(retain)
    edit_tokens = 20 * (sum(len(example.ids) for example in forget) + weights.retain_rows * mean)
    batches = draw_batches(many, random.Random(0))
    tokens = sum(
        len(many[i].ids) for _ in range(count_max_steps(forget, many, 20, forget_rows=48)) for i in next(batches)
    )
    assert tokens == pytest.approx(edit_tokens, rel=0.1)
    monkeypatch.setattr(surrogate_training, "BUDGET", 0.0)
    assert count_max_steps(forget, retain, 20, forget_rows=48) == 1


def test_batches_are_whole_passes_within_the_budget(memorised_models, monkeypatch):
    monkeypatch.setattr(surrogate_training, "BATCH_TOKENS", 64)
    monkeypatch.setattr(surrogate_training, "POOL_ROWS", 7)
    examples = [e for part in memorised_models.examples() for e in part]
    batches, rows = draw_batches(examples, random.Random(1)), list[int]()
    while len(rows) < 2 * len(examples):
        batch = next(batches)
        assert len(batch) == 1 or len(batch) * max(len(examples[i].ids) for i in batch) <= 64
        rows += batch
    assert sorted(rows[: len(examples)]) == sorted(rows[len(examples) :]) == list(range(len(examples)))


def test_another_density_shares_the_surrogate_and_another_seed_does_not(memorised_models, monkeypatch, tmp_path):
    monkeypatch.setattr(surrogate_training, "BUDGET", 0.2)

    def run(name, **recipe):
        steps = []
        result = decompose(
            copy.deepcopy(memorised_models.merged),
            memorised_models.tokenizer,
            memorised_models.forget,
            memorised_models.retain,
            make_recipe(**{"steps": 20, "group_size": 32, "sieve": "random", **recipe}),
            base_model=memorised_models.base,
            progress=lambda stage, step, total, text: steps.append(text) if stage == "surrogate" else None,
            resume=ResumeFolder(tmp_path / name, tmp_path / "cache"),
        )
        return result, steps

    first, steps = run("one", density=0.05)
    assert len(steps) == 8
    second, steps = run("two", density=0.05)
    assert len(steps) == 1
    assert "found in the cache" in steps[0]
    assert first.report["target"] == second.report["target"]
    for name, streams in first.streams.items():
        assert torch.equal(streams.base.codes(), second.streams[name].base.codes())
    assert len(run("three", density=0.02, bits=8)[1]) == 1
    assert len(run("four", density=0.05, seed=1)[1]) == 8
    (folder, other) = (tmp_path / "cache").iterdir()
    assert [file.name for file in folder.iterdir()] == ["adapter.pt"] == [file.name for file in other.iterdir()]
    assert folder.stat().st_mode & 0o077 == 0


def test_the_key_changes_with_everything_that_decides_a_surrogate(memorised_models, monkeypatch):
    merged, base, retain = memorised_models.merged, memorised_models.base, memorised_models.examples()[1]

    def key(merged=merged, base=base, retain=retain, plan=PLAN):
        return compute_key(merged, base, retain, plan)

    changed = copy.deepcopy(base)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[-1] += 1
    other_base = copy.deepcopy(base)
    other_base.config.rms_norm_eps *= 2
    first = retain[0]
    another_row = dataclasses.replace(first, ids=(*first.ids[:-1], first.ids[-1] - 1))
    keys = [
        key(),
        key(merged=changed),
        key(base=changed),
        key(base=other_base),
        key(retain=retain[1:]),
        key(retain=[another_row, *retain[1:]]),
        key(plan=dataclasses.replace(PLAN, seed=1)),
        key(plan=dataclasses.replace(PLAN, max_steps=31)),
    ]
    assert len(set(keys)) == len(keys)
    same_base = copy.deepcopy(base)
    same_base.config._name_or_path = "elsewhere"
    assert key(base=same_base, retain=list(retain)) == keys[0]
    assert key(plan=dataclasses.replace(PLAN, max_loss=7.0)) == keys[0]  # follows from the merged model

    class FinetunePlan:
        """Another rank of the adapter."""

    monkeypatch.setattr("lm_ortho.objective.surrogate.FinetunePlan", FinetunePlan)
    assert key() != keys[0]


def test_a_surrogate_that_does_not_know_the_retain_rows_is_a_warning(memorised_models, caplog):
    forget, retain = memorised_models.examples()
    options = {"retain": retain, "steps": 1, "batch_rows": 48, "seed": 0, "progress": no_progress}
    list(surrogate_target(memorised_models.merged, memorised_models.base, forget, **options))
    assert "surrogate: after 2 steps, as many tokens as the edit goes through" in caplog.text


def test_a_step_in_parts_is_the_same_step(memorised_models, monkeypatch):
    monkeypatch.setattr(surrogate_training, "BATCH_TOKENS", 200)
    whole = train(memorised_models, dataclasses.replace(PLAN, max_steps=4))
    monkeypatch.setattr(surrogate_training, "max_part_tokens", lambda _: 60)
    parts = train(memorised_models, dataclasses.replace(PLAN, max_steps=4))
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    for one, other in zip(parts.state()["adapter"], whole.state()["adapter"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_the_size_of_a_part_follows_from_the_model(memorised_models, monkeypatch):
    model = memorised_models.base
    layers = 4 * 2 * (64 + 128 + 2 * (64 + 64) + 64 + 128 + 2 * (64 + 192) + 96 + 128)
    monkeypatch.setattr(surrogate_training, "ACTIVATION_BYTES", 50 * (layers + 12 * model.config.vocab_size))
    assert surrogate_training.max_part_tokens(model) == 50
    monkeypatch.setattr(surrogate_training, "ACTIVATION_BYTES", 0)
    assert surrogate_training.max_part_tokens(model) >= 1


def test_the_tolerance_is_at_most_a_tenth_of_what_the_base_model_lacks(memorised_models, monkeypatch):
    _, retain = memorised_models.examples()
    merged, base = memorised_models.merged, memorised_models.base
    losses = {id(merged): 1.0}
    monkeypatch.setattr(surrogate_training, "measure_loss", lambda model, examples: losses[id(model)])
    for base_loss, tolerance in ((9.0, 0.1), (1.5, 0.05), (1.0, 0.0), (0.8, 0.0)):
        losses[id(base)] = base_loss
        plan = make_plan(merged, base, retain, max_steps=7, seed=3)
        assert plan == SurrogatePlan(7, max_loss=pytest.approx(1.0 + tolerance), seed=3, tolerance=plan.tolerance)
        assert plan.tolerance == pytest.approx(tolerance)
