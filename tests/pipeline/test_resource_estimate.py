"""The formulas of memory and time, checked against measurements and counts."""

from __future__ import annotations

import copy
import json
import logging
import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import lm_ortho.objective.distribution as distribution
import lm_ortho.objective.loss as objective
from lm_ortho.calibration import by_layer
from lm_ortho.config import count_sieve_steps, make_recipe
from lm_ortho.data.encoding import ANSWER, CONTEXT, Example
from lm_ortho.data.logits import selected_logits
from lm_ortho.finetune.train import FinetunePlan
from lm_ortho.layer import find_linear, get_dense_weights, patch
from lm_ortho.objective import GENTLE, LossWeights, Objective, batches, position_terms, surrogate_training, swap
from lm_ortho.pipeline import resource_estimate, workbench
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.pipeline.preparation import model_shape
from lm_ortho.pipeline.workbench import Workbench
from tests.support import tiny
from tests.support.paths import REPOSITORY
from tests.support.scripts import load_script

torch.set_num_threads(1)
MEASUREMENTS = sorted((REPOSITORY / "benchmarks/results").glob("*-scaling-*.json"))
SMALL = resource_estimate.llama_shape(
    hidden=64, intermediate=96, blocks=2, vocabulary=128, heads=4, kv_heads=2, tied=False
)


def test_the_numbers_are_those_of_the_rooms():
    assert (resource_estimate.FULL_VOCABULARY, resource_estimate.TOP_TOKENS) == (
        distribution.FULL_VOCABULARY,
        distribution.TOP_TOKENS,
    )
    assert resource_estimate.LARGE_MODEL_WEIGHTS == objective.LARGE
    assert resource_estimate.MAX_MOMENT_BYTES == by_layer.MOMENT_BYTES
    assert resource_estimate.SMALL_MOMENT_BYTES == by_layer.SMALL_MOMENT_BYTES
    assert resource_estimate.METRIC_ROWS == workbench.METRIC_ROWS
    assert (resource_estimate.CHUNK_PROBABILITIES, resource_estimate.PREDICTION_TOKENS) == (
        distribution.CHUNK_PROBABILITIES,
        distribution.BATCH_TOKENS,
    )
    assert LossWeights().forget_rows == make_recipe().batch_rows == resource_estimate.FORGET_ROWS
    assert resource_estimate.Rows(600, 3300, 25, 8).step_rows == (12, LossWeights().retain_rows)
    assert resource_estimate.ACTIVATION_BYTES == batches.ACTIVATION_BYTES
    assert (resource_estimate.PART_LOGITS, resource_estimate.CHUNK_LOGITS) == (
        batches.LOGITS,
        position_terms.CHUNK_LOGITS,
    )
    assert resource_estimate.OFFLOADED_BUDGETS == batches.OFFLOADED
    assert (resource_estimate.SURROGATE_TOKENS, resource_estimate.SURROGATE_BUDGET) == (
        surrogate_training.BATCH_TOKENS,
        surrogate_training.BUDGET,
    )
    assert FinetunePlan(steps=1).rank == resource_estimate.SURROGATE_RANK
    assert (resource_estimate.SWAPPED_NAMES, resource_estimate.NAME_TRIALS) == (swap.SUBJECTS, 8 * swap.SUBJECTS)


def test_a_shape_from_numbers_is_that_of_the_model():
    model = tiny.llama()
    shape = model_shape(model, find_linear(model))
    assert sorted(shape.layers) == sorted(SMALL.layers)
    assert shape.parameters == SMALL.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.vocabulary, shape.hidden, shape.blocks) == (128, 64, 2)
    assert shape.has_small_moments is by_layer.InputMoments(model, find_linear(model), []).are_small is True
    assert (
        resource_estimate.llama_shape(
            hidden=2048, intermediate=5632, blocks=22, vocabulary=32000, heads=32, kv_heads=4, tied=False
        ).parameters
        == 1_100_048_384
    )  # TinyLlama's own count


rows = st.builds(
    resource_estimate.Rows, st.integers(1, 5000), st.integers(1, 5000), st.floats(2, 500), st.floats(1, 100)
)


