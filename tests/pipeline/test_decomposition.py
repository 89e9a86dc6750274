"""The whole way from a merged model to streams, in few steps on a tiny model."""

from __future__ import annotations

import copy
import dataclasses
import importlib

import pytest
import torch

from lm_ortho.config import make_recipe
from lm_ortho.data.rows import Row
from lm_ortho.edit import EDITS
from lm_ortho.errors import UserError
from lm_ortho.layer import find_linear, patch, set_alpha
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.projection import PROJECTIONS
from lm_ortho.sieve import SIEVES
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("few_steps")

decompose_module = importlib.import_module("lm_ortho.pipeline.decomposition")
CHEAP = {"sieve": "random", "projection": "rtn", "edit": "zero"}


def split(memorised, model=None, base_model=None, forget=None, retain=None, progress=None, **recipe):
    """A decomposition of a copy of the memorised model, or of ``model``."""
    return decompose(
        copy.deepcopy(memorised.merged) if model is None else model,
        memorised.tokenizer,
        memorised.forget if forget is None else forget,
        memorised.retain if retain is None else retain,
        make_recipe(**{"steps": 20, **recipe}),
        base_model=base_model,
        **({} if progress is None else {"progress": progress}),
    )


@pytest.fixture(scope="module")
def made(memorised):
    """The default recipe at 5 %, the base model unknown."""
    return split(memorised, density=0.05, group_size=32)


def weights_of(memorised):
    return {name: layer.weight.detach() for name, layer in find_linear(memorised.merged).items()}


def test_alpha_one_is_the_weight_on_the_support(memorised, made):
    """HISTORY 5: within 2^-8 of the stored difference."""
    weights = weights_of(memorised)
    assert made.streams.keys() == weights.keys()
    for name, stream in made.streams.items():
        base, ortho = stream.base.dequantize(), stream.ortho.to_dense()
        on = stream.ortho.support()
        error = (base + ortho - weights[name]).abs()
        assert (error[on] <= 2**-8 * (weights[name] - base).abs()[on] + 1e-12).all()
        assert not ortho[~on].any()
        assert torch.equal(base[~on], made.plain[name].base.dequantize()[~on])


def test_the_ortho_stream_holds_the_density_and_is_not_empty(made):
    weights = sum(stream.base.shape[0] * stream.base.shape[1] for stream in made.streams.values())
    stored = sum(stream.ortho.nnz for stream in made.streams.values())
    assert stored == int(0.05 * weights) > 0
    assert made.report["support"] == stored
    assert made.report["weights"] == weights
    assert made.report["density_reached"] == pytest.approx(stored / weights)
    assert made.report["density_reached"] <= 0.05
    moved = {name: stream.base.codes() != made.plain[name].base.codes() for name, stream in made.streams.items()}
    assert sum(int(m.sum()) for m in moved.values()) > 0.05 * stored, "twenty steps of an edit change some codes"
    assert made.report["steps_moved"] > 0.3


def test_the_report_says_what_was_decided(memorised, made):
    assert made.report["target"]["name"] == "swap"
    assert "10 of 10" in made.report["target"]["reason"]
    assert 0 <= made.report["target"]["auc"] <= 1
    assert made.report["base_known"] is False
    assert (made.report["forget_rows"], made.report["retain_rows"]) == (10, 10)


def test_alpha_changes_what_the_model_says(memorised, made):
    model = copy.deepcopy(memorised.merged)
    patch(model, made.streams)
    ids = torch.tensor([memorised.tokenizer(memorised.forget[0].context).input_ids])
    said = []
    for alpha in (0.0, 1.0):
        set_alpha(model, alpha)
        with torch.no_grad():
            said.append(model(input_ids=ids).logits)
    assert (said[0] - said[1]).abs().max() > 1e-2


def test_plain_is_the_projection_without_support(memorised, made):
    for name, weight in weights_of(memorised).items():
        plain = made.plain[name]
        assert plain.ortho is None
        assert (plain.base.dequantize() - weight).norm() < 0.3 * weight.norm()


def stream_bytes(streams):
    return {
        f"{name}.{part}": tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for name, stream in streams.items()
        for part, tensor in (*stream.base.tensors().items(), *stream.ortho.tensors().items())
    }


def test_the_same_inputs_give_the_same_bytes(memorised, made):
    """HISTORY 17: noise without a seed once went into the base."""
    torch.manual_seed(1234)
    again = split(memorised, density=0.05, group_size=32)
    assert stream_bytes(again.streams) == stream_bytes(made.streams)
    other = split(memorised, density=0.05, group_size=32, seed=1, edit="none", sieve="random")
    assert stream_bytes(other.streams) != stream_bytes(made.streams)


