"""LoRA of peft on decomposed models: the numbers of the plain model, gradients for the adapter only, no merge."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners import tuners_utils
from peft.tuners.lora.model import LoraModel
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.trainer_utils import validate_quantization_for_training

from lm_ortho import adapter, alpha_scope, checkpoint, set_alpha
from lm_ortho.errors import UserError
from lm_ortho.layer import OrthoLinear, find_linear, get_alpha, get_streams, linear_form, ortho_layers, patch, unpatch
from lm_ortho.plugin import bridges
from lm_ortho.streams import LayerStreams, OrthoStream
from tests.support import tiny
from tests.support.paths import REPOSITORY

IDS = tiny.tokens()


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """peft and transformers warn about each other here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def load(saved_checkpoint: tuple[nn.Module, Path]) -> Callable[..., Any]:
    """A function that loads the checkpoint as a user of transformers does."""

    def from_pretrained(dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(saved_checkpoint[1], dtype=dtype)

    return from_pretrained


def make_config(targets: Any = "all-linear", **settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": targets, **settings})


def adapt(model: Any, config: LoraConfig | None = None, **options: Any) -> Any:
    """Adds an adapter that changes the output: peft starts with B = 0."""
    peft_model = get_peft_model(model, config or make_config(), **options)
    randomise(peft_model)
    return peft_model.eval()


def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def adapt_plain(model: nn.Module, alpha: float, directory: Path) -> Any:
    """The plain weights of a decomposed model with an adapter from ``directory``, as peft itself computes them."""
    return PeftModel.from_pretrained(tiny.unpatched_model(model, alpha), directory)


def stream_bytes(model: nn.Module) -> dict[str, bytes]:
    return {
        f"{name}.{key}": tensor.view(torch.uint8).numpy().tobytes()
        for name, layer in ortho_layers(model).items()
        for key, tensor in layer._buffers.items()
        if tensor is not None
    }


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_numbers_are_those_of_the_plain_model(load: Any, tmp_path: Path) -> None:
    model, bare = adapt(load()), tiny.logits(load())
    model.save_pretrained(tmp_path)
    for alpha in (0.0, 1.0, 0.5):
        set_alpha(model, alpha)
        assert get_alpha(model) == alpha
        assert (tiny.logits(model) - tiny.logits(adapt_plain(load(), alpha, tmp_path))).abs().max() <= 1e-5
        assert (tiny.logits(model) - bare).abs().max() > 0.1  # the adapter does something
    each = torch.stack([tiny.logits_at(model, alpha)[row] for row, alpha in enumerate((1.0, 0.0, 1.0))])
    assert torch.allclose(tiny.logits_at(model, [1.0, 0.0, 1.0]), each, atol=1e-5)


def test_in_bf16_the_error_is_that_of_a_plain_bf16_model(load: Any, tmp_path: Path) -> None:
    exact, model = adapt(load()), adapt(load(torch.bfloat16))
    assert tiny.logits(model).dtype == torch.bfloat16
    exact.save_pretrained(tmp_path)
    for alpha in (0.0, 1.0):
        expected = tiny.logits_at(exact, alpha)
        plain_error = (
            (tiny.logits(adapt_plain(load(torch.bfloat16), alpha, tmp_path)) - expected).square().mean().sqrt()
        )
        error = (tiny.logits_at(model, alpha) - expected).square().mean().sqrt()
        assert 0 < error < 1.5 * plain_error


def test_every_decomposed_layer_is_a_linear_layer(load: Any) -> None:
    model = load()
    names = set(ortho_layers(model))
    peft_model = get_peft_model(model, make_config())
    assert {name.removesuffix(".base_layer") for name in ortho_layers(model)} == names
    assert all(name.endswith(".base_layer") for name in ortho_layers(model))
    # A second adapter finds the same layers, not those inside the first one.
    peft_model.add_adapter("second", make_config())
    assert set(peft_model.peft_config["second"].target_modules) == set(peft_model.peft_config["default"].target_modules)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_only_the_adapter_gets_gradients_and_they_are_those_of_the_plain_model(
    load: Any, alpha: float, tmp_path: Path
) -> None:
    model = adapt(load()).double().train()
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(tiny.unpatched_model(load().double(), alpha), tmp_path, is_trainable=True)
    plain = plain.double().train()
    with alpha_scope(alpha):
        model(IDS, labels=IDS).loss.backward()
    plain(IDS, labels=IDS).loss.backward()
    actual, expected = gradients(model), gradients(plain)
    assert actual.keys() == expected.keys()
    assert len(actual) == 2 * len(ortho_layers(model))
    for name, gradient in actual.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_computes_again_at_the_alpha_of_the_forward_pass(load: Any, use_reentrant: bool) -> None:
    """The backward pass lies outside of the scope, as in any training loop, and another alpha came in between."""

    def compute(with_checkpointing: bool) -> dict[str, torch.Tensor]:
        model = adapt(load()).train()
        if with_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        losses = []
        for alpha in (1.0, 0.25):
            with alpha_scope(alpha):
                losses.append(model(IDS, labels=IDS, use_cache=False).loss)
        set_alpha(model, 0.5)
        sum(losses).backward()
        return gradients(model)

    expected, actual = compute(False), compute(True)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert torch.allclose(gradient, expected[name], atol=1e-6), name


def test_a_saved_adapter_loads_on_a_model_loaded_afresh(load: Any, tmp_path: Path) -> None:
    model = adapt(load(), make_config(["q_proj", "down_proj"]))
    model.save_pretrained(tmp_path)
    others = [
        PeftModel.from_pretrained(load(), tmp_path),
        PeftModel.from_pretrained(load(), tmp_path, low_cpu_mem_usage=True),
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32),
    ]
    for alpha in (0.0, 1.0):
        for other in others:
            with alpha_scope(alpha):
                assert torch.equal(tiny.logits(other), tiny.logits(model))


def test_adapters_can_be_switched_deleted_and_removed(load: Any) -> None:
    model = adapt(load(), make_config(["q_proj"]))
    set_alpha(model, 1.0)
    first, plain = tiny.logits(model), tiny.logits_at(load(), 1.0)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), plain)
    model.add_adapter("second", make_config(["v_proj"], use_rslora=True))
    model.set_adapter("second")
    randomise(model, seed=1)
    assert not torch.allclose(tiny.logits(model), first)
    model.delete_adapter("second")
    model.set_adapter("default")
    randomise(model)
    assert torch.equal(tiny.logits(model), first)
    bare = model.unload()
    assert isinstance(bare.model.layers[0].self_attn.q_proj, OrthoLinear)
    assert torch.equal(tiny.logits(bare), plain)
    unpatch(bare, 1.0)