@given(rows, st.integers(1, 8), st.booleans(), st.booleans())
def test_settings_that_save_memory_never_save_time(sample_rows, groups, half, recompute):
    shape = resource_estimate.llama_shape(
        hidden=512, intermediate=1408, blocks=16, vocabulary=32000, heads=8, kv_heads=2, tied=False
    )
    default = make_recipe()
    saving = make_recipe(groups=groups, states="bfloat16" if half else "float32", recompute=recompute)
    for with_base in (False, True):
        more, less = (
            resource_estimate.estimate_memory(shape, sample_rows, recipe, with_base) for recipe in (default, saving)
        )
        assert all(less[stage] <= more[stage] * (1 + 1e-9) for stage in more)
        fast, slow = (
            resource_estimate.estimate_operations(shape, sample_rows, recipe, with_base) for recipe in (default, saving)
        )
        assert all(slow[stage] >= fast[stage] for stage in fast)
    assert (
        resource_estimate.estimate_memory(shape, sample_rows, default, True)["edit"]
        > resource_estimate.estimate_memory(shape, sample_rows, default, False)["edit"]
    )


@pytest.mark.parametrize("path", MEASUREMENTS, ids=lambda path: path.stem)
def test_the_formula_is_near_the_measurement(path):
    """The estimate is within a fifth of the measured peak; earlier records are those of the memory above the start."""
    record = json.loads(path.read_text())
    benchmark = load_script(REPOSITORY / "benchmarks/scaling.py")
    with_base = " --base" in record["command"]
    words = record["command"].replace(" --recompute", "").replace(" --base", "").split()[2:]
    options = dict(zip(*[iter(words)] * 2, strict=True))
    numbers = benchmark.SHAPES[options["--shape"]]
    recipe = make_recipe(
        steps=int(options["--steps"]),
        groups=int(options["--groups"]),
        states=options["--states"],
        recompute="--recompute" in record["command"],
    )
    shape = resource_estimate.llama_shape(**numbers, tied=options["--shape"] in benchmark.TIED)
    tokens = benchmark.QUESTION + benchmark.ANSWER + 4
    rows = resource_estimate.Rows(int(options["--forget"]), int(options["--retain"]), tokens, benchmark.ANSWER + 1)
    overhead = 1e9 * record.get("overhead_gb", 0.0)
    peak = max(resource_estimate.estimate_memory(shape, rows, recipe, with_base, overhead).values()) / 1e9
    assert peak == pytest.approx(max(record["peak_gb"].values()), rel=0.2)
    if "forecast" in record:  # what the decomposition printed before it started
        printed = float(record["forecast"].split()[1])
        assert printed == pytest.approx(max(record["peak_gb"].values()), rel=0.2)
    assert record["parameters"] == shape.parameters


def count_operations(compute):
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


