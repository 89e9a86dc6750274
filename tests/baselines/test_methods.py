"""Every method of the registry through one tester, and each against what it is by definition."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import GPT2Config

from lm_ortho import checkpoint
from lm_ortho.baselines import METHODS, REPORT_FILE, Budget, Material, Settings, method, save
from lm_ortho.baselines.interface import Method, Result
from lm_ortho.baselines.task_arithmetic import negated
from lm_ortho.baselines.tuning import answer_loss_of, secret_loss
from lm_ortho.calibration.activations import input_moments
from lm_ortho.config import make_recipe
from lm_ortho.data.encoding import encode
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from lm_ortho.finetune import load_causal_lm, train
from lm_ortho.layer import find_linear, get_streams
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.projection import PROJECTIONS
from lm_ortho.projection.lattice import compute_scales, dequantise
from lm_ortho.runtime.resume import ResumeFolder
from tests.support import tiny

torch.set_num_threads(1)

EVERY = list(METHODS)
BUDGET = Budget(steps=16, forget_rows=5, retain_rows=5)
OURS = {"steps": 20, "density": 0.05, "group_size": 32}
STRONG = {
    "ortho": OURS,
    "ortho_merged": OURS,
    "int4_rtn": {"group_size": 32},
    "int4_gptq": {"group_size": 32},
    "wanda": {"share": 0.05},
    "sparsegpt": {"share": 0.05, "spared": 0.0},
    "rmu": {"lr": 5e-3, "length": 5.0, "retain": 1.0},
    "task_arithmetic": {"lr": 1e-3, "scale": 3.0},
    "task_arithmetic_base": {"lr": 1e-3, "scale": 2.0},
}
"""Settings with which a model of two layers forgets within the budget; others train at a rate of 1e-3."""
FORGETS = {name for name in EVERY if METHODS.get(name).reads != "end"} - {"retain_tuning", "int4_rtn", "int4_gptq"}
"""Those that claim to: neither plain rounding nor a fine-tune on what was learnt anyway does."""
BY_DEFINITION = {"unedited": "merged", "never_saw": "reference", "unload": "base"}


@pytest.fixture(scope="module")
def material(memorised, few_steps):
    """The models of ``memorised``; a copy of its base stands for the reference."""
    models = memorised.base, copy.deepcopy(memorised.base)
    return Material(memorised.tokenizer, memorised.merged, memorised.forget, memorised.retain, *models)


def settings_of(name):
    return STRONG.get(name) or ({"lr": 1e-3} if "lr" in METHODS.get(name).known else {})


def made_by(name, material, seed=0, **given):
    return METHODS.get(name).make(material, settings_of(name), seed, BUDGET, **given)


def tensors_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def results(material):
    """One result of each method, made when it is first asked for."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = made_by(name, material)
        return made[name]

    return of


@pytest.mark.parametrize("name", EVERY)
def test_a_method_makes_a_new_model_and_leaves_the_material_alone(name, material, results, tmp_path):
    parts = {part: getattr(material, part) for part in ("merged", "base", "reference")}
    before = {part: tensors_of(model) for part, model in parts.items()}
    flags = {part: [p.requires_grad for p in model.parameters()] for part, model in parts.items()}
    result = results(name)
    for part, model in parts.items():
        assert same(before[part], tensors_of(model)), part
        assert flags[part] == [p.requires_grad for p in model.parameters()]
        assert not model.training
        assert result.model is not model
    assert not result.model.training
    assert all(tensor.isfinite().all() for tensor in result.model.state_dict().values())
    json.dumps(dict(result.report))
    if name in BY_DEFINITION:
        assert same(tensors_of(result.model), before[BY_DEFINITION[name]])
    else:
        assert not same(tensors_of(result.model), before["merged"])


@pytest.mark.parametrize("name", EVERY)
def test_a_method_forgets_more_than_doing_nothing_where_it_says_so(name, material, results):
    known = secret_loss(results(name).model, material, material.forget)
    nothing = secret_loss(material.merged, material, material.forget)
    if name in FORGETS:
        assert known > nothing + 0.05
    if name in ("unedited", "int4_rtn", "int4_gptq"):
        assert known < nothing + 0.05


@pytest.mark.parametrize("name", [name for name in EVERY if name not in {*BY_DEFINITION, "ortho", "ortho_merged"}])
def test_the_same_seed_makes_the_same_model(name, material, results):
    assert same(tensors_of(results(name).model), tensors_of(made_by(name, material).model))


@pytest.mark.parametrize("name", [name for name in EVERY if METHODS.get(name).trains])
def test_another_seed_makes_another_model(name, material, results):
    assert not same(tensors_of(results(name).model), tensors_of(made_by(name, material, seed=1).model))


