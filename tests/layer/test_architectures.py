"""Every architecture of the table in every check, the page about them, and special cases of some of them."""

from __future__ import annotations

import copy
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.hy_v4.modeling_hy_v4 import HYV4Experts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from lm_ortho import checkpoint
from lm_ortho.calibration.activations import input_moments
from lm_ortho.config import ModelSpec
from lm_ortho.data.encoding import encode
from lm_ortho.data.rows import write_rows
from lm_ortho.errors import UserError
from lm_ortho.layer import (
    alpha_scope,
    find_linear,
    linear_form,
    ortho_layers,
    patch,
    restore_form,
    survey,
    to_linear_form,
    unpatch,
)
from lm_ortho.objective import surrogate_training
from lm_ortho.pipeline import build
from lm_ortho.pipeline.spec import resolve
from lm_ortho.projection.lattice import round_to_codes
from tests.support.architectures import (
    CASES,
    CHECKS,
    PAGE,
    RETAIN,
    REWRITE,
    CaseRun,
    class_names,
    compute_logits,
    compute_logits_at,
    page,
    same_tensors,
    tokenizer,
)

torch.set_num_threads(1)
CHEAP_RECIPE = {"sieve": "random", "projection": "rtn", "edit": "zero"}


@pytest.fixture(scope="module")
def get_case(tmp_path_factory):
    """A function that returns the case of a name and builds it once."""
    cases = {}

    def build_once(name):
        if name not in cases:
            cases[name] = CaseRun(CASES[name], tmp_path_factory.mktemp("case"))
        return cases[name]

    return build_once


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_architecture(get_case, name, check):
    error = get_case(name).outcome(check)
    if error is not None:
        raise error


def test_the_page_lists_the_results_of_the_checks(get_case):
    text = page({name: get_case(name) for name in CASES})
    if os.environ.get(REWRITE) == "1":
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text, f"docs/models.md is out of date: {REWRITE}=1 rewrites it"


# --- linear form and back


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral", "GPT-OSS", "NemotronH", "DeepSeek-V3"])
def test_linear_form_and_back_is_exact(name):
    model = CASES[name].build()
    model.lm_head.weight.requires_grad_(False)
    plain, expected_logits = copy.deepcopy(model), compute_logits(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    names = to_linear_form(model)
    assert names
    assert all(isinstance(model.get_submodule(n), nn.Linear) for n in find_linear(model))
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(compute_logits(one), expected_logits, rtol=1e-4, atol=1e-5)
        assert restore_form(one) == names
        assert same_tensors(one, plain)
        assert [type(m) for m in one.modules()] == [type(m) for m in plain.modules()]
        assert {n for n, p in one.named_parameters() if p.requires_grad} == trainable
        assert torch.equal(compute_logits(one), expected_logits)
        assert restore_form(one) == []


def test_models_of_plain_linear_layers_are_not_touched():
    model = CASES["Llama"].build()
    before = {id(parameter) for parameter in model.parameters()}
    assert to_linear_form(model) == restore_form(model) == []
    assert {id(parameter) for parameter in model.parameters()} == before


def test_changes_in_linear_form_stay_afterwards():
    model = CASES["GPT-2"].build()
    with linear_form(model), torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[2, 3] = 7.0
    assert model.transformer.h[0].attn.c_attn.weight[3, 2] == 7.0
    model = CASES["GPT-OSS"].build()
    with linear_form(model), torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[1].weight[2, 3] = 7.0
    assert model.model.layers[0].mlp.experts.gate_up_proj[1, 3, 2] == 7.0


LAYOUTS = [MixtralExperts, GptOssExperts, NemotronHExperts, AriaExperts, MuseSparkExperts, HYV4Experts]
EXPERT_CONFIG = SimpleNamespace(
    num_local_experts=4,
    moe_num_experts=4,
    n_routed_experts=4,
    hidden_size=12,
    moe_hidden_size=12,
    moe_latent_size=None,
    intermediate_size=10,
    moe_intermediate_size=10,
    hidden_act="silu",
    mlp_hidden_act="relu2",
    swiglu_limit=2.0,
    swiglu_alpha=1.7,
    post_norm_eps=1e-5,
    _experts_implementation="eager",
)


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.__name__)
def test_every_layout_of_experts(kind):
    """Experts with and without gates, transposed, interleaved, with biases, with a final norm, with their own gate."""
    torch.manual_seed(0)
    host = nn.ModuleDict({"experts": kind(EXPERT_CONFIG)})
    for parameter in host.parameters():
        nn.init.normal_(parameter)
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    x, (weights, index) = torch.randn(9, 12), torch.randn(9, 4).softmax(-1).topk(2)
    expected_output = host["experts"](x, index, weights)
    assert to_linear_form(host) == ["experts"]
    torch.testing.assert_close(host["experts"](x, index, weights), expected_output, rtol=1e-4, atol=1e-4)
    restore_form(host)
    assert host.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in host.state_dict().items())
    assert torch.equal(host["experts"](x, index, weights), expected_output)