def test_rows_of_a_batch_may_have_different_adapters(load: Any) -> None:
    model = adapt(load(), make_config(["q_proj"]))
    with torch.no_grad(), alpha_scope(1.0):
        mixed = model(input_ids=IDS, adapter_names=["default", "__base__", "default"]).logits
        adapted = model(input_ids=IDS).logits
        with model.disable_adapter():
            bare = model(input_ids=IDS).logits
    assert torch.allclose(mixed, torch.stack([adapted[0], bare[1], adapted[2]]), atol=1e-5)


def test_a_merge_is_refused_before_anything_is_merged(load: Any) -> None:
    model = adapt(load(), make_config(["embed_tokens", "q_proj"]))  # the embedding comes first and could be merged
    set_alpha(model, 1.0)
    before = tiny.logits(model)
    for merge in (
        model.merge_and_unload,
        model.merge_adapter,
        model.base_model.model.model.layers[0].self_attn.q_proj.merge,
    ):
        with pytest.raises(UserError, match=r"cannot be merged into a decomposed model.*export.*merge it there"):
            merge()
        assert torch.equal(tiny.logits(model), before)
    model.unmerge_adapter()
    assert torch.equal(tiny.logits(model), before)


def test_the_advised_way_to_a_merged_model_keeps_the_numbers(load: Any, tmp_path: Path) -> None:
    model = adapt(load())
    model.save_pretrained(tmp_path)
    set_alpha(model, 1.0)
    merged = adapt_plain(load(), 1.0, tmp_path).merge_and_unload()
    assert (tiny.logits(merged) - tiny.logits(model)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora of LoraConfig is not possible"),
        ({"use_qalora": True}, "use_qalora of LoraConfig is not possible"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens of LoraConfig is not possible"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not possible"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' is not possible"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal' is not possible"),
    ],
)
def test_what_needs_a_dense_weight_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    before = stream_bytes(model := tiny.patched_model())
    with pytest.raises(UserError, match=message):
        get_peft_model(model, make_config(**{"targets": ["q_proj"], **settings}))
    assert stream_bytes(model) == before


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"lora_dropout": 0.5}, {"init_lora_weights": "gaussian"}])
def test_other_settings_of_lora(load: Any, settings: dict[str, Any]) -> None:
    model = get_peft_model(load(), make_config(["q_proj"], **settings)).train()
    model(IDS, labels=IDS).loss.backward()
    assert any(gradient.abs().max() > 0 for gradient in gradients(model).values())


