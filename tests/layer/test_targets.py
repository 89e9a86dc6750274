"""Which layers of a model are decomposed, and which models are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config

from lm_ortho.errors import UserError
from lm_ortho.layer import find_linear, survey
from tests.support import tiny

torch.set_num_threads(1)


def test_all_linear_layers_but_the_head():
    model = tiny.llama()
    layers, skip_reasons = survey(model)
    assert len(layers) == 14
    assert all(layers[name] is model.get_submodule(name) for name in layers)
    assert skip_reasons == {"lm_head": "output embedding"}


@pytest.mark.parametrize(
    ("globs", "count"),
    [
        ("", 14),
        ("+", 14),
        ("down_proj", 2),
        ("mlp.*", 6),
        ("*.layers.0.*", 7),
        ("q_proj + k_proj", 4),
        ("model.layers.1.mlp.up_proj", 1),
        ("down_proj+mlp.*", 6),
    ],
)
def test_globs(globs, count):
    assert len(find_linear(tiny.llama(), globs)) == count


@pytest.mark.parametrize(
    ("globs", "message"),
    [
        ("down_prj", "closest: .*down_proj"),
        (
            "down_proj+nothing_like_it",
            "'nothing_like_it' matches no linear layer; last parts of the names: down_proj",
        ),
        ("lm_head", "output embedding"),
    ],
)
def test_a_glob_without_a_match(globs, message):
    with pytest.raises(UserError, match=message):
        find_linear(tiny.llama(), globs)


def test_conv1d_is_listed_as_skipped():
    model = tiny.from_config(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=128, n_positions=32))
    layers, skip_reasons = survey(model)
    assert not layers
    assert sum("Conv1D" in reason for reason in skip_reasons.values()) == 4
    with pytest.raises(UserError, match="Conv1D"):
        find_linear(model)


def test_tied_and_unusual_layers_are_skipped():
    class Odd(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain = nn.ModuleDict(
        {"embed": nn.Embedding(8, 4), "out": nn.Linear(4, 8), "odd": Odd(4, 4), "ok": nn.Linear(4, 4)}
    )
    plain["out"].weight = plain["embed"].weight
    layers, skip_reasons = survey(plain)
    assert set(layers) == {"ok"}
    assert "tied" in skip_reasons["out"]
    assert "forward of its own" in skip_reasons["odd"]


def test_adapters_are_refused():
    """HISTORY 14: wrappers were once sieved as weights."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"q_proj.*un-merged adapter.*merge_and_unload"):
        find_linear(model)
    assert len(find_linear(model.merge_and_unload())) == 14


class Linear4bit(nn.Linear):
    pass


class QuantLinear(nn.Module):
    pass


def packed_variants():
    eight = nn.Linear(4, 4)
    eight.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    fp8 = nn.Linear(4, 4)
    fp8.weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    foreign = nn.Module()
    foreign.register_buffer("qweight", torch.zeros(4, 2, dtype=torch.int32))
    return {"class": Linear4bit(4, 4), "gptq": QuantLinear(), "int8": eight, "fp8": fp8, "buffer": foreign}


@pytest.mark.parametrize("kind", ["class", "gptq", "int8", "fp8", "buffer"])
def test_packed_weights_are_refused_by_name(kind):
    """HISTORY 14: packed bytes were once sieved as weights."""
    plain = nn.ModuleDict({"fine": nn.Linear(4, 4), "packed": packed_variants()[kind]})
    with pytest.raises(UserError, match=r"'packed' is quantised already"):
        find_linear(plain)


def test_other_models_that_cannot_be_decomposed(model):
    with pytest.raises(UserError, match="decomposed already"):
        find_linear(model)
    with pytest.raises(UserError, match="no weights in memory"):
        find_linear(nn.Sequential(nn.Linear(4, 4, device="meta")))
    model_with_config = tiny.llama()
    model_with_config.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(UserError, match="awq"):
        find_linear(model_with_config)
    with pytest.raises(UserError, match="no linear layer"):
        find_linear(nn.Sequential(nn.ReLU()))
