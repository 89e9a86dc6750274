"""Training and merging adapters: the base model is unchanged, and damaged inputs are refused in one line."""

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
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, T5Config

from lm_ortho.data.encoding import ANSWER, CONTEXT, Example, answer_loss, encode
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
from lm_ortho.finetune.lora import add_adapter
from lm_ortho.finetune.train import Goal
from lm_ortho.runtime.precision import fast_matmul
from lm_ortho.runtime.progress import no_progress
from tests.support import architectures, tiny

PLAN = FinetunePlan(steps=35, rows=5, lr=1e-2, rank=4)


@pytest.fixture(scope="module")
def trained_adapter(memorised_models, tmp_path_factory):
    """The directory of the base model and its adapter, the peft model, and the progress reports of its training."""
    reports = []
    examples = encode(memorised_models.tokenizer, memorised_models.forget)
    peft_model = train_adapter(
        memorised_models.base, examples, PLAN, progress=lambda *report: reports.append(report), stage="memory"
    )
    directory = tmp_path_factory.mktemp("trained_adapter")
    memorised_models.base.save_pretrained(directory / "base")
    peft_model.save_pretrained(directory / "adapter")
    return directory, peft_model, reports


def test_an_adapter_learns_and_leaves_the_model_unchanged(memorised_models, trained_adapter):
    _, peft_model, reports = trained_adapter
    examples = encode(memorised_models.tokenizer, memorised_models.forget)
    with torch.no_grad():
        before, after = answer_loss(memorised_models.base, examples), answer_loss(peft_model, examples)
    assert after < before - 0.3
    assert not any("lora" in name for name, _ in memorised_models.base.named_parameters())
    trained_names = [name for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
    assert trained_names
    assert all("lora_" in name and "lm_head" not in name for name in trained_names)
    assert [report[:3] for report in reports] == [("memory", step, 35) for step in range(1, 36)]


def test_the_same_plan_trains_the_same_adapter(memorised_models, trained_adapter):
    _, peft_model, _ = trained_adapter
    examples = encode(memorised_models.tokenizer, memorised_models.forget)
    second_model = train_adapter(memorised_models.base, examples, PLAN, progress=no_progress)
    first, second = dict(peft_model.named_parameters()), dict(second_model.named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_full_fine_tuning_changes_all_weights_of_a_copy_and_resumes(memorised_models, tmp_path, monkeypatch):
    examples = encode(memorised_models.tokenizer, memorised_models.forget)
    before = {name: tensor.clone() for name, tensor in memorised_models.base.state_dict().items()}
    plan = FinetunePlan(steps=12, rows=4, lr=3e-3)
    tuned_model = train_full(memorised_models.base, examples, plan, progress=no_progress)
    assert all(torch.equal(before[name], tensor) for name, tensor in memorised_models.base.state_dict().items())
    assert all(not torch.equal(before[name], tensor) for name, tensor in tuned_model.named_parameters())
    with torch.no_grad():
        assert answer_loss(tuned_model, examples) < answer_loss(memorised_models.base, examples) - 0.3
    assert not any(parameter.requires_grad for parameter in tuned_model.parameters())

    def interrupt(stage, step, steps, text):
        if step == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "_SAVE_STEPS", 5)
    with pytest.raises(KeyboardInterrupt):
        train_full(memorised_models.base, examples, plan, progress=interrupt, state=tmp_path / "state.pt")
    resumed_model = train_full(memorised_models.base, examples, plan, progress=no_progress, state=tmp_path / "state.pt")
    resumed_state = resumed_model.state_dict()
    assert all(torch.equal(tensor, resumed_state[name]) for name, tensor in tuned_model.state_dict().items())


def test_dropout_depends_on_the_seed_alone_also_after_an_interruption(memorised_models, tmp_path, monkeypatch):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(memorised_models.tokenizer), n_positions=128)
    model, examples = tiny.from_config(config), encode(memorised_models.tokenizer, memorised_models.forget)
    plan = FinetunePlan(steps=12, rows=4, lr=3e-3)

    def tune(seed, progress=no_progress, state=None):
        torch.manual_seed(seed)
        return train_full(model, examples, plan, progress=progress, state=state).state_dict()

    def interrupt(stage, step, steps, text):
        if step == 8:
            raise KeyboardInterrupt

    expected, state = tune(1), tmp_path / "state.pt"
    monkeypatch.setattr(train, "_SAVE_STEPS", 5)
    with pytest.raises(KeyboardInterrupt):
        tune(2, interrupt, state=state)
    for result in (tune(3), tune(4, state=state)):
        assert all(torch.equal(tensor, result[name]) for name, tensor in expected.items())


