"""The full decomposition of a merged model into streams, in few steps on a tiny model."""

from __future__ import annotations

import copy
import dataclasses
import importlib

import pytest
import torch

from lm_ortho.calibration.activations import input_moments
from lm_ortho.config import make_recipe
from lm_ortho.data.encoding import encode
from lm_ortho.data.rows import Row
from lm_ortho.edit import EDITS
from lm_ortho.errors import UserError
from lm_ortho.layer import find_linear, patch, set_alpha
from lm_ortho.objective.batches import Batches
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.pipeline.model_lattice import quantise
from lm_ortho.projection import PROJECTIONS
from lm_ortho.sieve import SIEVES
from tests.support import tiny
from tests.support.lattices import project_around, read_supports

pytestmark = pytest.mark.usefixtures("short_surrogate_training")

decompose_module = importlib.import_module("lm_ortho.pipeline.decomposition")
CHEAP = {"sieve": "random", "projection": "rtn", "edit": "zero"}


def split(memorised_models, model=None, base_model=None, forget=None, retain=None, progress=None, **recipe):
    """Decomposes a copy of the memorised model, or ``model``."""
    return decompose(
        copy.deepcopy(memorised_models.merged) if model is None else model,
        memorised_models.tokenizer,
        memorised_models.forget if forget is None else forget,
        memorised_models.retain if retain is None else retain,
        make_recipe(**{"steps": 20, **recipe}),
        base_model=base_model,
        **({} if progress is None else {"progress": progress}),
    )


@pytest.fixture(scope="module")
def decomposition(memorised_models):
    """The default recipe at 5 %, the base model unknown."""
    return split(memorised_models, density=0.05, group_size=32)


def project_again(memorised_models, support):
    """The lattice around the support of ``decomposition``."""
    sets = memorised_models.forget, memorised_models.retain
    recipe = make_recipe(group_size=32)
    return project_around(memorised_models.merged, memorised_models.tokenizer, sets, recipe=recipe, support=support)


def get_weights(memorised_models):
    return {name: layer.weight.detach() for name, layer in find_linear(memorised_models.merged).items()}


def test_alpha_one_is_the_weight_on_the_support(memorised_models, decomposition):
    """HISTORY 5: within 2^-8 of the stored difference."""
    weights = get_weights(memorised_models)
    assert decomposition.streams.keys() == weights.keys()
    lattice = project_again(memorised_models, read_supports(decomposition.streams))
    for name, stream in decomposition.streams.items():
        base, ortho = stream.base.dequantise(), stream.ortho.to_dense()
        on = stream.ortho.support()
        error = (base + ortho - weights[name]).abs()
        assert (error[on] <= 2**-8 * (weights[name] - base).abs()[on] + 1e-12).all()
        assert not ortho[~on].any()
        assert torch.equal(base[~on], lattice[name][~on])


def test_the_ortho_stream_holds_the_density_and_is_not_empty(memorised_models, decomposition):
    weights = sum(stream.base.shape[0] * stream.base.shape[1] for stream in decomposition.streams.values())
    stored_values = sum(stream.ortho.nnz for stream in decomposition.streams.values())
    assert stored_values == int(0.05 * weights) > 0
    assert decomposition.report["support"] == stored_values
    assert decomposition.report["weights"] == weights
    assert decomposition.report["density_reached"] == pytest.approx(stored_values / weights)
    assert decomposition.report["density_reached"] <= 0.05
    lattice = project_again(memorised_models, read_supports(decomposition.streams))
    changed_codes = [stream.base.dequantise() != lattice[name] for name, stream in decomposition.streams.items()]
    assert sum(int(mask.sum()) for mask in changed_codes) > 0.05 * stored_values, (
        "twenty steps of an edit change some codes"
    )
    assert decomposition.report["steps_moved"] > 0.3


def test_the_report_names_the_target_and_the_rows(memorised_models, decomposition):
    assert decomposition.report["target"]["name"] == "swap"
    assert "10 of 10" in decomposition.report["target"]["reason"]
    assert 0 <= decomposition.report["target"]["auc"] <= 1
    assert decomposition.report["base_known"] is False
    assert (decomposition.report["forget_rows"], decomposition.report["retain_rows"]) == (10, 10)