def test_the_layers_of_gpt2_need_no_fan_in_fan_out(tmp_path: Path) -> None:
    """Their plain weights are transposed, which peft is told by this setting; the streams are not."""
    settings = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 128, "n_positions": 32}
    model = tiny.from_config(GPT2Config(**settings, bos_token_id=0, eos_token_id=1))
    with linear_form(model):
        streams = tiny.model_streams(model, group_size=8)
    patch(model, streams)
    plain = tiny.unpatched_model(model, 1.0)
    adapted = adapt(model, make_config(["c_attn", "c_fc"], fan_in_fan_out=True))
    adapted.save_pretrained(tmp_path)
    set_alpha(adapted, 1.0)
    expected = tiny.logits(PeftModel.from_pretrained(plain, tmp_path))
    assert (tiny.logits(adapted) - expected).abs().max() < 1e-5


def test_a_custom_class_of_the_user_comes_first() -> None:
    class Own(adapter.LoraOrthoLinear):
        pass

    config = make_config(["q_proj"])
    config._register_custom_module({OrthoLinear: Own})
    model = get_peft_model(tiny.patched_model(), config)
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj) is Own


def test_plain_models_get_the_layers_of_peft() -> None:
    model = get_peft_model(tiny.llama(), make_config())
    assert not any(isinstance(module, adapter.LoraOrthoLinear) for module in model.modules())
    randomise(model)
    before = tiny.logits(model.eval())
    assert (tiny.logits(model.merge_and_unload()) - before).abs().max() < 1e-4