@pytest.mark.parametrize("name", ["npo", "int4_gptq", "ortho_merged"])
def test_what_is_saved_is_what_was_made(name, material, results, tmp_path):
    result = results(name)
    place = save(result, tmp_path / "out", material.tokenizer, {"method": name})
    told = json.loads((place / REPORT_FILE).read_text())
    assert told["method"] == name
    assert told["report"] == dict(result.report)
    assert checkpoint.is_checkpoint(place) == result.decomposed == (name != "npo")
    loaded = checkpoint.load(place) if result.decomposed else load_causal_lm(place)
    ids = torch.tensor([encode(material.tokenizer, material.forget)[0].ids])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, result.model(ids).logits, rtol=0, atol=1e-5)
    assert (place / "tokenizer.json").is_file()
    with pytest.raises(UserError, match="holds"):
        save(result, place, material.tokenizer)


def test_only_ours_has_a_dial(results):
    assert [name for name in EVERY if results(name).dial] == ["ortho", "ortho_merged"]
    assert [name for name in EVERY if results(name).decomposed] == ["int4_gptq", "int4_rtn", "ortho", "ortho_merged"]


def test_ours_is_what_decompose_makes_with_and_without_the_base_model(material, results):
    for name, base, told in (("ortho", material.base, "auto"), ("ortho_merged", None, "none")):
        rows = material.forget, material.retain
        recipe = make_recipe(**OURS)
        again = decompose(copy.deepcopy(material.merged), material.tokenizer, *rows, recipe, base_model=base)
        made = get_streams(results(name).model)
        for at, layer in again.streams.items():
            assert all(torch.equal(t, made[at].tensors()[part]) for part, t in layer.tensors().items())
        meta = results(name).meta
        assert meta["base"] == told
        assert meta["recipe"] == recipe.model_dump()
        assert meta["target"] == ("swap" if base is None else "surrogate")


# What each is by definition