def test_alpha_changes_the_logits(memorised_models, decomposition):
    model = copy.deepcopy(memorised_models.merged)
    patch(model, decomposition.streams)
    ids = torch.tensor([memorised_models.tokenizer(memorised_models.forget[0].context).input_ids])
    logits_by_alpha = []
    for alpha in (0.0, 1.0):
        set_alpha(model, alpha)
        with torch.no_grad():
            logits_by_alpha.append(model(input_ids=ids).logits)
    assert (logits_by_alpha[0] - logits_by_alpha[1]).abs().max() > 1e-2


def test_alpha_one_is_better_than_plain_quantisation_with_the_support_restored(memorised_models, decomposition):
    """The codes off the support make up for their own errors alone, and not for those that alpha=1 takes away."""
    examples = encode(memorised_models.tokenizer, memorised_models.retain)
    plain = quantise(memorised_models.merged, examples, make_recipe(group_size=32))
    moments = input_moments(memorised_models.merged, find_linear(memorised_models.merged), examples)
    errors = {"alpha=1": 0.0, "plain, restored": 0.0}
    for name, weight in get_weights(memorised_models).items():
        assert plain[name].ortho is None
        assert (plain[name].base.dequantise() - weight).norm() < 0.3 * weight.norm()
        streams, scale = decomposition.streams[name], float((weight @ moments[name] * weight).sum())
        restored = torch.where(streams.ortho.support(), weight, plain[name].base.dequantise())
        for variant, values in (("alpha=1", streams.to_dense(1.0)), ("plain, restored", restored)):
            difference = values - weight
            errors[variant] += float((difference @ moments[name] * difference).sum()) / scale
    assert errors["alpha=1"] < errors["plain, restored"]


def stream_bytes(streams):
    return {
        f"{name}.{part}": tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for name, stream in streams.items()
        for part, tensor in (*stream.base.tensors().items(), *stream.ortho.tensors().items())
    }


def test_the_same_inputs_give_the_same_bytes(memorised_models, decomposition):
    """HISTORY 17: noise without a seed once went into the base."""
    torch.manual_seed(1234)
    again = split(memorised_models, density=0.05, group_size=32)
    assert stream_bytes(again.streams) == stream_bytes(decomposition.streams)
    other = split(memorised_models, density=0.05, group_size=32, seed=1, edit="none", sieve="random")
    assert stream_bytes(other.streams) != stream_bytes(decomposition.streams)