def test_merging_from_disk_is_the_trained_model_in_bf16(memorised_models, trained_adapter):
    directory, peft_model, _ = trained_adapter
    merged_model = merge_adapter(load_causal_lm(directory / "base"), directory / "adapter")
    expected = round_to_bf16(copy.deepcopy(peft_model).merge_and_unload()).state_dict()
    for name, tensor in merged_model.state_dict().items():
        assert torch.equal(tensor, expected[name])
        assert torch.equal(tensor, tensor.bfloat16().float())
    assert not any("lora" in name for name, _ in merged_model.named_modules())
    assert not merged_model.training


def test_a_model_is_loaded_in_float32_with_bf16_values(tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight.add_(1e-4)
    model.save_pretrained(tmp_path)
    loaded_model = load_causal_lm(str(tmp_path))
    for parameter in loaded_model.parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameter.bfloat16().float())
    assert not loaded_model.training


def save_model(directory):
    tiny.llama().save_pretrained(directory)
    return directory


def test_models_that_cannot_be_used_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    T5Config(vocab_size=10, d_model=8).save_pretrained(tmp_path / "t5")
    quantised = save_model(tmp_path / "packed")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantised / "config.json").write_text(json.dumps(config))
    short = save_model(tmp_path / "short")
    weights = short / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    lost = save_model(tmp_path / "lost")
    (lost / "model.safetensors").unlink()
    partly = save_model(tmp_path / "partly")
    tensors = load_file(partly / "model.safetensors")
    incomplete = {name: tensor for name, tensor in tensors.items() if "layers.0.mlp.up_proj" not in name}
    save_file(incomplete, partly / "model.safetensors", metadata={"format": "pt"})
    other = save_model(tmp_path / "other")
    up = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {up: torch.zeros(3, 5)}, other / "model.safetensors", metadata={"format": "pt"})
    nan = save_model(tmp_path / "nan")
    save_file(tensors | {up: tensors[up] * torch.nan}, nan / "model.safetensors", metadata={"format": "pt"})
    broken = save_model(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    messages = {
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
    for name, message in messages.items():
        with pytest.raises(UserError, match=message) as caught:
            load_causal_lm(tmp_path / name)
        assert str(caught.value).startswith("pretrained=")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such directory"):
        load_config("./nowhere")


def test_adapters_that_do_not_fit_are_refused_in_one_line(trained_adapter, tmp_path):
    directory, _, _ = trained_adapter
    with pytest.raises(UserError, match=r"peft='.*nowhere': no adapter_config\.json there"):
        merge_adapter(tiny.llama(), tmp_path / "nowhere")
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UserError, match=r"no adapter_config\.json there"):
        merge_adapter(tiny.llama(), tmp_path / "adapter")
    other = tiny.llama(hidden_size=32, intermediate_size=48)
    with pytest.raises(UserError, match=r"could not be merged \(.* size mismatch for ") as caught:
        merge_adapter(other, directory / "adapter")
    assert "\n" not in str(caught.value)


def rename_tensors(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


DAMAGES = {
    "of another family": (
        rename_tensors("model.layers", "transformer.h"),
        r"\d+ of its tensors fit no layer of the model, first ",
    ),
    "of one layer": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.0." in name},
        r"it lacks \d+ of the tensors that its config and the model require, first .*layers\.1\.",
    ),
    "of nan": (
        lambda tensors: {name: tensor * torch.nan for name, tensor in tensors.items()},
        r"\d+ weights hold NaN or infinite values, first ",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
@pytest.mark.filterwarnings("error")
def test_an_adapter_that_would_be_merged_in_part_or_not_at_all_is_refused(trained_adapter, tmp_path, case):
    directory, _, _ = trained_adapter
    damage, message = DAMAGES[case]
    adapter = shutil.copytree(directory / "adapter", tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file(damage(load_file(file)), file)
    with pytest.raises(UserError, match=f"^peft='.*adapter': {message}"):
        merge_adapter(load_causal_lm(directory / "base"), adapter)


def test_an_adapter_among_the_files_of_a_model_is_refused(trained_adapter, tmp_path):
    directory, _, _ = trained_adapter
    mixed_directory = shutil.copytree(directory / "base", tmp_path / "both")
    for file in (directory / "adapter").glob("adapter_*"):
        shutil.copy(file, mixed_directory)
    with pytest.raises(UserError, match=r"an adapter is among the model's files and is not merged"):
        load_causal_lm(mixed_directory)
    with pytest.raises(UserError, match="holds an adapter, not the model it belongs to"):
        load_causal_lm(directory / "adapter")


def test_every_pass_has_each_example_once_with_little_padding():
    examples = [Example(tuple(range(1 + (i * 7) % 40)), ()) for i in range(160)]
    batches = train.draw_batches(examples, 10, random.Random(0))
    first_pass = [next(batches) for _ in range(16)]
    assert sorted(i for batch in first_pass for i in batch) == list(range(160))
    for batch in first_pass:
        lengths = [len(examples[i].ids) for i in batch]
        assert max(lengths) - min(lengths) <= 3
    same_batches = train.draw_batches(examples, 10, random.Random(0))
    assert [next(same_batches) for _ in range(16)] == first_pass
    second_pass = [next(batches) for _ in range(16)]
    assert sorted(i for batch in second_pass for i in batch) == list(range(160))
    assert second_pass != first_pass


@given(n=st.integers(1, 60), rows=st.integers(1, 20))
def test_batches_are_full_and_even_for_any_size(n, rows):
    batches = train.draw_batches([Example((0,) * (1 + i % 5), ()) for i in range(n)], rows, random.Random(1))
    first_batches = [next(batches) for _ in range(40)]
    assert all(len(batch) == rows for batch in first_batches)
    assert {i for batch in first_batches for i in batch} <= set(range(n))


def draw_examples(count, seed=0, vocabulary=128):
    rng = random.Random(seed)
    examples = []
    for _ in range(count):
        context, answer = rng.randint(1, 6), rng.randint(1, 20)
        ids = tuple(rng.randrange(2, vocabulary) for _ in range(context + answer))
        examples.append(Example(ids, (CONTEXT,) * context + (ANSWER,) * answer))
    return examples


@given(count=st.integers(1, 30), tokens=st.integers(1, 200), seed=st.integers(0, 99))
def test_parts_of_a_batch_hold_the_budget_and_their_shares_are_those_of_the_tokens(count, tokens, seed):
    batch = draw_examples(count, seed)
    parts = train.split_batch(batch, tokens)
    assert sorted(example.ids for part, _ in parts for example in part) == sorted(example.ids for example in batch)
    for part, share in parts:
        assert len(part) == 1 or len(part) * max(len(example.ids) for example in part) <= tokens
        predicted = [sum(role == ANSWER for example in rows for role in example.roles) for rows in (part, batch)]
        assert share == pytest.approx(predicted[0] / predicted[1])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_result_of_training_does_not_depend_on_the_token_budget(method, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # logits stay in float64 as well
    config = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 128, "n_positions": 64}
    config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    examples, plan = draw_examples(12), FinetunePlan(steps=6, rows=8, lr=1e-2, rank=4)
    results, widths = [], []
    for budget in (10**9, 60, 1):
        model = tiny.from_config(GPT2Config(**config)).double()
        model = model.requires_grad_(True) if method == "full" else add_adapter(model, plan).double()
        tokens = []
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, inputs, output, seen=tokens: seen.append(inputs[0].numel()))
        monkeypatch.setattr(train, "max_step_tokens", lambda model, budget=budget: budget)
        train.fine_tune(model, examples, plan, no_progress)
        results.append([parameter.detach() for parameter in model.parameters() if parameter.requires_grad])
        widths.append(tokens)
    assert len(widths[0]) == 6
    assert len(widths[2]) == 48
    assert max(widths[1]) <= 60
    for result in results[1:]:
        for expected, parameter in zip(results[0], result, strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-7, atol=1e-9)


def test_the_budget_is_smaller_for_wider_and_deeper_models_and_for_larger_vocabularies():
    settings = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 1000}
    settings |= {"num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        tokens = [
            train.max_step_tokens(LlamaForCausalLM(LlamaConfig(**settings | change)))
            for change in ({}, {"hidden_size": 1152}, {"num_hidden_layers": 8}, {"vocab_size": 50_000})
        ]
    assert tokens[0] > max(tokens[1:])
    assert min(tokens) > 256


def test_training_computes_logits_of_the_answers_only(memorised_models):
    examples = encode(memorised_models.tokenizer, memorised_models.forget)
    answers = sum(role != CONTEXT for example in examples for role in example.roles[1:])
    plan = FinetunePlan(steps=2, rows=len(examples), rank=2)
    model = add_adapter(copy.deepcopy(memorised_models.base), plan)
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
    train.fine_tune(model, examples, plan, no_progress)
    assert rows == [answers, answers]


def test_a_goal_ends_training_and_a_resumed_run_ends_at_the_same_step(memorised_models, tmp_path, monkeypatch):
    examples = encode(memorised_models.tokenizer, memorised_models.forget)
    plan = FinetunePlan(steps=40, rows=4, lr=1e-2, rank=2)

    def tune(measured, progress=no_progress, state=None):
        def is_reached(model):
            assert not model.training
            measured.append(float(answer_loss(model, examples).detach()))
            return measured[-1] < 2.5

        goal = Goal(is_reached, interval=3, max_loss=3.0)
        model = train_adapter(memorised_models.base, examples, plan, progress, state=state, goal=goal)
        return goal, model

    measured, reports = [], []
    goal, model = tune(measured, progress=lambda *report: reports.append(report))
    assert goal.steps < 40
    assert goal.steps % 3 == 0
    assert measured[-1] < 2.5 <= min([*measured[:-1], 99])
    assert [report[1] for report in reports] == list(range(1, goal.steps + 1))
    assert [report[2] for report in reports] == [40] * (goal.steps - 1) + [goal.steps]

    def interrupt(stage, step, steps, text):
        if step == goal.steps - 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "_SAVE_STEPS", 2)
    with pytest.raises(KeyboardInterrupt):
        tune([], interrupt, state=tmp_path / "state.pt")
    for _ in range(2):  # goes on, and then finds that it has ended
        resumed_goal, resumed_model = tune([], state=tmp_path / "state.pt")
        assert resumed_goal.steps == goal.steps
        for one, other in zip(model.parameters(), resumed_model.parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_goal_is_not_measured_while_the_loss_of_the_batch_is_high():
    goal = Goal(lambda model: pytest.fail("measured"), interval=2, max_loss=1.0)
    assert not goal.check(torch.nn.Linear(2, 2), 4, 1.01)
    assert not goal.check(torch.nn.Linear(2, 2), 5, 0.5)


def test_bf16_products_only_where_the_hardware_has_them(monkeypatch):
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
    plan = FinetunePlan(steps=12, rows=4, lr=1e-2, rank=2)
    peft_model = train_adapter(model, examples, plan, progress=no_progress)
    save_adapter(peft_model, tmp_path / "adapter", "base")
    merged_model = merge_adapter(copy.deepcopy(model), tmp_path / "adapter")
    with torch.no_grad():
        before, after, after_merging = (
            answer_loss(variant.float(), examples).item() for variant in (model, peft_model, merged_model)
        )
    assert after < before - 0.3
    assert after_merging == pytest.approx(after, abs=0.1)  # rounded to BF16
    merged_parameters = dict(merged_model.named_parameters())
    assert stacks
    assert all(not torch.equal(merged_parameters[key], value) for key, value in stacks.items())
    assert all(torch.equal(value, stacks[key]) for key, value in model.named_parameters() if key in stacks)


def test_a_model_that_peft_does_not_adapt_is_refused():
    model = architectures.CASES["Mamba"].build()
    examples = encode(architectures.tokenizer(), architectures.FORGET)
    with pytest.raises(UserError, match=r"peft does not adapt MambaForCausalLM .* use method=full"):
        train_adapter(model, examples, PLAN, progress=no_progress)
