"""Planting a memory and merging it: the base model is left alone, damaged inputs are told in one line."""

from __future__ import annotations

import copy
import json
import random
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, T5Config

from lm_ortho.data.encoding import Example, answer_loss, encode
from lm_ortho.errors import UserError
from lm_ortho.finetune import (
    FinetunePlan,
    load_causal_lm,
    load_config,
    merge_adapter,
    round_to_bf16,
    save_adapter,
    train,
    train_adapter,
    train_full,
)
from lm_ortho.runtime.precision import fast_matmul
from lm_ortho.runtime.progress import no_progress
from tests.support import architectures, tiny

PLAN = FinetunePlan(steps=35, rows=5, lr=1e-2, rank=4)


@pytest.fixture(scope="module")
def planted(memorised, tmp_path_factory):
    """The base model and an adapter on disk, with the peft model they came from and what was told meanwhile."""
    told = []
    examples = encode(memorised.tokenizer, memorised.forget)
    adapted = train_adapter(memorised.base, examples, PLAN, lambda *step: told.append(step), stage="memory")
    directory = tmp_path_factory.mktemp("planted")
    memorised.base.save_pretrained(directory / "base")
    adapted.save_pretrained(directory / "adapter")
    return directory, adapted, told


def test_an_adapter_teaches_and_leaves_the_model_alone(memorised, planted):
    _, adapted, told = planted
    examples = encode(memorised.tokenizer, memorised.forget)
    with torch.no_grad():
        before, after = answer_loss(memorised.base, examples), answer_loss(adapted, examples)
    assert after < before - 0.3
    assert not any("lora" in name for name, _ in memorised.base.named_parameters())
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name and "lm_head" not in name for name in trained)
    assert [step[:3] for step in told] == [("memory", step, 35) for step in (10, 20, 30, 35)]


def test_the_same_plan_trains_the_same_adapter(memorised, planted):
    _, adapted, _ = planted
    examples = encode(memorised.tokenizer, memorised.forget)
    again = train_adapter(memorised.base, examples, PLAN, lambda *_: None)
    ours, theirs = dict(adapted.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_full_fine_tuning_moves_all_weights_of_a_copy_and_goes_on_where_it_stopped(memorised, tmp_path, monkeypatch):
    examples = encode(memorised.tokenizer, memorised.forget)
    before = {name: tensor.clone() for name, tensor in memorised.base.state_dict().items()}
    plan = FinetunePlan(steps=12, rows=4, lr=3e-3)
    tuned = train_full(memorised.base, examples, plan, lambda *_: None)
    assert all(torch.equal(before[name], tensor) for name, tensor in memorised.base.state_dict().items())
    assert all(not torch.equal(before[name], tensor) for name, tensor in tuned.named_parameters())
    with torch.no_grad():
        assert answer_loss(tuned, examples) < answer_loss(memorised.base, examples) - 0.3
    assert not any(parameter.requires_grad for parameter in tuned.parameters())

    def interrupted(stage, step, steps, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_KEEP_EVERY", 5)
    with pytest.raises(KeyboardInterrupt):
        train_full(memorised.base, examples, plan, interrupted, state=tmp_path / "state.pt")
    again = train_full(memorised.base, examples, plan, lambda *_: None, state=tmp_path / "state.pt")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in tuned.state_dict().items())


def test_dropout_depends_on_the_seed_alone_also_after_an_interruption(memorised, tmp_path, monkeypatch):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(memorised.tokenizer), n_positions=128)
    model, examples = tiny.from_config(config), encode(memorised.tokenizer, memorised.forget)
    plan = FinetunePlan(steps=12, rows=4, lr=3e-3)

    def tuned(seed, progress=no_progress, **kept):
        torch.manual_seed(seed)
        return train_full(model, examples, plan, progress, **kept).state_dict()

    def interrupted(stage, step, steps, text):
        raise KeyboardInterrupt

    first, state = tuned(1), tmp_path / "state.pt"
    monkeypatch.setattr(train, "_KEEP_EVERY", 5)
    with pytest.raises(KeyboardInterrupt):
        tuned(2, interrupted, state=state)
    for again in (tuned(3), tuned(4, state=state)):
        assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_merging_from_disk_is_the_trained_model_in_bf16(memorised, planted):
    directory, adapted, _ = planted
    merged = merge_adapter(load_causal_lm(directory / "base"), directory / "adapter")
    expected = round_to_bf16(copy.deepcopy(adapted).merge_and_unload()).state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, expected[name])
        assert torch.equal(tensor, tensor.bfloat16().float())
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert not merged.training