PLACES = [
    (LoraModel, "_create_new_module", staticmethod),
    (LoraModel, "_check_merge_allowed", lambda function: function),
    (tuners_utils, "_maybe_include_all_linear_layers", lambda function: function),
]


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft as it is without us."""
    for owner, name, kind in PLACES:
        monkeypatch.setattr(owner, name, kind(getattr(owner, name).__wrapped__))


def is_registered() -> list[bool]:
    return [hasattr(getattr(owner, name), adapter._MARK) for owner, name, _ in PLACES]


def test_registering_twice_changes_nothing() -> None:
    functions = [getattr(owner, name) for owner, name, _ in PLACES]
    adapter.register()
    assert [getattr(owner, name) for owner, name, _ in PLACES] == functions


def test_the_bridge_registers(unregistered: None) -> None:
    assert is_registered() == [False] * 3
    with pytest.raises(ValueError, match=r"OrthoLinear.* is not supported"):
        get_peft_model(tiny.patched_model(), make_config(["q_proj"]))
    bridges.BRIDGES["peft.tuners.lora.model"](sys.modules["peft.tuners.lora.model"])
    assert is_registered() == [True] * 3


def test_loading_a_checkpoint_registers_where_the_start_up_hook_is_off(unregistered: None, load: Any) -> None:
    load()
    assert is_registered() == [True] * 3


def test_preparation_for_kbit_training_and_the_checks_of_the_trainer(load: Any) -> None:
    model = prepare_model_for_kbit_training(load(torch.bfloat16))
    before = stream_bytes(model)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        validate_quantization_for_training(model)
    peft_model = get_peft_model(model, make_config()).train()
    validate_quantization_for_training(peft_model)
    peft_model(IDS, labels=IDS).loss.backward()
    assert len(gradients(peft_model)) == 2 * len(ortho_layers(peft_model))
    assert sorted(stream_bytes(model).values()) == sorted(before.values())


def test_an_adapter_added_by_transformers_is_saved_alone(load: Any, tmp_path: Path) -> None:
    model = load()
    model.add_adapter(make_config(["q_proj"]))
    randomise(model)
    validate_quantization_for_training(model)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*base*"))
    assert not (tmp_path / "config.json").exists()
    again = load()
    again.load_adapter(str(tmp_path))
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_what_a_model_with_an_adapter_cannot_be_is_said(load: Any, tmp_path: Path) -> None:
    model = adapt(load(), make_config(["q_proj"]))
    for action in (
        lambda: checkpoint.save(tmp_path / "a", model),
        lambda: model.base_model.model.save_pretrained(tmp_path / "a"),
        lambda: checkpoint.attach(model),
    ):
        with pytest.raises(UserError, match=r"q_proj' carries an adapter.*unload"):
            action()
    with pytest.raises(UserError, match=r"unpatch: layer .*q_proj' carries an adapter.*unload"):
        unpatch(model, 1.0)
    with pytest.raises(UserError, match="decomposed already"):
        find_linear(model)
    assert list(tmp_path.iterdir()) == []
    assert len(get_streams(model)) == 14


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 2.0, "much", True, None, [0.0, 1.0], {"alice": 1.0}])
def test_a_bad_alpha_of_a_model_with_an_adapter_is_one_line(alpha: Any) -> None:
    model = get_peft_model(tiny.patched_model(), make_config(["q_proj"]))
    with pytest.raises(UserError, match=r"^(set_)?alpha"):
        set_alpha(model, alpha)
    assert get_alpha(model) == 0.0


def test_each_memory_keeps_its_alpha_beside_an_adapter(tmp_path: Path) -> None:
    model = tiny.llama()
    streams = {}
    for name, layer in tiny.model_streams(model, density=0.1).items():
        ortho = layer.ortho.to_dense()
        is_left = torch.zeros(layer.shape, dtype=torch.bool)
        is_left[:, ::2] = True
        parts = {"alice": is_left, "bob": ~is_left}
        memories = {key: OrthoStream.from_dense(ortho, part & layer.ortho.support()) for key, part in parts.items()}
        streams[name] = LayerStreams(layer.base, None, layer.bias, memories)
    patch(model, streams)
    adapted = adapt(copy.deepcopy(model))
    adapted.save_pretrained(tmp_path)
    for alphas in ({"alice": 1.0, "bob": 0.0}, {"alice": 0.0, "bob": 0.5}):
        set_alpha(adapted, alphas)
        plain = copy.deepcopy(model)
        unpatch(plain, alphas)
        expected = tiny.logits(PeftModel.from_pretrained(plain, tmp_path))
        assert (tiny.logits(adapted) - expected).abs().max() < 1e-4
    with pytest.raises(UserError, match="no memory 'carol'; it has 'alice', 'bob'"):
        set_alpha(adapted, {"carol": 1.0})


def test_memory_footprint_counts_streams_and_adapter(load: Any) -> None:
    model = load()
    streams_only = model.get_memory_footprint()
    tensors = [*model.parameters(), *model.buffers()]
    assert streams_only == sum(tensor.nbytes for tensor in tensors)
    peft_model = get_peft_model(model, make_config())
    lora_bytes = sum(p.nbytes for name, p in peft_model.named_parameters() if "lora_" in name)
    assert peft_model.get_memory_footprint() == streams_only + lora_bytes


def test_relearning_at_alpha_zero_lowers_the_loss_and_leaves_the_streams_as_they_are(load: Any) -> None:
    model = get_peft_model(load(), make_config(r=8)).train()
    before = stream_bytes(model)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert stream_bytes(model) == before
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    # The dial still works on both: the streams at their alpha, the adapter beside them.
    assert not torch.allclose(tiny.logits_at(model.eval(), 1.0), tiny.logits_at(model, 0.0))


@pytest.mark.slow
def test_a_fresh_interpreter_without_the_start_up_hook(saved_checkpoint: tuple[nn.Module, Path]) -> None:
    script = (
        "import sys, lm_ortho; assert 'peft' not in sys.modules\n"
        f"model = lm_ortho.load({str(saved_checkpoint[1])!r})\n"
        "from peft import LoraConfig, get_peft_model\n"
        "print(type(get_peft_model(model, LoraConfig(target_modules=['q_proj']))"
        ".base_model.model.model.layers[0].self_attn.q_proj).__name__)"
    )
    process = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(REPOSITORY), "LM_ORTHO_AUTOLOAD": "0", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.stdout.strip() == "LoraOrthoLinear", process.stderr