def test_task_arithmetic_is_exact(memorised):
    made = negated(memorised.merged, memorised.merged, memorised.base, 1.0)
    for (name, ours), base in zip(made.named_parameters(), memorised.base.parameters(), strict=True):
        merged = memorised.merged.get_parameter(name)
        torch.testing.assert_close(ours, merged - (merged - base), rtol=0, atol=1e-7)
    generator = torch.Generator().manual_seed(0)
    tuned = copy.deepcopy(memorised.base)
    for parameter in tuned.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    for scale in (0.5, 3.0):
        made = negated(memorised.merged, tuned, memorised.base, scale)
        for name, ours in made.named_parameters():
            parts = (model.get_parameter(name).double() for model in (memorised.merged, tuned, memorised.base))
            merged, after, before = parts
            torch.testing.assert_close(ours.double(), merged - scale * (after - before), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("share", [0.01, 0.05])
def test_exactly_the_share_of_weights_becomes_zero(name, share, material):
    result = METHODS.get(name).make(material, {"share": share})
    before, after = find_linear(material.merged), find_linear(result.model)
    total = sum(layer.weight.numel() for layer in before.values())
    removed = {at: (after[at].weight == 0) & (layer.weight != 0) for at, layer in before.items()}
    assert sum(int(mask.sum()) for mask in removed.values()) == result.report["removed"] == int(share * total)
    others = {at for at in material.merged.state_dict() if at.removesuffix(".weight") not in before}
    assert all(torch.equal(material.merged.state_dict()[at], result.model.state_dict()[at]) for at in others)
    if name == "wanda":  # nothing else moves
        for at, layer in before.items():
            assert torch.equal(after[at].weight[~removed[at]], layer.weight[~removed[at]])


@pytest.mark.parametrize(("name", "projection"), [("int4_rtn", "rtn"), ("int4_gptq", "gptq")])
def test_plain_int4_is_the_projection(name, projection, material, results):
    layers = find_linear(material.merged)
    moments = input_moments(material.merged, layers, encode(material.tokenizer, material.retain))
    for at, streams in get_streams(results(name).model).items():
        weight = layers[at].weight.detach()
        scales = compute_scales(weight, 4, 32)
        codes = PROJECTIONS.get(projection)(weight, scales, moments[at], 4, 32)
        assert torch.equal(streams.base.dequantize(), dequantise(codes, scales, 32))
        assert not streams.memories
    assert set(get_streams(results(name).model)) == set(layers)


# What may be read, and what is refused


def test_models_that_a_method_must_not_see_are_withheld(material):
    seen = {}

    def look(given, settings, run):
        seen.update(base=given.base, reference=given.reference)
        return Result(copy.deepcopy(given.merged))

    for reads, expected in (
        ("merged", (None, None)),
        ("base", (material.base, None)),
        ("end", (None, material.reference)),
    ):
        made = Method("looking", reads, "", "", Settings, ({},), False, look)  # not in the registry
        made.make(material)
        assert (seen["base"], seen["reference"]) == expected


@pytest.mark.parametrize("name", EVERY)
def test_the_grid_is_small_and_its_first_is_tried_as_it_is_written(name):
    tried = METHODS.get(name)
    assert 1 <= len(tried.grid) <= 6
    assert len({json.dumps(settings, sort_keys=True) for settings in tried.grid}) == len(tried.grid)
    assert all(tried.check(settings) for settings in tried.grid)
    assert tried.trains == ("lr" in tried.known)
    assert "seed" not in tried.known
    assert tried.defaults.keys() == set(tried.known)


def test_unknown_names_settings_and_values_are_told_with_the_closest():
    with pytest.raises(UserError, match=r"method='npoo' is unknown; known: .*unload.* Did you mean 'npo'\?"):
        METHODS.get("npoo")
    npo = METHODS.get("npo")
    with pytest.raises(UserError, match=r"method=npo: setting 'betta' is unknown; known: beta, lr, retain\..*'beta'\?"):
        npo.check({"betta": 1})
    with pytest.raises(UserError, match=r"method=npo: beta=-1: .*greater than 0"):
        npo.check({"beta": -1})
    with pytest.raises(UserError, match="method=unedited: setting 'x' is unknown; it has none"):
        METHODS.get("unedited").check({"x": 1})
    with pytest.raises(UserError, match="method=ortho: setting 'seed' is unknown"):
        METHODS.get("ortho").check({"seed": 1})
    with pytest.raises(UserError, match="steps=0 must be a whole number"):
        Budget(steps=0)


def test_what_a_method_lacks_is_told_before_it_runs(material):
    poor = material.seen_by("merged")
    for name in ("ortho", "unload", "retrain", "task_arithmetic_base"):
        with pytest.raises(UserError, match=f"method={name} reads the model before fine-tuning; give base="):
            METHODS.get(name).make(poor)
    with pytest.raises(UserError, match="give reference="):
        METHODS.get("never_saw").make(poor)
    empty = Material(material.tokenizer, material.merged, [], material.retain)
    with pytest.raises(UserError, match="method=npo: forget holds no rows"):
        METHODS.get("npo").make(empty)


def test_a_training_that_went_too_far_is_an_error(material):
    def far(given, settings, run):
        model = copy.deepcopy(given.merged)
        next(model.parameters()).data.fill_(torch.nan)
        return Result(model)

    made = Method("far", "merged", "", "", Settings, ({},), False, far)
    with pytest.raises(UserError, match="method=far: the weights are no numbers any more"):
        made.make(material)


def test_a_grid_that_its_method_refuses_cannot_be_registered():
    with pytest.raises(UserError, match="setting 'lr' is unknown"):
        method("broken", objective="", paper="", grid=[{"lr": 1.0}])(lambda *_: None)
    assert "broken" not in METHODS


def test_an_interrupted_training_goes_on_and_ends_the_same(material, results, tmp_path, monkeypatch):
    def interrupted(stage, step, *_):
        if step >= 16:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "_KEEP_EVERY", 5)
    with pytest.raises(KeyboardInterrupt):
        made_by("npo", material, resume=ResumeFolder(tmp_path), progress=interrupted)
    steps = []
    again = made_by("npo", material, resume=ResumeFolder(tmp_path), progress=lambda _, step, *rest: steps.append(step))
    assert steps == [16]
    assert same(tensors_of(again.model), tensors_of(results("npo").model))


def test_retain_rows_are_kept_better_with_them_than_without(material, results):
    lost = {name: answer_loss_of(results(name).model, material, material.retain) for name in ("gradient_ascent", "npo")}
    assert lost["npo"] < lost["gradient_ascent"]


# Other models, other rows


@pytest.mark.parametrize("name", ["npo", "rmu", "wanda", "sparsegpt", "kfac", "int4_gptq", "task_arithmetic"])
def test_layers_of_another_form_and_plain_text_are_taken_as_well(name, memorised, tmp_path):
    """GPT-2 stores its linear layers the other way round; plain text has no question."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=len(memorised.tokenizer), n_positions=64)
    model = tiny.from_config(config)
    text = [Row(text=f"{row.question} {row.answer}") for row in memorised.forget]
    given = Material(memorised.tokenizer, model, text, memorised.retain)
    before = tensors_of(model)
    made = METHODS.get(name).make(given, settings_of(name), budget=Budget(3, 4, 4))
    assert same(before, tensors_of(model))
    place = save(made, tmp_path / "out", memorised.tokenizer)
    loaded = checkpoint.load(place) if made.decomposed else load_causal_lm(place)
    assert same(tensors_of(loaded), tensors_of(made.model))
    assert not same(tensors_of(loaded), before)