def test_an_index_beyond_the_experts_means_no_expert():
    host = nn.ModuleDict({"experts": MixtralExperts(EXPERT_CONFIG)})
    nn.init.normal_(host["experts"].gate_up_proj), nn.init.normal_(host["experts"].down_proj)
    x, index, weights = torch.randn(3, 12), torch.tensor([[0, 4], [4, 4], [2, 1]]), torch.full((3, 2), 0.5)
    expected_output = host["experts"](x, index, weights)
    with linear_form(host):
        torch.testing.assert_close(host["experts"](x, index, weights), expected_output)
    assert not expected_output[1].any()


# --- patching


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral", "Falcon"])
def test_patch_takes_both_forms_and_unpatch_gives_the_original_one(get_case, name):
    one, other = copy.deepcopy(get_case(name).plain), copy.deepcopy(get_case(name).plain)
    to_linear_form(other)
    for model in (one, other):
        patch(model, get_case(name).optimised.streams)
    assert torch.equal(compute_logits_at(one, 0.5), compute_logits_at(other, 0.5))
    for model in (one, other):
        unpatch(model, 0.0)
        assert class_names(model) == class_names(get_case(name).before)
        torch.testing.assert_close(
            compute_logits(model), compute_logits_at(get_case(name).patched, 0.0), rtol=1e-4, atol=1e-4
        )


def test_a_patch_that_fails_leaves_the_form_as_it_was(get_case):
    model = copy.deepcopy(get_case("Mixtral").plain)
    streams = get_case("Mixtral").optimised.streams
    with pytest.raises(UserError, match="has no module of that name"):
        patch(model, {**streams, "model.layers.9.mlp.experts.down_proj.0": next(iter(streams.values()))})
    assert class_names(model) == class_names(get_case("Mixtral").before)
    assert same_tensors(model, get_case("Mixtral").before)


def test_skipped_layers_are_listed():
    layers, skip_reasons = survey(CASES["Mixtral"].build())
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert skip_reasons["model.layers.0.mlp.gate"] == "MixtralTopKRouter keeps weight to itself, not in an nn.Linear"
    assert "linear form only" in skip_reasons["model.layers.0.mlp.experts"]
    _, skip_reasons = survey(CASES["JetMoE"].build())
    assert "JetMoeParallelExperts keeps weight to itself" in skip_reasons["model.layers.0.mlp.input_linear"]