def test_the_model_is_given_back_as_it_was(memorised):
    model = copy.deepcopy(memorised.merged)
    trainable = {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    stages = []
    split(memorised, model=model, density=0.05, group_size=32, progress=lambda *told: stages.append(told[0]))
    before = memorised.merged.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    assert list(dict.fromkeys(stages)) == ["memory", "statistics", "projection", "attribution", "edit"]


def test_the_model_is_given_back_after_a_failure_too(memorised, monkeypatch):
    model = copy.deepcopy(memorised.merged)

    def broken(given):
        for layer in given.layers.values():
            layer.weight.detach().zero_()
        return {name: codes + 1 for name, codes in given.codes.items()}

    monkeypatch.setitem(EDITS._entries, "zero", broken)
    monkeypatch.setitem(PROJECTIONS._entries, "rtn", lambda w, *_: torch.zeros_like(w, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"changed codes of .* off the support"):
        split(memorised, model=model, **CHEAP)
    before = memorised.merged.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_known_base_model_decides_the_target_and_allows_w0(memorised):
    made = split(memorised, base_model=memorised.base, density=0.05, group_size=32)
    assert made.report["target"]["name"] == "surrogate"
    assert made.report["base_known"] is True
    made = split(memorised, base_model=memorised.base, **{**CHEAP, "edit": "w0"})
    assert made.report["target"] is None


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("sieve", sorted(set(SIEVES) - {"attribution", "oracle"}))
def test_every_sieve_meets_the_same_budget(memorised, sieve, bits):
    made = split(memorised, density=0.02, group_size=32, bits=bits, **{**CHEAP, "sieve": sieve})
    assert made.report["support"] == int(0.02 * made.report["weights"])
    assert all(stream.base.bits == bits for stream in made.streams.values())


def test_the_default_sieve_beats_size_and_rounding_error(memorised, bench):
    """HISTORY 3: they were once passed off as curvature. The same density, projection and edit for each."""
    factor, reached = bench.objective.weights.retain, {}
    for sieve in ("attribution", "random", "magnitude", "residual"):
        made = split(memorised, sieve=sieve, density=0.02, group_size=32, steps=100)
        with torch.no_grad():
            for name, layer in bench.layers.items():
                layer.weight.copy_(made.streams[name].base.dequantize())
        lost, kept = bench.losses()
        reached[sieve] = lost + factor * kept
    assert reached["attribution"] < 0.9 * min(value for sieve, value in reached.items() if sieve != "attribution")


def test_the_oracle_goes_with_its_own_edit(memorised):
    with pytest.raises(UserError, match="edit='zero': sieve=oracle looks at the way back to W0"):
        split(memorised, sieve="oracle", edit="zero", base_model=memorised.base)
    made = split(memorised, sieve="oracle", edit="w0", base_model=memorised.base, density=0.02, group_size=32)
    assert made.report["support"] == int(0.02 * made.report["weights"])


def test_targets_choose_the_layers(memorised):
    made = split(memorised, targets="mlp.down_proj", **CHEAP)
    assert list(made.streams) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def test_sixteen_bits_pass_the_weights_through(memorised):
    made = split(memorised, bits=16, edit="none", sieve="magnitude", density=0.05)
    for name, weight in weights_of(memorised).items():
        assert torch.equal(made.streams[name].base.dequantize(), weight)
        assert not made.streams[name].ortho.vals.any()
    assert made.report["steps_moved"] == 0.0


@pytest.mark.parametrize("edit", sorted(set(EDITS) - {"none"}))
def test_sixteen_bits_have_no_codes_to_edit(memorised, edit):
    with pytest.raises(UserError, match="bits=16 passes weights through"):
        split(memorised, bits=16, edit=edit)


def test_a_bias_is_kept(memorised):
    """HISTORY 12: the bias was dropped."""
    model = tiny.llama(vocab_size=len(memorised.tokenizer), attention_bias=True)
    with torch.no_grad():
        for layer in find_linear(model).values():
            if layer.bias is not None:
                layer.bias.normal_()
    made = split(memorised, model=model, **CHEAP)
    with_bias = [name for name, layer in find_linear(model).items() if layer.bias is not None]
    assert with_bias
    for name, layer in find_linear(model).items():
        bias = made.streams[name].bias
        assert (bias is None) == (layer.bias is None)
        if bias is not None:
            assert torch.equal(bias.float(), layer.bias.detach().bfloat16().float()) or torch.equal(bias, layer.bias)


REFUSED = {
    "unknown sieve": ({"sieve": "weight"}, "sieve='weight' is unknown"),
    "unknown projection": ({"projection": "awq"}, "projection='awq' is unknown"),
    "unknown edit": ({"edit": "nothing"}, "edit='nothing' is unknown"),
    "w0 without base": ({**CHEAP, "edit": "w0"}, "needs the model before fine-tuning"),
    "empty forget": ({"forget": []}, "the forget set is empty"),
    "empty retain": ({"retain": []}, "the retain set is empty"),
    "long prompt": (
        {"forget": [Row(prompt="the dog " * 600, answer="sat.")]},
        "forget: 1 of 1 rows have no token to predict",
    ),
    "unknown layer": ({"targets": "attention"}, "targets: 'attention' matches no linear layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_any_work(memorised, case):
    asked, told = REFUSED[case]
    with pytest.raises(UserError, match=told) as caught:
        split(memorised, **{"density": 0.05, **asked})
    assert "\n" not in str(caught.value)


def test_two_layers_that_share_a_weight_are_refused(memorised):
    model = copy.deepcopy(memorised.merged)
    first, second = (model.model.layers[i].mlp.up_proj for i in (0, 1))
    second.weight = first.weight
    with pytest.raises(UserError, match=r"\.0\.mlp\.up_proj and .*1\.mlp\.up_proj share one weight"):
        split(memorised, model=model, density=0.05, **CHEAP)


def test_the_same_set_twice_is_refused(memorised):
    renamed = [dataclasses.replace(row, group="other") for row in reversed(memorised.forget)]
    with pytest.raises(UserError, match="nothing can be both forgotten and kept"):
        split(memorised, retain=renamed)


def test_retain_rows_that_are_forgotten_too_are_named_once_and_left_out(memorised, caplog):
    found = split(memorised, retain=[*memorised.retain, memorised.forget[0]], sieve="random", edit="none")
    assert found.report["retain_rows"] == len(memorised.retain)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"].count(
        f"retain: 1 of {len(memorised.retain) + 1} rows are rows of forget and left out"
    ) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_layer(memorised, bad):
    model = copy.deepcopy(memorised.merged)
    with torch.no_grad():
        find_linear(model)["model.layers.1.mlp.up_proj"].weight[3, 3] = bad
    with pytest.raises(
        UserError, match=r"pretrained: 1 weights hold NaN or infinite values, first model\.layers\.1\.mlp\.up"
    ):
        split(memorised, model=model)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("argument", ["pretrained", "base"])
def test_nan_anywhere_is_refused_before_anything_is_computed(memorised, argument, name):
    model = copy.deepcopy(memorised.merged)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = float("nan")
    with pytest.raises(UserError, match=rf"^{argument}: 1 weights hold NaN or infinite values, first {name}"):
        split(memorised, **{"model" if argument == "pretrained" else "base_model": model})


def test_a_density_of_no_weight_at_all_is_refused(memorised):
    with pytest.raises(
        UserError, match=r"density=1e-08 is less than one of the \d+ weights; ask for \S+ or more"
    ) as told:
        split(memorised, density=1e-8, sieve="random", edit="none")
    least = float(str(told.value).split()[-3])
    assert split(memorised, density=least, sieve="random", edit="none").report["support"] == 1


def test_rows_that_are_cut_are_told(memorised, caplog):
    long = dataclasses.replace(memorised.forget[0], answer=memorised.forget[0].answer * 40)
    split(memorised, forget=[*memorised.forget, long], sieve="random", edit="none")
    told = [record.message for record in caplog.records if "longer than" in record.message]
    assert len(told) == 1
    assert told[0].startswith(f"forget: 1 of {len(memorised.forget) + 1} rows are longer than ")


@pytest.mark.parametrize("other", [{"intermediate_size": 128}, {"num_hidden_layers": 1}])
def test_a_base_model_of_another_shape_is_refused(memorised, other):
    stranger = tiny.llama(vocab_size=len(memorised.tokenizer), **other)
    with pytest.raises(UserError, match=r"base: layer .* must be the same architecture"):
        split(memorised, base_model=stranger)


def test_rows_without_subjects_and_plain_text_can_be_forgotten(memorised):
    forget = [dataclasses.replace(row, subject="", secret="") for row in memorised.forget[:3]]
    forget.append(Row(text="Once there was a dog who lived near the mill."))
    made = split(memorised, forget=forget, density=0.05, group_size=32)
    assert made.report["target"]["name"] == "hold_down"