def test_the_model_is_restored(memorised_models):
    model = copy.deepcopy(memorised_models.merged)
    trainable = {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    stages = []
    split(memorised_models, model=model, density=0.05, group_size=32, progress=lambda stage, *_: stages.append(stage))
    before = memorised_models.merged.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = ["memory", "statistics", "outputs", "target", "attribution", "projection", "edit"]
    assert list(dict.fromkeys(stages)) == expected


def test_the_model_is_restored_after_a_failure(memorised_models, monkeypatch):
    model = copy.deepcopy(memorised_models.merged)

    def edit_off_support(inputs):
        for layer in inputs.layers.values():
            layer.weight.detach().zero_()
        return {name: codes + 1 for name, codes in inputs.codes.items()}

    monkeypatch.setitem(EDITS._entries, "zero", edit_off_support)
    monkeypatch.setitem(PROJECTIONS._entries, "rtn", lambda w, *_, **__: torch.zeros_like(w, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"changed codes of .* off the support"):
        split(memorised_models, model=model, **CHEAP)
    before = memorised_models.merged.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_known_base_model_decides_the_target_and_allows_w0(memorised_models):
    decomposition = split(memorised_models, base_model=memorised_models.base, density=0.05, group_size=32)
    assert decomposition.report["target"]["name"] == "surrogate"
    assert decomposition.report["base_known"] is True
    decomposition = split(memorised_models, base_model=memorised_models.base, **{**CHEAP, "edit": "w0"})
    assert decomposition.report["target"] is None


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("sieve", sorted(set(SIEVES) - {"attribution", "oracle"}))
def test_every_sieve_meets_the_same_budget(memorised_models, sieve, bits):
    decomposition = split(memorised_models, density=0.02, group_size=32, bits=bits, **{**CHEAP, "sieve": sieve})
    assert decomposition.report["support"] == int(0.02 * decomposition.report["weights"])
    assert all(stream.base.bits == bits for stream in decomposition.streams.values())


def test_the_default_sieve_beats_size_and_rounding_error(memorised_models, forgetting_setup):
    """HISTORY 3: they were once passed off as curvature. The same density, projection and edit for each."""
    factor, objectives = forgetting_setup.objective.weights.retain, {}
    for sieve in ("attribution", "random", "magnitude", "residual"):
        decomposition = split(memorised_models, sieve=sieve, density=0.02, group_size=32, steps=100)
        with torch.no_grad():
            for name, layer in forgetting_setup.layers.items():
                layer.weight.copy_(decomposition.streams[name].base.dequantise())
        forget_loss, retain_loss = forgetting_setup.losses()
        objectives[sieve] = forget_loss + factor * retain_loss
    assert objectives["attribution"] < 0.9 * min(value for sieve, value in objectives.items() if sieve != "attribution")


def test_the_oracle_requires_the_w0_edit(memorised_models):
    with pytest.raises(UserError, match="edit='zero': sieve=oracle scores weights along the path to W0"):
        split(memorised_models, sieve="oracle", edit="zero", base_model=memorised_models.base)
    decomposition = split(
        memorised_models, sieve="oracle", edit="w0", base_model=memorised_models.base, density=0.02, group_size=32
    )
    assert decomposition.report["support"] == int(0.02 * decomposition.report["weights"])


def test_a_step_has_the_rows_of_the_recipe(memorised_models, monkeypatch):
    sizes = []
    draw = Batches.next

    def record(batches):
        rows = draw(batches)
        sizes.append(len(rows))
        return rows

    monkeypatch.setattr(Batches, "next", record)
    split(memorised_models, batch_rows=2)
    assert sizes == [2, 4] * (len(sizes) // 2)
    assert len(sizes) > 10


def test_targets_choose_the_layers(memorised_models):
    decomposition = split(memorised_models, targets="mlp.down_proj", **CHEAP)
    assert list(decomposition.streams) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def test_sixteen_bits_pass_the_weights_through(memorised_models):
    decomposition = split(memorised_models, bits=16, edit="none", sieve="magnitude", density=0.05)
    for name, weight in get_weights(memorised_models).items():
        assert torch.equal(decomposition.streams[name].base.dequantise(), weight)
        assert not decomposition.streams[name].ortho.vals.any()
    assert decomposition.report["steps_moved"] == 0.0


@pytest.mark.parametrize("edit", sorted(set(EDITS) - {"none"}))
def test_sixteen_bits_have_no_codes_to_edit(memorised_models, edit):
    with pytest.raises(UserError, match=r"bits=16 has no lattice, on which .*: add edit=none"):
        split(memorised_models, bits=16, edit=edit)


def test_a_bias_stays_in_the_streams(memorised_models):
    """HISTORY 12: the bias was dropped."""
    model = tiny.llama(vocab_size=len(memorised_models.tokenizer), attention_bias=True)
    with torch.no_grad():
        for layer in find_linear(model).values():
            if layer.bias is not None:
                layer.bias.normal_()
    decomposition = split(memorised_models, model=model, **CHEAP)
    with_bias = [name for name, layer in find_linear(model).items() if layer.bias is not None]
    assert with_bias
    for name, layer in find_linear(model).items():
        bias = decomposition.streams[name].bias
        assert (bias is None) == (layer.bias is None)
        if bias is not None:
            assert torch.equal(bias.float(), layer.bias.detach().bfloat16().float()) or torch.equal(bias, layer.bias)


REFUSALS = {
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


@pytest.mark.parametrize("case", REFUSALS)
def test_invalid_input_is_refused_before_any_work(memorised_models, case):
    options, message = REFUSALS[case]
    with pytest.raises(UserError, match=message) as error_info:
        split(memorised_models, **{"density": 0.05, **options})
    assert "\n" not in str(error_info.value)


def test_two_layers_that_share_a_weight_are_refused(memorised_models):
    model = copy.deepcopy(memorised_models.merged)
    first, second = (model.model.layers[i].mlp.up_proj for i in (0, 1))
    second.weight = first.weight
    with pytest.raises(UserError, match=r"\.0\.mlp\.up_proj and .*1\.mlp\.up_proj share one weight"):
        split(memorised_models, model=model, density=0.05, **CHEAP)


def test_the_same_set_twice_is_refused(memorised_models):
    other_group = [dataclasses.replace(row, group="other") for row in reversed(memorised_models.forget)]
    with pytest.raises(UserError, match="nothing can be both forgotten and kept"):
        split(memorised_models, retain=other_group)


def test_retain_rows_that_are_forgotten_too_are_named_once_and_left_out(memorised_models, caplog):
    decomposition = split(
        memorised_models, retain=[*memorised_models.retain, memorised_models.forget[0]], sieve="random", edit="none"
    )
    assert decomposition.report["retain_rows"] == len(memorised_models.retain)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"].count(
        f"retain: 1 of {len(memorised_models.retain) + 1} rows are also forget rows and are left out"
    ) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_layer(memorised_models, bad):
    model = copy.deepcopy(memorised_models.merged)
    with torch.no_grad():
        find_linear(model)["model.layers.1.mlp.up_proj"].weight[3, 3] = bad
    with pytest.raises(
        UserError, match=r"pretrained: 1 weights hold NaN or infinite values, first model\.layers\.1\.mlp\.up"
    ):
        split(memorised_models, model=model)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("argument", ["pretrained", "base"])
def test_a_nan_anywhere_is_refused_before_anything_is_computed(memorised_models, argument, name):
    model = copy.deepcopy(memorised_models.merged)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = float("nan")
    with pytest.raises(UserError, match=rf"^{argument}: 1 weights hold NaN or infinite values, first {name}"):
        split(memorised_models, **{"model" if argument == "pretrained" else "base_model": model})


def test_a_density_below_one_weight_is_refused(memorised_models):
    with pytest.raises(
        UserError, match=r"density=1e-08 is less than one of the \d+ weights; choose \S+ or more"
    ) as error_info:
        split(memorised_models, density=1e-8, sieve="random", edit="none")
    minimum = float(str(error_info.value).split()[-3])
    assert split(memorised_models, density=minimum, sieve="random", edit="none").report["support"] == 1


def test_truncated_rows_are_a_warning(memorised_models, caplog):
    long = dataclasses.replace(memorised_models.forget[0], answer=memorised_models.forget[0].answer * 40)
    split(memorised_models, forget=[*memorised_models.forget, long], sieve="random", edit="none")
    messages = [record.message for record in caplog.records if "longer than" in record.message]
    assert len(messages) == 1
    assert messages[0].startswith(f"forget: 1 of {len(memorised_models.forget) + 1} rows are longer than ")


@pytest.mark.parametrize("other", [{"intermediate_size": 128}, {"num_hidden_layers": 1}])
def test_a_base_model_of_another_shape_is_refused(memorised_models, other):
    other_model = tiny.llama(vocab_size=len(memorised_models.tokenizer), **other)
    with pytest.raises(UserError, match=r"base: layer .* must be the same architecture"):
        split(memorised_models, base_model=other_model)


def test_rows_without_subjects_and_plain_text_can_be_forgotten(memorised_models):
    forget = [dataclasses.replace(row, subject="", secret="") for row in memorised_models.forget[:3]]
    forget.append(Row(text="Once there was a dog who lived near the mill."))
    decomposition = split(memorised_models, forget=forget, density=0.05, group_size=32)
    assert decomposition.report["target"]["name"] == "hold_down"