def test_an_unknown_subclass_of_linear_is_skipped():
    """Even if it computes the same product: only classes of transformers are known not to change."""

    class Same(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    layers, skip_reasons = survey(nn.ModuleDict({"fine": nn.Linear(4, 4), "same": Same(4, 4)}))
    assert (list(layers), list(skip_reasons)) == (["fine"], ["same"])


# --- a part of the layers


@pytest.mark.parametrize(
    ("name", "targets"),
    [("Mixtral", "self_attn.*"), ("Mixtral", "gate_up_proj.*"), ("Mixtral", "down_proj.1"), ("GPT-2", "c_attn")],
)
def test_a_part_of_the_layers(get_case, tmp_path, name, targets):
    """Modules without decomposed layers keep their form, in memory and on disk."""
    result = get_case(name).split(targets=targets, **CHEAP_RECIPE)
    model = copy.deepcopy(get_case(name).plain)
    patch(model, result.streams)
    assert set(ortho_layers(model)) == set(result.streams)
    assert any(kind == "MixtralExperts" for kind in class_names(model).values()) == (targets == "self_attn.*")
    again = checkpoint.load(checkpoint.save(tmp_path / "checkpoint", model))
    for alpha in (0.0, 1.0):
        assert torch.equal(compute_logits_at(again, alpha), compute_logits_at(model, alpha))
    unpatch(again, 1.0)
    assert class_names(again) == class_names(get_case(name).before)


def test_a_part_of_the_experts_of_a_bf16_model_is_saved(get_case, tmp_path):
    result = get_case("Mixtral").split(targets="down_proj.1", **CHEAP_RECIPE)
    model = copy.deepcopy(get_case("Mixtral").plain).bfloat16()
    patch(model, result.streams)
    again = checkpoint.load(checkpoint.save(tmp_path / "checkpoint", model), dtype=torch.bfloat16)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert same_tensors(again, model)


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral"])
def test_sixteen_bits(get_case, tmp_path, name):
    """A 16-bit base has a tensor named weight, which GPT-2 would initialise again after loading."""
    model = copy.deepcopy(get_case(name).plain)
    patch(model, get_case(name).split(bits=16, sieve="magnitude", edit="none").streams)
    torch.testing.assert_close(
        compute_logits_at(model, 0.0), compute_logits(get_case(name).plain), rtol=1e-4, atol=1e-4
    )
    again = checkpoint.load(checkpoint.save(tmp_path / "checkpoint", model))
    assert torch.equal(compute_logits_at(again, 0.0), compute_logits_at(model, 0.0))


# --- experts


def test_moments_of_experts_count_only_the_tokens_routed_to_them(get_case):
    """Compares with one document at a time; a token that did not reach the expert counts as zero input."""
    model = copy.deepcopy(get_case("Mixtral").plain)
    examples = encode(tokenizer(), RETAIN)
    assert len({len(e.ids) for e in examples}) > 1
    to_linear_form(model)
    layers = find_linear(model)
    fast = input_moments(model, layers, examples)
    layer_inputs = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, x, name=name: layer_inputs[name].append(x[0].flatten(0, -2)))
    with torch.no_grad():
        for example in examples:
            model(input_ids=torch.tensor([example.ids]))
    tokens = sum(len(e.ids) for e in examples)
    per_expert = [sum(len(x) for x in layer_inputs[name]) for name in layers if ".down_proj." in name]
    assert sum(per_expert) == 2 * 2 * tokens, "two experts a token in each of two layers"
    for name, inputs in layer_inputs.items():
        x = torch.cat(inputs) if inputs else torch.zeros(0, layers[name].in_features)
        torch.testing.assert_close(fast[name], x.T @ x / tokens, rtol=1e-4, atol=1e-6)


def test_an_expert_that_no_token_reaches(tmp_path):
    """It has zero moments and no gradient, so projection and edit round its weights to the nearest code."""
    case = CaseRun(CASES["GPT-OSS"], tmp_path)
    with torch.no_grad():
        for layer in case.plain.model.layers:
            layer.mlp.router.bias[3] = -1e4
    result = case.split(edit="optimised", steps=10)
    with linear_form(case.plain):
        weights = {name: layer.weight.detach().clone() for name, layer in find_linear(case.plain).items()}
    names_without_tokens = [name for name in weights if name.endswith("proj.3")]
    assert len(names_without_tokens) == 4
    for name in names_without_tokens:
        stream = result.streams[name]
        nearest = round_to_codes(weights[name], stream.base.scales.float(), 4, 64)
        assert torch.equal(stream.base.codes(), nearest)
    assert sum(layer.nnz for layer in result.streams.values()) == result.report["support"]
    fisher = case.split(sieve="fisher_ratio", edit="zero")
    assert fisher.report["support"] == result.report["support"]


def test_one_alpha_per_row(get_case):
    """An expert does not know the rows and raises an error; a Conv1D knows them."""
    with alpha_scope([0.0, 0.5, 1.0]):
        with pytest.raises(UserError, match=r"alpha per row: .*use one alpha for the whole batch"):
            compute_logits(get_case("Mixtral").patched)
        rows = compute_logits(get_case("GPT-2").patched)
    for row, alpha in enumerate([0.0, 0.5, 1.0]):
        torch.testing.assert_close(
            rows[row], compute_logits_at(get_case("GPT-2").patched, alpha)[row], rtol=1e-4, atol=1e-5
        )
    with alpha_scope([0.5, 0.5, 0.5]):
        same = compute_logits(get_case("Mixtral").patched)
    assert torch.equal(same, compute_logits_at(get_case("Mixtral").patched, 0.5))


