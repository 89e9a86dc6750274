"""The formulas of memory and time, against measurements and against counting."""

from __future__ import annotations

import copy
import importlib.util
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
from lm_ortho.pipeline.workbench import Workbench, _shape
from tests.support import tiny
from tests.support.paths import REPOSITORY

torch.set_num_threads(1)
MEASURED = sorted((REPOSITORY / "benchmarks/results").glob("*-scaling-*.json"))
SMALL = resource_estimate.llama(64, 96, 2, 128, 4, 2, tied=False)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_the_numbers_are_those_of_the_rooms():
    assert (resource_estimate.WHOLE, resource_estimate.KEPT) == (distribution.WHOLE, distribution.KEPT)
    assert resource_estimate.LARGE == objective.LARGE
    assert resource_estimate.MOMENTS == by_layer.MOMENT_BYTES
    assert (LossWeights().forget_rows, LossWeights().retain_rows) == (
        resource_estimate.FORGET_ROWS,
        resource_estimate.RETAIN_ROWS,
    )
    assert resource_estimate.SURROGATE_STEPS == surrogate.STEPS


def test_a_shape_from_numbers_is_that_of_the_model():
    model = tiny.llama()
    found = _shape(model, find_linear(model))
    assert sorted(found.layers) == sorted(SMALL.layers)
    assert found.parameters == SMALL.parameters == sum(p.numel() for p in model.parameters())
    assert (found.vocabulary, found.hidden, found.blocks) == (128, 64, 2)
    assert (
        resource_estimate.llama(2048, 5632, 22, 32000, 32, 4, tied=False).parameters == 1_100_048_384
    )  # TinyLlama's own count


rows = st.builds(
    resource_estimate.Rows, st.integers(1, 5000), st.integers(1, 5000), st.floats(2, 500), st.floats(1, 100)
)


@given(rows, st.integers(1, 8), st.booleans(), st.booleans())
def test_what_needs_less_memory_never_needs_less_time(given_rows, groups, half, recompute):
    shape = resource_estimate.llama(512, 1408, 16, 32000, 8, 2, tied=False)
    usual = make_recipe()
    lean = make_recipe(groups=groups, states="bfloat16" if half else "float32", recompute=recompute)
    for known in (False, True):
        more, less = (resource_estimate.memory(shape, given_rows, recipe, known) for recipe in (usual, lean))
        assert all(less[stage] <= more[stage] * (1 + 1e-9) for stage in more)
        fast, slow = (resource_estimate.work(shape, given_rows, recipe, known) for recipe in (usual, lean))
        assert all(slow[stage] >= fast[stage] for stage in fast)
    assert (
        resource_estimate.memory(shape, given_rows, usual, True)["edit"]
        > resource_estimate.memory(shape, given_rows, usual, False)["edit"]
    )


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_the_formula_is_near_what_was_measured(path):
    """Within a quarter of the highest memory that the process took more than at its start."""
    found = json.loads(path.read_text())
    bench = load(REPOSITORY / "benchmarks/scaling.py")
    options = dict(zip(*[iter(found["command"].replace(" --recompute", "").split()[2:])] * 2, strict=True))
    numbers = bench.SHAPES[options["--shape"]]
    recipe = make_recipe(
        steps=int(options["--steps"]), groups=int(options["--groups"]), states=options["--states"],
        recompute="--recompute" in found["command"],
    )  # fmt: skip
    shape = resource_estimate.llama(**numbers, tied=False)
    tokens = bench.QUESTION + bench.ANSWER + 4
    asked = resource_estimate.Rows(int(options["--forget"]), int(options["--retain"]), tokens, bench.ANSWER + 1)
    peak = max(resource_estimate.memory(shape, asked, recipe, False).values()) / 1e9
    assert peak == pytest.approx(max(found["peak_gb"].values()), rel=0.25)
    assert found["parameters"] == shape.parameters


def test_it_is_said_before_anything_is_computed(memorised, caplog, monkeypatch):
    told = []

    def started():
        given = memorised.merged, memorised.tokenizer, memorised.forget, memorised.retain, make_recipe(sieve="random")
        with caplog.at_level(logging.WARNING), Workbench(*given, progress=lambda *step: told.append(step)):
            return caplog.text

    assert "are there" not in started()
    assert told[0][0] == "memory"
    assert "GB at the peak" in told[0][3]
    monkeypatch.setattr(resource_estimate, "memory", lambda *_: {"edit": 1e15})
    assert "edit needs about 1000000 GB and" in started()
    assert "groups=2 or more need less" in caplog.text


def test_the_table_of_the_page_is_that_of_the_script():
    script = load(REPOSITORY / "scripts/scaling_table.py")
    page = (REPOSITORY / "docs/scaling.md").read_text()
    assert page.split(script.BEGIN)[1].split(script.END)[0].strip() == script.table()


def test_a_random_model_of_the_benchmark(capsys, tmp_path, monkeypatch):
    bench = load(REPOSITORY / "benchmarks/scaling.py")
    monkeypatch.setattr(sys, "argv", f"x --shape tiny --forget 4 --retain 8 --steps 10 --out {tmp_path}".split())
    bench.main()
    (made,) = tmp_path.glob("*.json")
    found = json.loads(made.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert found["density_reached"] == pytest.approx(0.01, rel=1e-3)
    assert set(found["seconds_per_step"]) == {"attribution", "edit"}
    assert all(value > 0 for value in found["seconds_per_step"].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("known", [False, True])
def test_a_model_on_a_gpu_is_decomposed_there(memorised, known):
    model = copy.deepcopy(memorised.merged).cuda()
    base = copy.deepcopy(memorised.base).cuda() if known else None
    made = decompose(
        model, memorised.tokenizer, memorised.forget, memorised.retain,
        make_recipe(steps=20, density=0.05, group_size=32), base_model=base,
    )  # fmt: skip
    assert made.report["steps_moved"] > 0
    weights = {name: layer.weight.detach().cpu() for name, layer in find_linear(memorised.merged).items()}
    for name, layer in find_linear(model).items():
        assert torch.equal(layer.weight.cpu(), weights[name])
    for name, streams in made.streams.items():
        on = streams.ortho.support()
        bound = 2**-8 * (weights[name] - streams.base.dequantize()).abs()[on] + 1e-12
        assert ((streams.dense(1.0) - weights[name]).abs()[on] <= bound).all()
    patch(model, made.streams)
    assert tiny.logits(get_dense_weights(memorised.merged, made.streams, 0.0)).isfinite().all()
