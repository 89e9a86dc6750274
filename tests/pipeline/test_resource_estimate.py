"""The formulas of memory and time, checked against measurements and counts."""

from __future__ import annotations

import copy
import json
import logging
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lm_ortho.objective.distribution as distribution
import lm_ortho.objective.loss as objective
from lm_ortho.calibration import by_layer
from lm_ortho.config import make_recipe
from lm_ortho.layer import find_linear, get_dense_weights, patch
from lm_ortho.objective import LossWeights, surrogate
from lm_ortho.pipeline import resource_estimate
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
    assert (LossWeights().forget_rows, LossWeights().retain_rows) == (
        resource_estimate.FORGET_ROWS,
        resource_estimate.RETAIN_ROWS,
    )
    assert resource_estimate.SURROGATE_STEPS == surrogate.STEPS


def test_a_shape_from_numbers_is_that_of_the_model():
    model = tiny.llama()
    shape = model_shape(model, find_linear(model))
    assert sorted(shape.layers) == sorted(SMALL.layers)
    assert shape.parameters == SMALL.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.vocabulary, shape.hidden, shape.blocks) == (128, 64, 2)
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
    """The estimate is within a quarter of the measured peak above the memory at the start of the process."""
    record = json.loads(path.read_text())
    benchmark = load_script(REPOSITORY / "benchmarks/scaling.py")
    options = dict(zip(*[iter(record["command"].replace(" --recompute", "").split()[2:])] * 2, strict=True))
    numbers = benchmark.SHAPES[options["--shape"]]
    recipe = make_recipe(
        steps=int(options["--steps"]),
        groups=int(options["--groups"]),
        states=options["--states"],
        recompute="--recompute" in record["command"],
    )
    shape = resource_estimate.llama_shape(**numbers, tied=False)
    tokens = benchmark.QUESTION + benchmark.ANSWER + 4
    rows = resource_estimate.Rows(int(options["--forget"]), int(options["--retain"]), tokens, benchmark.ANSWER + 1)
    peak = max(resource_estimate.estimate_memory(shape, rows, recipe, False).values()) / 1e9
    assert peak == pytest.approx(max(record["peak_gb"].values()), rel=0.25)
    assert record["parameters"] == shape.parameters


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
    assert "GB at the peak" in reports[0][3]
    monkeypatch.setattr(resource_estimate, "estimate_memory", lambda *_: {"edit": 1e15})
    assert "edit needs about 1000000 GB and" in start_workbench()
    assert "groups=2 or more need less" in caplog.text


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
    assert record["density_reached"] == pytest.approx(0.01, rel=1e-3)
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
