"""Every method of the registry through one tester, and each against what it is by definition."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config

from lm_ortho import checkpoint
from lm_ortho.baselines import METHODS, REPORT_FILE, Budget, Material, Settings, method, save, training
from lm_ortho.baselines.interface import Method, Result
from lm_ortho.baselines.task_arithmetic import subtract_task_vector
from lm_ortho.baselines.tuning import answer_loss, secret_loss
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

NAMES = list(METHODS)
BUDGET = Budget(steps=16, forget_rows=5, retain_rows=5)
RECIPE = {"steps": 20, "density": 0.05, "group_size": 32}
STRONG = {
    "ortho": RECIPE,
    "ortho_merged": RECIPE,
    "int4_rtn": {"group_size": 32},
    "int4_gptq": {"group_size": 32},
    "wanda": {"share": 0.05},
    "sparsegpt": {"share": 0.05, "spared": 0.0},
    "rmu": {"lr": 5e-3, "length": 5.0, "retain": 1.0},
    "repselect": {"length": 0.05, "directions": 8},
    "altpo": {"lr": 1e-3, "answers": 2},
    "altpo_base": {"lr": 1e-3, "answers": 2},
    "task_arithmetic": {"lr": 1e-3, "scale": 3.0},
    "task_arithmetic_base": {"lr": 1e-3, "scale": 2.0},
}
"""Settings with which a model of two layers forgets within the budget; others train at a rate of 1e-3."""
FORGETS = {name for name in NAMES if METHODS.get(name).reads != "end"} - {"retain_tuning", "int4_rtn", "int4_gptq"}
"""Methods that claim to forget; plain rounding and a fine-tune on the retain rows do not."""
BY_DEFINITION = {"unedited": "merged", "never_saw": "reference", "unload": "base"}


@pytest.fixture(scope="module")
def material(memorised_models, short_surrogate_training):
    """The models of ``memorised_models``; a copy of its base stands for the reference."""
    return Material(
        memorised_models.tokenizer,
        memorised_models.merged,
        memorised_models.forget,
        memorised_models.retain,
        base=memorised_models.base,
        reference=copy.deepcopy(memorised_models.base),
    )


def forgetting_settings(name):
    return STRONG.get(name) or ({"lr": 1e-3} if "lr" in METHODS.get(name).setting_names else {})


def make_result(name, material, seed=0, **options):
    return METHODS.get(name).make(material, forgetting_settings(name), seed=seed, budget=BUDGET, **options)


def copy_tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def are_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def results(material):
    """One result of each method, made when it is first requested."""
    cache = {}

    def get_result(name):
        if name not in cache:
            cache[name] = make_result(name, material)
        return cache[name]

    return get_result


@pytest.mark.parametrize("name", NAMES)
def test_a_method_makes_a_new_model_and_leaves_the_material_alone(name, material, results, tmp_path):
    parts = {part: getattr(material, part) for part in ("merged", "base", "reference")}
    before = {part: copy_tensors(model) for part, model in parts.items()}
    flags = {part: [p.requires_grad for p in model.parameters()] for part, model in parts.items()}
    result = results(name)
    for part, model in parts.items():
        assert are_equal(before[part], copy_tensors(model)), part
        assert flags[part] == [p.requires_grad for p in model.parameters()]
        assert not model.training
        assert result.model is not model
    assert not result.model.training
    assert all(tensor.isfinite().all() for tensor in result.model.state_dict().values())
    json.dumps(dict(result.report))
    if name in BY_DEFINITION:
        assert are_equal(copy_tensors(result.model), before[BY_DEFINITION[name]])
    else:
        assert not are_equal(copy_tensors(result.model), before["merged"])


@pytest.mark.parametrize("name", NAMES)
def test_a_method_that_claims_to_forget_raises_the_loss_of_the_forget_set(name, material, results):
    after = secret_loss(results(name).model, material, material.forget)
    before = secret_loss(material.merged, material, material.forget)
    if name in FORGETS:
        assert after > before + 0.05
    if name in ("unedited", "int4_rtn", "int4_gptq"):
        assert after < before + 0.05


@pytest.mark.parametrize("name", [name for name in NAMES if name not in {*BY_DEFINITION, "ortho", "ortho_merged"}])
def test_the_same_seed_makes_the_same_model(name, material, results):
    assert are_equal(copy_tensors(results(name).model), copy_tensors(make_result(name, material).model))


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS.get(name).trains])
def test_another_seed_makes_another_model(name, material, results):
    assert not are_equal(copy_tensors(results(name).model), copy_tensors(make_result(name, material, seed=1).model))


@pytest.mark.parametrize("name", ["npo", "int4_gptq", "ortho_merged"])
def test_a_saved_model_equals_the_result(name, material, results, tmp_path):
    result = results(name)
    place = save(result, tmp_path / "out", material.tokenizer, {"method": name})
    metadata = json.loads((place / REPORT_FILE).read_text())
    assert metadata["method"] == name
    assert metadata["report"] == dict(result.report)
    assert checkpoint.is_checkpoint(place) == result.is_decomposed == (name != "npo")
    loaded = checkpoint.load(place) if result.is_decomposed else load_causal_lm(place)
    ids = torch.tensor([encode(material.tokenizer, material.forget)[0].ids])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, result.model(ids).logits, rtol=0, atol=1e-5)
    assert (place / "tokenizer.json").is_file()
    with pytest.raises(UserError, match="holds"):
        save(result, place, material.tokenizer)


def test_only_ortho_methods_have_an_alpha(results):
    assert [name for name in NAMES if results(name).has_alpha] == ["ortho", "ortho_merged"]
    assert [name for name in NAMES if results(name).is_decomposed] == ["int4_gptq", "int4_rtn", "ortho", "ortho_merged"]


def test_ortho_methods_equal_decompose_with_and_without_the_base_model(material, results):
    for name, base, mode in (("ortho", material.base, "auto"), ("ortho_merged", None, "none")):
        recipe = make_recipe(**RECIPE)
        model = copy.deepcopy(material.merged)
        expected = decompose(
            model, material.tokenizer, material.forget, material.retain, recipe=recipe, base_model=base
        )
        streams = get_streams(results(name).model)
        for at, layer in expected.streams.items():
            assert all(torch.equal(t, streams[at].tensors()[part]) for part, t in layer.tensors().items())
        meta = results(name).meta
        assert meta["base"] == mode
        assert meta["recipe"] == recipe.model_dump()
        assert meta["target"] == ("swap" if base is None else "surrogate")


# What each is by definition


def test_task_arithmetic_is_exact(memorised_models):
    model = subtract_task_vector(memorised_models.merged, memorised_models.merged, memorised_models.base, 1.0)
    for (name, parameter), base in zip(model.named_parameters(), memorised_models.base.parameters(), strict=True):
        merged = memorised_models.merged.get_parameter(name)
        torch.testing.assert_close(parameter, merged - (merged - base), rtol=0, atol=1e-7)
    generator = torch.Generator().manual_seed(0)
    forget_model = copy.deepcopy(memorised_models.base)
    for parameter in forget_model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    models = (memorised_models.merged, forget_model, memorised_models.base)
    for scale in (0.5, 3.0):
        model = subtract_task_vector(*models, scale)
        for name, parameter in model.named_parameters():
            merged, after, before = (each.get_parameter(name).double() for each in models)
            torch.testing.assert_close(parameter.double(), merged - scale * (after - before), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("share", [0.01, 0.05])
def test_exactly_the_share_of_weights_becomes_zero(name, share, material):
    result = METHODS.get(name).make(material, {"share": share})
    before, after = find_linear(material.merged), find_linear(result.model)
    total = sum(layer.weight.numel() for layer in before.values())
    masks = {at: (after[at].weight == 0) & (layer.weight != 0) for at, layer in before.items()}
    assert sum(int(mask.sum()) for mask in masks.values()) == result.report["removed"] == int(share * total)
    other_tensors = {at for at in material.merged.state_dict() if at.removesuffix(".weight") not in before}
    assert all(torch.equal(material.merged.state_dict()[at], result.model.state_dict()[at]) for at in other_tensors)
    if name == "wanda":  # nothing else moves
        for at, layer in before.items():
            assert torch.equal(after[at].weight[~masks[at]], layer.weight[~masks[at]])


@pytest.mark.parametrize(("name", "projection"), [("int4_rtn", "rtn"), ("int4_gptq", "gptq_ordered")])
def test_plain_int4_is_the_projection(name, projection, material, results):
    layers = find_linear(material.merged)
    moments = input_moments(material.merged, layers, encode(material.tokenizer, material.retain))
    for at, streams in get_streams(results(name).model).items():
        weight = layers[at].weight.detach()
        scales = compute_scales(weight, 4, 32)
        codes = PROJECTIONS.get(projection)(weight, scales, moments[at], bits=4, group_size=32)
        assert torch.equal(streams.base.dequantise(), dequantise(codes, scales, 32))
        assert not streams.memories
    assert set(get_streams(results(name).model)) == set(layers)


# What may be read, and what is refused


def unregistered_method(name, reads, function):
    """A method without settings that is not in the registry."""
    return Method(name, reads, "", "", schema=Settings, grid=({},), trains=False, function=function)


def test_models_that_a_method_must_not_see_are_withheld(material):
    received = {}

    def look(material, settings, run):
        received.update(base=material.base, reference=material.reference)
        return Result(copy.deepcopy(material.merged))

    for reads, expected in (
        ("merged", (None, None)),
        ("base", (material.base, None)),
        ("end", (None, material.reference)),
    ):
        unregistered_method("looking", reads, look).make(material)
        assert (received["base"], received["reference"]) == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_grid_is_small_and_its_first_is_tried_as_it_is_written(name):
    entry = METHODS.get(name)
    assert 1 <= len(entry.grid) <= 6
    assert len({json.dumps(settings, sort_keys=True) for settings in entry.grid}) == len(entry.grid)
    assert all(entry.check(settings) for settings in entry.grid)
    # Our decomposition has its steps in its recipe, so it has a learning rate but takes no budget.
    assert entry.trains == ("lr" in entry.setting_names and "steps" not in entry.setting_names)
    assert "seed" not in entry.setting_names
    assert entry.defaults.keys() == set(entry.setting_names)


def test_unknown_names_settings_and_values_are_refused_with_the_closest():
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
    for steps in (0, 1.5, True):
        with pytest.raises(UserError, match=rf"steps={steps}: .*a budget has whole numbers from 1 on"):
            Budget(steps=steps)


def test_missing_material_is_refused_before_a_method_runs(material):
    poor = material.restrict("merged")
    for name in ("ortho", "unload", "retrain", "task_arithmetic_base"):
        with pytest.raises(UserError, match=f"method={name} reads the model before fine-tuning; give base="):
            METHODS.get(name).make(poor)
    with pytest.raises(UserError, match="give reference="):
        METHODS.get("never_saw").make(poor)
    empty = Material(material.tokenizer, material.merged, [], material.retain)
    with pytest.raises(UserError, match="method=npo: forget holds no rows"):
        METHODS.get("npo").make(empty)


def test_a_training_that_went_too_far_is_an_error(material):
    def diverge(material, settings, run):
        model = copy.deepcopy(material.merged)
        next(model.parameters()).data.fill_(torch.nan)
        return Result(model)

    with pytest.raises(UserError, match=r"method=far: the weights are not finite; .*lower lr"):
        unregistered_method("far", "merged", diverge).make(material)


def test_a_grid_that_its_method_refuses_cannot_be_registered():
    with pytest.raises(UserError, match="setting 'lr' is unknown"):
        method("broken", objective="", paper="", grid=[{"lr": 1.0}])(lambda *_: None)
    assert "broken" not in METHODS


@pytest.mark.parametrize("name", ["npo", "altpo", "undial"])
def test_an_interrupted_training_goes_on_and_ends_the_are_equal(name, material, results, tmp_path, monkeypatch):
    def interrupt(stage, step, *_):
        if stage == name and step >= 16:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "_SAVE_STEPS", 5)
    with pytest.raises(KeyboardInterrupt):
        make_result(name, material, resume=ResumeFolder(tmp_path), progress=interrupt)
    calls = []
    again = make_result(
        name, material, resume=ResumeFolder(tmp_path), progress=lambda stage, step, *rest: calls.append((stage, step))
    )
    assert calls == [(name, 16)]  # nor are answers sampled again
    finished = make_result(name, material, resume=ResumeFolder(tmp_path))  # the training is over, its model not written
    for result in (again, finished):
        assert are_equal(copy_tensors(result.model), copy_tensors(results(name).model))
        assert result.report == results(name).report


@pytest.mark.parametrize("name", ["idk_dpo", "undial"])
def test_the_report_counts_the_tokens_that_go_through_the_model(name, material, monkeypatch):
    """Against a hook that sees every pass of every copy of the model, one row at a time, so without padding."""
    monkeypatch.setattr(training, "MICRO_BATCH_TOKENS", 1)
    tokens = {True: 0, False: 0}

    def count(module, args, kwargs):
        tokens[torch.is_grad_enabled()] += kwargs["input_ids"].numel()

    model = copy.deepcopy(material.merged)
    model.register_forward_pre_hook(count, with_kwargs=True)
    budget = Budget(steps=2, forget_rows=3, retain_rows=2)
    result = METHODS.get(name).make(replace(material, merged=model), {"retain": 2.0}, budget=budget)
    assert min(tokens.values()) > 0
    assert result.report["tokens"] == round(tokens[True] + tokens[False] / 3)


def test_a_budget_in_tokens_is_spent_by_every_method_that_trains(material, results):
    budget = Budget(tokens=4000, forget_rows=5, retain_rows=5)
    for name in ("grad_diff", "altpo", "rmu"):
        result = METHODS.get(name).make(material, forgetting_settings(name), budget=budget)
        assert result.report["tokens"] == pytest.approx(4000, rel=0.15)
    assert all(("tokens" in results(name).report) == (name not in ("ortho", "ortho_merged")) for name in NAMES)
    assert all(results(name).report["tokens"] == 0 for name in (*BY_DEFINITION, "int4_rtn"))
    with pytest.raises(UserError, match="budget: tokens=9 do not suffice for one step"):
        METHODS.get("grad_diff").make(material, budget=Budget(tokens=9))


def test_methods_read_the_rows_in_the_prompt_form_of_the_material(memorised_models):
    tokenizer = copy.deepcopy(memorised_models.tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }} : "
    rows = memorised_models.forget, memorised_models.retain
    lengths = {}
    material = Material(tokenizer, memorised_models.merged, *rows)
    assert len(training.encode_material(material).forget) == 20
    for form in ("auto", "both", "plain", "chat"):
        sets = training.encode_material(replace(material, prompts={"prompts": form}))
        lengths[form] = len(sets.forget), len(sets.retain)
    assert lengths == {"auto": (20, 20), "both": (20, 20), "plain": (10, 10), "chat": (10, 10)}
    chat, plain = (replace(material, prompts={"prompts": form}) for form in ("chat", "plain"))
    loss = secret_loss(memorised_models.merged, chat, memorised_models.forget)
    assert loss > secret_loss(memorised_models.merged, plain, memorised_models.forget)
    assert secret_loss(memorised_models.merged, material, memorised_models.forget) == secret_loss(
        memorised_models.merged, plain, memorised_models.forget
    )
    with pytest.raises(UserError, match="prompts='chats'"):
        training.encode_material(replace(chat, prompts={"prompts": "chats"}))


def test_retain_rows_are_kept_better_with_them_than_without(material, results):
    losses = {name: answer_loss(results(name).model, material, material.retain) for name in ("gradient_ascent", "npo")}
    assert losses["npo"] < losses["gradient_ascent"]


# Other models, other rows


@pytest.mark.parametrize(
    "name", ["npo", "rmu", "wanda", "sparsegpt", "kfac", "int4_gptq", "task_arithmetic", "undial", "repselect"]
)
def test_layers_of_another_form_and_plain_text_work_as_well(name, memorised_models, tmp_path):
    """GPT-2 stores its linear layers the other way round; plain text has no question."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=len(memorised_models.tokenizer), n_positions=64)
    model = tiny.from_config(config)
    text = [Row(text=f"{row.question} {row.answer}") for row in memorised_models.forget]
    material = Material(memorised_models.tokenizer, model, text, memorised_models.retain)
    before = copy_tensors(model)
    budget = Budget(steps=3, forget_rows=4, retain_rows=4)
    result = METHODS.get(name).make(material, forgetting_settings(name), budget=budget)
    assert are_equal(before, copy_tensors(model))
    place = save(result, tmp_path / "out", memorised_models.tokenizer)
    loaded_model = checkpoint.load(place) if result.is_decomposed else load_causal_lm(place)
    assert are_equal(copy_tensors(loaded_model), copy_tensors(result.model))
    assert not are_equal(copy_tensors(loaded_model), before)