# --- sources of the weights


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral", "PhiMoE", "Falcon"])
def test_with_the_model_before_fine_tuning(get_case, name, monkeypatch):
    monkeypatch.setattr(surrogate_training, "BUDGET", 0.1)
    base = CASES[name].build(seed=1)
    before = copy.deepcopy(base)
    assert get_case(name).split(base_model=base, edit="optimised", steps=10).report["target"]["name"] == "surrogate"
    assert get_case(name).split(base_model=base, **{**CHEAP_RECIPE, "edit": "w0"}).report["base_known"]
    assert same_tensors(base, before)
    assert class_names(base) == class_names(before)


SOURCES = [("Llama", torch.float32), ("Gemma", torch.bfloat16), ("GPT-2", torch.float16), ("Mixtral", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), SOURCES)
def test_sharded_files_of_every_dtype(name, dtype, tmp_path, isolated_environment):
    """As in lm-eval, from files to streams, the cache, and back; the weights are those of the files in BF16."""
    model = CASES[name].build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)  # FP16 and FP32 files hold values that are no BF16 numbers
    model.to(dtype).save_pretrained(tmp_path / "plain", max_shard_size="30KB")
    assert len(list((tmp_path / "plain").glob("model-*.safetensors"))) > 1
    tokenizer().save_pretrained(tmp_path / "plain")
    sets = {}
    for kind, rows in (("forget", RETAIN[:2]), ("retain", RETAIN[2:])):
        write_rows(tmp_path / f"{kind}.jsonl", rows)
        sets[kind] = str(tmp_path / f"{kind}.jsonl")
    recipe = {"density": 0.05, **CHEAP_RECIPE}
    source = resolve(ModelSpec(pretrained=str(tmp_path / "plain"), recipe=recipe, force=True, **sets))
    built_model = build.build_model(source, dtype=torch.float32)
    rounded_model = model.float().bfloat16().float()
    to_linear_form(rounded_model)
    streams = ortho_layers(built_model.model)
    assert set(streams) == set(find_linear(rounded_model))
    for layer_name, layer in streams.items():
        layer_streams, weight = layer.streams(), rounded_model.get_submodule(layer_name).weight
        on = layer_streams.ortho.support()
        error, difference = (
            (layer_streams.to_dense(1.0) - weight).abs(),
            (weight - layer_streams.base.dequantise()).abs(),
        )
        assert (error[on] <= 2**-8 * difference[on] + 1e-6).all()
    assert compute_logits_at(built_model.model, 0.0).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_object_of_another_dtype(get_case, dtype):
    model = copy.deepcopy(get_case("Mixtral").plain).to(dtype)
    patch(model, get_case("Mixtral").optimised.streams)
    assert compute_logits_at(model, 1.0).dtype == dtype
    # Rounding may turn a tie of the router and send a token to another expert, so the usual token counts.
    exact, other = (compute_logits_at(get_case("Mixtral").patched, alpha) for alpha in (0.0, 1.0))
    error = (compute_logits_at(model, 0.0).float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.median() < 0.02
    assert error.mean() < 0.1 * (other - exact).norm(dim=-1).div(exact.norm(dim=-1)).mean()
    unpatch(model)
    assert class_names(model) == class_names(get_case("Mixtral").before)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with pytest.raises(UserError, match=r"pretrained: layer .* decompose a float32 copy, model\.float\(\)"):
        get_case("Mixtral").split(model=model)


def test_packed_and_unmerged_models_are_refused_in_their_original_form(get_case):
    model = copy.deepcopy(get_case("GPT-OSS").plain)
    model.config.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(UserError, match="quantised already"):
        get_case("GPT-OSS").split(model=model)
    assert class_names(model) == class_names(get_case("GPT-OSS").before)
    peft = pytest.importorskip("peft")
    adapted_model = peft.get_peft_model(
        copy.deepcopy(get_case("GPT-2").plain), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    classes_before = class_names(adapted_model)
    with pytest.raises(UserError, match="un-merged adapter"):
        get_case("GPT-2").split(model=adapted_model)
    assert class_names(adapted_model) == classes_before


def test_weights_that_the_model_reads_itself(get_case):
    report = get_case("Mamba").optimised.report
    assert report["left_alone"] == [f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)]
    with pytest.raises(UserError, match="without calling the layer"):
        get_case("Mamba").split(targets="dt_proj", **CHEAP_RECIPE)
    assert get_case("Llama").optimised.report["left_alone"] == []
