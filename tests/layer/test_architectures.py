"""Every architecture of the table through every check, the page about it, and what is particular to some of them."""

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

import lm_ortho.objective.surrogate as surrogate_module
from lm_ortho import checkpoint
from lm_ortho.calibration.activations import input_moments
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
from lm_ortho.pipeline import build
from lm_ortho.pipeline.spec import ModelSpec, resolve
from lm_ortho.projection.lattice import round_to_codes
from tests.support.architectures import (
    CASES,
    CHECKS,
    PAGE,
    RETAIN,
    REWRITE,
    Made,
    kinds,
    page,
    said,
    said_at,
    same_tensors,
    tokenizer,
)

torch.set_num_threads(1)
CHEAP = {"sieve": "random", "projection": "rtn", "edit": "zero"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A case by its name, built once."""
    kept = {}

    def make(name):
        if name not in kept:
            kept[name] = Made(CASES[name], tmp_path_factory.mktemp("case"))
        return kept[name]

    return make


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_architecture(made, name, check):
    error = made(name).outcome(check)
    if error is not None:
        raise error


def test_the_page_says_what_the_checks_found(made):
    text = page({name: made(name) for name in CASES})
    if os.environ.get(REWRITE) == "1":
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text, f"docs/models.md is out of date: {REWRITE}=1 writes it anew"


# --- linear form and back


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral", "GPT-OSS", "NemotronH", "DeepSeek-V3"])
def test_linear_form_and_back_is_exact(name):
    model = CASES[name].build()
    model.lm_head.weight.requires_grad_(False)
    plain, expected = copy.deepcopy(model), said(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    changed = to_linear_form(model)
    assert changed
    assert all(isinstance(model.get_submodule(n), nn.Linear) for n in find_linear(model))
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(said(one), expected, rtol=1e-4, atol=1e-5)
        assert restore_form(one) == changed
        assert same_tensors(one, plain)
        assert [type(m) for m in one.modules()] == [type(m) for m in plain.modules()]
        assert {n for n, p in one.named_parameters() if p.requires_grad} == trainable
        assert torch.equal(said(one), expected)
        assert restore_form(one) == []


def test_models_of_plain_linear_layers_are_not_touched():
    model = CASES["Llama"].build()
    before = {id(parameter) for parameter in model.parameters()}
    assert to_linear_form(model) == restore_form(model) == []
    assert {id(parameter) for parameter in model.parameters()} == before


def test_changes_made_in_linear_form_are_there_afterwards():
    model = CASES["GPT-2"].build()
    with linear_form(model), torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[2, 3] = 7.0
    assert model.transformer.h[0].attn.c_attn.weight[3, 2] == 7.0
    model = CASES["GPT-OSS"].build()
    with linear_form(model), torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[1].weight[2, 3] = 7.0
    assert model.model.layers[0].mlp.experts.gate_up_proj[1, 3, 2] == 7.0


LAYOUTS = [MixtralExperts, GptOssExperts, NemotronHExperts, AriaExperts, MuseSparkExperts, HYV4Experts]
SIZES = SimpleNamespace(
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
    """Gated and not, transposed, interleaved, with biases, with a norm behind, with a gate of their own."""
    torch.manual_seed(0)
    host = nn.ModuleDict({"experts": kind(SIZES)})
    for parameter in host.parameters():
        nn.init.normal_(parameter)
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    x, (weights, index) = torch.randn(9, 12), torch.randn(9, 4).softmax(-1).topk(2)
    expected = host["experts"](x, index, weights)
    assert to_linear_form(host) == ["experts"]
    torch.testing.assert_close(host["experts"](x, index, weights), expected, rtol=1e-4, atol=1e-4)
    restore_form(host)
    assert host.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in host.state_dict().items())
    assert torch.equal(host["experts"](x, index, weights), expected)


def test_an_index_beyond_the_experts_stands_for_none():
    host = nn.ModuleDict({"experts": MixtralExperts(SIZES)})
    nn.init.normal_(host["experts"].gate_up_proj), nn.init.normal_(host["experts"].down_proj)
    x, index, weights = torch.randn(3, 12), torch.tensor([[0, 4], [4, 4], [2, 1]]), torch.full((3, 2), 0.5)
    expected = host["experts"](x, index, weights)
    with linear_form(host):
        torch.testing.assert_close(host["experts"](x, index, weights), expected)
    assert not expected[1].any()


# --- patching


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral", "Falcon"])
def test_patch_takes_both_forms_and_unpatch_gives_the_original_one(made, name):
    one, other = copy.deepcopy(made(name).plain), copy.deepcopy(made(name).plain)
    to_linear_form(other)
    for model in (one, other):
        patch(model, made(name).optimised.streams)
    assert torch.equal(said_at(one, 0.5), said_at(other, 0.5))
    for model in (one, other):
        unpatch(model, 0.0)
        assert kinds(model) == kinds(made(name).before)
        torch.testing.assert_close(said(model), said_at(made(name).patched, 0.0), rtol=1e-4, atol=1e-4)


def test_a_patch_that_fails_leaves_the_form_as_it_was(made):
    model = copy.deepcopy(made("Mixtral").plain)
    streams = made("Mixtral").optimised.streams
    with pytest.raises(UserError, match="has no module of that name"):
        patch(model, {**streams, "model.layers.9.mlp.experts.down_proj.0": next(iter(streams.values()))})
    assert kinds(model) == kinds(made("Mixtral").before)
    assert same_tensors(model, made("Mixtral").before)


def test_what_is_out_of_reach_is_listed():
    found, skipped = survey(CASES["Mixtral"].build())
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert skipped["model.layers.0.mlp.gate"] == "MixtralTopKRouter keeps weight to itself, not in an nn.Linear"
    assert "linear form only" in skipped["model.layers.0.mlp.experts"]
    _, skipped = survey(CASES["JetMoE"].build())
    assert "JetMoeParallelExperts keeps weight to itself" in skipped["model.layers.0.mlp.input_linear"]


def test_a_class_of_others_that_computes_the_same_is_left_alone():
    """Only a class of transformers is known to stay what it is."""

    class Same(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    found, skipped = survey(nn.ModuleDict({"fine": nn.Linear(4, 4), "same": Same(4, 4)}))
    assert (list(found), list(skipped)) == (["fine"], ["same"])


# --- a part of the layers


@pytest.mark.parametrize(
    ("name", "targets"),
    [("Mixtral", "self_attn.*"), ("Mixtral", "gate_up_proj.*"), ("Mixtral", "down_proj.1"), ("GPT-2", "c_attn")],
)
def test_a_part_of_the_layers(made, tmp_path, name, targets):
    """What the names do not need keeps its form, in memory and on disk."""
    result = made(name).split(targets=targets, **CHEAP)
    model = copy.deepcopy(made(name).plain)
    patch(model, result.streams)
    assert set(ortho_layers(model)) == set(result.streams)
    assert any(kind == "MixtralExperts" for kind in kinds(model).values()) == (targets == "self_attn.*")
    again = checkpoint.load(checkpoint.save(tmp_path / "made", model))
    for alpha in (0.0, 1.0):
        assert torch.equal(said_at(again, alpha), said_at(model, alpha))
    unpatch(again, 1.0)
    assert kinds(again) == kinds(made(name).before)


def test_a_part_of_the_experts_of_a_bf16_model_is_saved(made, tmp_path):
    result = made("Mixtral").split(targets="down_proj.1", **CHEAP)
    model = copy.deepcopy(made("Mixtral").plain).bfloat16()
    patch(model, result.streams)
    again = checkpoint.load(checkpoint.save(tmp_path / "made", model), dtype=torch.bfloat16)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert same_tensors(again, model)


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral"])
def test_sixteen_bits(made, tmp_path, name):
    """A 16-bit base has a tensor named weight, which GPT-2 would draw anew after loading."""
    model = copy.deepcopy(made(name).plain)
    patch(model, made(name).split(bits=16, sieve="magnitude", edit="none").streams)
    torch.testing.assert_close(said_at(model, 0.0), said(made(name).plain), rtol=1e-4, atol=1e-4)
    again = checkpoint.load(checkpoint.save(tmp_path / "made", model))
    assert torch.equal(said_at(again, 0.0), said_at(model, 0.0))


# --- experts


def test_moments_of_experts_are_those_of_the_tokens_they_saw(made):
    """Against one document at a time; a token that did not reach the expert counts as zero input."""
    model = copy.deepcopy(made("Mixtral").plain)
    examples = encode(tokenizer(), RETAIN)
    assert len({len(e.ids) for e in examples}) > 1
    to_linear_form(model)
    layers = find_linear(model)
    fast = input_moments(model, layers, examples)
    seen = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0].flatten(0, -2)))
    with torch.no_grad():
        for example in examples:
            model(input_ids=torch.tensor([example.ids]))
    tokens = sum(len(e.ids) for e in examples)
    per_expert = [sum(len(x) for x in seen[name]) for name in layers if ".down_proj." in name]
    assert sum(per_expert) == 2 * 2 * tokens, "two experts a token in each of two layers"
    for name, inputs in seen.items():
        x = torch.cat(inputs) if inputs else torch.zeros(0, layers[name].in_features)
        torch.testing.assert_close(fast[name], x.T @ x / tokens, rtol=1e-4, atol=1e-6)


def test_an_expert_that_no_token_reaches(tmp_path):
    """Zero moments and no gradient: plain rounding, in the projection as in the edit."""
    made = Made(CASES["GPT-OSS"], tmp_path)
    with torch.no_grad():
        for layer in made.plain.model.layers:
            layer.mlp.router.bias[3] = -1e4
    result = made.split(edit="optimised", steps=10)
    with linear_form(made.plain):
        weights = {name: layer.weight.detach().clone() for name, layer in find_linear(made.plain).items()}
    lonely = [name for name in weights if name.endswith("proj.3")]
    assert len(lonely) == 4
    for name in lonely:
        stream = result.streams[name]
        nearest = round_to_codes(weights[name], stream.base.scales.float(), 4, 64)
        assert torch.equal(stream.base.codes(), nearest)
    assert sum(layer.nnz for layer in result.streams.values()) == result.report["support"]
    fisher = made.split(sieve="fisher_ratio", edit="zero")
    assert fisher.report["support"] == result.report["support"]


def test_one_alpha_per_row(made):
    """An expert cannot tell the rows apart and says so; a Conv1D can."""
    with alpha_scope([0.0, 0.5, 1.0]):
        with pytest.raises(UserError, match=r"alpha per row: .*use one alpha for the whole batch"):
            said(made("Mixtral").patched)
        rows = said(made("GPT-2").patched)
    for row, alpha in enumerate([0.0, 0.5, 1.0]):
        torch.testing.assert_close(rows[row], said_at(made("GPT-2").patched, alpha)[row], rtol=1e-4, atol=1e-5)
    with alpha_scope([0.5, 0.5, 0.5]):
        same = said(made("Mixtral").patched)
    assert torch.equal(same, said_at(made("Mixtral").patched, 0.5))


# --- where the weights come from


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral", "PhiMoE", "Falcon"])
def test_with_the_model_before_fine_tuning(made, name, monkeypatch):
    monkeypatch.setattr(surrogate_module, "STEPS", 2)
    monkeypatch.setattr(surrogate_module, "ROUNDS", 1)
    base = CASES[name].build(seed=1)
    before = copy.deepcopy(base)
    assert made(name).split(base_model=base, edit="optimised", steps=10).report["target"]["name"] == "surrogate"
    assert made(name).split(base_model=base, **{**CHEAP, "edit": "w0"}).report["base_known"]
    assert same_tensors(base, before)
    assert kinds(base) == kinds(before)


SOURCES = [("Llama", torch.float32), ("Gemma", torch.bfloat16), ("GPT-2", torch.float16), ("Mixtral", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), SOURCES)
def test_sharded_files_of_every_dtype(name, dtype, tmp_path, small_and_alone):
    """The way of lm-eval: files to streams, the cache, and back; the weights are those of the files in BF16."""
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
    source = resolve(ModelSpec(str(tmp_path / "plain"), recipe={"density": 0.05, **CHEAP}, **sets))
    built = build.build_model(source, dtype=torch.float32)
    rounded = model.float().bfloat16().float()
    to_linear_form(rounded)
    streams = ortho_layers(built.model)
    assert set(streams) == set(find_linear(rounded))
    for layer_name, layer in streams.items():
        held, weight = layer.streams(), rounded.get_submodule(layer_name).weight
        on = held.ortho.support()
        error, moved = (held.dense(1.0) - weight).abs(), (weight - held.base.dequantize()).abs()
        assert (error[on] <= 2**-8 * moved[on] + 1e-6).all()
    assert said_at(built.model, 0.0).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_object_of_another_dtype(made, dtype):
    model = copy.deepcopy(made("Mixtral").plain).to(dtype)
    patch(model, made("Mixtral").optimised.streams)
    assert said_at(model, 1.0).dtype == dtype
    torch.testing.assert_close(said_at(model, 0.0).float(), said_at(made("Mixtral").patched, 0.0), rtol=0.3, atol=0.3)
    unpatch(model)
    assert kinds(model) == kinds(made("Mixtral").before)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with pytest.raises(UserError, match=r"pretrained: layer .* decompose a float32 copy, model\.float\(\)"):
        made("Mixtral").split(model=model)


def test_packed_and_unmerged_models_are_refused_in_the_form_they_came_in(made):
    model = copy.deepcopy(made("GPT-OSS").plain)
    model.config.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(UserError, match="quantised already"):
        made("GPT-OSS").split(model=model)
    assert kinds(model) == kinds(made("GPT-OSS").before)
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        copy.deepcopy(made("GPT-2").plain), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    expected = kinds(adapted)
    with pytest.raises(UserError, match="un-merged adapter"):
        made("GPT-2").split(model=adapted)
    assert kinds(adapted) == expected


def test_weights_that_the_model_reads_itself(made):
    report = made("Mamba").optimised.report
    assert report["left_alone"] == [f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)]
    with pytest.raises(UserError, match="without calling the layer"):
        made("Mamba").split(targets="dt_proj", **CHEAP)
    assert made("Llama").optimised.report["left_alone"] == []