def test_the_operations_of_a_step_are_those_of_a_counter():
    """Rows of one length, so that nothing is padding; the first layers need no gradient of their inputs."""
    model = tiny.llama(num_hidden_layers=6, vocab_size=500, num_key_value_heads=4).requires_grad_(False)
    model.set_attn_implementation("eager")  # the counter does not know the fused attention of CPUs
    layers, generator = find_linear(model), torch.Generator().manual_seed(0)
    examples = [
        Example(tuple(torch.randint(2, 500, (20,), generator=generator).tolist()), (CONTEXT,) * 12 + (ANSWER,) * 8)
        for _ in range(16)
    ]
    forget, retain = examples[:6], examples[6:]
    shape, rows = model_shape(model, layers), resource_estimate.Rows(6, 10, tokens=20, answer=8, batch_rows=2)
    recipe = make_recipe(steps=10, density=0.01)
    expected = resource_estimate.estimate_operations(shape, rows, recipe, base_known=False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    target = distribution.stack(forget, [torch.full((8, 500), 1 / 500)] * 6)
    with selected_logits(model):
        objective = Objective(
            model,
            layers,
            target,
            forget=forget,
            retain=retain,
            penalty=GENTLE,
            weights=LossWeights(forget_rows=2),
            seed=0,
        )
        one_step = expected["attribution"] / count_sieve_steps(recipe.steps)
        assert count_operations(objective.gradients) == pytest.approx(one_step, rel=0.05)
        positions = {name: torch.arange(0, layer.weight.numel(), 100) for name, layer in layers.items()}
        with objective.restrict_to_support(positions):
            assert count_operations(objective.gradients) == pytest.approx(expected["edit"] / 10, rel=0.05)
    # The surrogate: one step, in one part.
    plan = surrogate_training.SurrogatePlan(max_steps=2, max_loss=0.0, seed=0)
    training = surrogate_training.SurrogateTraining(model.requires_grad_(False), retain, plan)
    with selected_logits(training.model):
        operations = count_operations(lambda: training._add_gradients(retain, "cpu"))
    one_step = resource_estimate.estimate_surrogate_operations(shape, rows, tokens=20 * len(retain))
    assert operations == pytest.approx(one_step, rel=0.05)


def test_the_estimate_is_reported_before_anything_is_computed(memorised_models, caplog, monkeypatch):
    reports = []

    def start_workbench():
        workbench = Workbench(
            memorised_models.merged,
            memorised_models.tokenizer,
            memorised_models.forget,
            memorised_models.retain,
            recipe=make_recipe(sieve="random"),
            progress=lambda *step: reports.append(step),
        )
        with caplog.at_level(logging.WARNING), workbench:
            return caplog.text

    assert "are available" not in start_workbench()
    assert reports[0][0] == "memory"
    assert re.fullmatch(
        r"about [0-9.]+ GB at the peak \([a-z ]+\); work: about [0-9.]+e\+[0-9]+ operations", reports[0][3]
    )
    monkeypatch.setattr(resource_estimate, "estimate_memory", lambda *_: {"edit": 1e15})
    assert "edit needs about 1000000 GB and" in start_workbench()
    assert "groups=2 or more need less" in caplog.text


def test_an_offloaded_model_needs_memory_for_its_larger_parts():
    """With a large vocabulary, the logits of a part are most of what is on the device."""
    shape = resource_estimate.llama_shape(
        hidden=256, intermediate=512, blocks=4, vocabulary=100_000, heads=4, kv_heads=2, tied=True
    )
    rows = resource_estimate.Rows(600, 3300, tokens=100, answer=50)
    logits = batches.OFFLOADED * batches.LOGITS  # fewer than those of all tokens of a step
    assert resource_estimate.estimate_device_memory(shape, rows, base_known=False) > 8 * logits


def test_the_table_of_the_page_is_that_of_the_script():
    script = load_script(REPOSITORY / "scripts/scaling_table.py")
    page = (REPOSITORY / "docs/scaling.md").read_text()
    assert page.split(script.BEGIN)[1].split(script.END)[0].strip() == script.make_table()


def test_a_random_model_of_the_benchmark(capsys, tmp_path, monkeypatch):
    benchmark = load_script(REPOSITORY / "benchmarks/scaling.py")
    monkeypatch.setattr(sys, "argv", f"x --shape tiny --forget 4 --retain 8 --steps 10 --out {tmp_path}".split())
    benchmark.main()
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record == json.loads(capsys.readouterr().out)
    assert record["density_reached"] == pytest.approx(0.02, rel=1e-3)
    assert set(record["seconds_per_step"]) == {"attribution", "edit"}
    assert all(value > 0 for value in record["seconds_per_step"].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("with_base", [False, True])
def test_a_model_on_a_gpu_is_decomposed_there(memorised_models, with_base):
    model = copy.deepcopy(memorised_models.merged).cuda()
    base = copy.deepcopy(memorised_models.base).cuda() if with_base else None
    decomposition = decompose(
        model,
        memorised_models.tokenizer,
        memorised_models.forget,
        memorised_models.retain,
        make_recipe(steps=20, density=0.05, group_size=32),
        base_model=base,
    )
    assert decomposition.report["steps_moved"] > 0
    weights = {name: layer.weight.detach().cpu() for name, layer in find_linear(memorised_models.merged).items()}
    for name, layer in find_linear(model).items():
        assert torch.equal(layer.weight.cpu(), weights[name])
    for name, streams in decomposition.streams.items():
        on = streams.ortho.support()
        bound = 2**-8 * (weights[name] - streams.base.dequantise()).abs()[on] + 1e-12
        assert ((streams.to_dense(1.0) - weights[name]).abs()[on] <= bound).all()
    patch(model, decomposition.streams)
    assert tiny.logits(get_dense_weights(memorised_models.merged, decomposition.streams, 0.0)).isfinite().all()