def test_a_model_is_loaded_in_float32_with_bf16_values(tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight.add_(1e-4)
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(str(tmp_path))
    for parameter in loaded.parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameter.bfloat16().float())
    assert not loaded.training


def written(directory, model=None):
    (tiny.llama() if model is None else model).save_pretrained(directory)
    return directory


def test_models_that_cannot_be_used_are_told_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    T5Config(vocab_size=10, d_model=8).save_pretrained(tmp_path / "t5")
    packed = written(tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (packed / "config.json").write_text(json.dumps(config))
    short = written(tmp_path / "short")
    weights = short / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    lost = written(tmp_path / "lost")
    (lost / "model.safetensors").unlink()
    partly = written(tmp_path / "partly")
    held = load_file(partly / "model.safetensors")
    kept = {name: tensor for name, tensor in held.items() if "layers.0.mlp.up_proj" not in name}
    save_file(kept, partly / "model.safetensors", metadata={"format": "pt"})
    other = written(tmp_path / "other")
    up = "model.layers.0.mlp.up_proj.weight"
    save_file(held | {up: torch.zeros(3, 5)}, other / "model.safetensors", metadata={"format": "pt"})
    nan = written(tmp_path / "nan")
    save_file(held | {up: held[up] * torch.nan}, nan / "model.safetensors", metadata={"format": "pt"})
    broken = written(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    told = {
        "nowhere": "no such directory",
        "empty": "holds no config.json",
        "t5": "is an encoder-decoder model",
        "packed": r"already packed \(gptq\)",
        "short": "damaged|could not be loaded",
        "lost": "could not be loaded",
        "broken": "config could not be read",
        "partly": rf"the files lack 1 weights of LlamaForCausalLM, first {up}; they would be random",
        "other": rf"{up} is 3 x 5 in the files and \d+ x \d+ by the config",
        "nan": rf"1 weights hold NaN or infinite values, first {up}",
    }
    for name, message in told.items():
        with pytest.raises(UserError, match=message) as caught:
            load_causal_lm(tmp_path / name)
        assert str(caught.value).startswith("pretrained=")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such directory"):
        load_config("./nowhere")


def test_adapters_that_do_not_fit_are_told_in_one_line(planted, tmp_path):
    directory, _, _ = planted
    with pytest.raises(UserError, match=r"peft='.*nowhere': no adapter_config\.json there"):
        merge_adapter(tiny.llama(), tmp_path / "nowhere")
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UserError, match=r"no adapter_config\.json there"):
        merge_adapter(tiny.llama(), tmp_path / "adapter")
    other = tiny.llama(hidden_size=32, intermediate_size=48)
    with pytest.raises(UserError, match=r"could not be merged \(.* size mismatch for ") as caught:
        merge_adapter(other, directory / "adapter")
    assert "\n" not in str(caught.value)


def renamed(old, new):
    return lambda held: {name.replace(old, new): tensor for name, tensor in held.items()}


DAMAGED = {
    "of another family": (
        renamed("model.layers", "transformer.h"),
        r"\d+ of its tensors fit no layer of the model, first ",
    ),
    "of one layer": (
        lambda held: {name: tensor for name, tensor in held.items() if "layers.0." in name},
        r"it lacks \d+ of the tensors that its config and the model ask for, first .*layers\.1\.",
    ),
    "of nan": (
        lambda held: {name: tensor * torch.nan for name, tensor in held.items()},
        r"\d+ weights hold NaN or infinite values, first ",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.filterwarnings("error")
def test_an_adapter_that_would_plant_nothing_or_half_is_refused(planted, tmp_path, case):
    directory, _, _ = planted
    change, message = DAMAGED[case]
    place = shutil.copytree(directory / "adapter", tmp_path / "adapter")
    file = place / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(UserError, match=f"^peft='.*adapter': {message}"):
        merge_adapter(load_causal_lm(directory / "base"), place)


def test_an_adapter_among_the_files_of_a_model_is_not_taken_for_merged(planted, tmp_path):
    directory, _, _ = planted
    both = shutil.copytree(directory / "base", tmp_path / "both")
    for file in (directory / "adapter").glob("adapter_*"):
        shutil.copy(file, both)
    with pytest.raises(UserError, match=r"an adapter lies among the model's files and is not merged"):
        load_causal_lm(both)
    with pytest.raises(UserError, match="holds an adapter, not the model it belongs to"):
        load_causal_lm(directory / "adapter")


def test_batches_go_through_every_example_once_a_pass_with_little_padding():
    examples = [Example(tuple(range(1 + (i * 7) % 40)), ()) for i in range(160)]
    batches = train.draw_batches(examples, 10, random.Random(0))
    first = [next(batches) for _ in range(16)]
    assert sorted(i for batch in first for i in batch) == list(range(160))
    spread = [max(len(examples[i].ids) for i in b) - min(len(examples[i].ids) for i in b) for b in first]
    assert max(spread) <= 3
    again = train.draw_batches(examples, 10, random.Random(0))
    assert [next(again) for _ in range(16)] == first
    second = [next(batches) for _ in range(16)]
    assert sorted(i for batch in second for i in batch) == list(range(160))
    assert second != first


@given(n=st.integers(1, 60), rows=st.integers(1, 20))
def test_batches_are_full_and_even_for_any_size(n, rows):
    batches = train.draw_batches([Example((0,) * (1 + i % 5), ()) for i in range(n)], rows, random.Random(1))
    drawn = [next(batches) for _ in range(40)]
    assert all(len(batch) == rows for batch in drawn)
    assert {i for batch in drawn for i in batch} <= set(range(n))


def test_low_precision_products_only_where_the_hardware_has_them(monkeypatch):
    a = torch.ones(4, 4)
    for capable, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capable: {"avx512_bf16": c}, raising=False)
        with fast_matmul():
            assert (a @ a).dtype == dtype


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "JetMoE", "GPT-OSS"])
def test_experts_in_one_tensor_learn_too_and_are_merged(name, tmp_path):
    model = architectures.CASES[name].build()
    stacks = {key: value.clone() for key, value in model.named_parameters() if value.dim() == 3}
    examples = encode(architectures.tokenizer(), architectures.FORGET)
    adapted = train_adapter(model, examples, FinetunePlan(steps=12, rows=4, lr=1e-2, rank=2), lambda *_: None)
    save_adapter(adapted, tmp_path / "adapter", "base")
    merged = merge_adapter(copy.deepcopy(model), tmp_path / "adapter")
    with torch.no_grad():
        before, after, saved = (answer_loss(each.float(), examples).item() for each in (model, adapted, merged))
    assert after < before - 0.3
    assert saved == pytest.approx(after, abs=0.1)  # rounded to BF16
    changed = dict(merged.named_parameters())
    assert stacks
    assert all(not torch.equal(changed[key], value) for key, value in stacks.items())
    assert all(torch.equal(value, stacks[key]) for key, value in model.named_parameters() if key in stacks)


def test_a_model_that_peft_does_not_adapt_is_told():
    model = architectures.CASES["Mamba"].build()
    examples = encode(architectures.tokenizer(), architectures.FORGET)
    with pytest.raises(UserError, match=r"peft does not adapt MambaForCausalLM .* use method=full"):
        train_adapter(model, examples, PLAN, lambda *_: None)
