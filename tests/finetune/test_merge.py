"""Merges: every kind of adapter computes the same merged as un-merged, or is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from lm_ortho.errors import UserError
from lm_ortho.finetune import load_causal_lm, merge_adapter
from lm_ortho.finetune.adapter import find_adapter_tokenizer, fit_vocabulary
from lm_ortho.finetune.merge import merge_peft_model, merge_with_report
from lm_ortho.finetune.merge_check import WeightChange, check_logits, draw_probe_ids
from tests.support import tiny
from tests.support.paths import REPOSITORY

Q = ["q_proj", "v_proj"]
HEAD, EMBEDDING = "lm_head", "embed_tokens"
pytestmark = pytest.mark.filterwarnings("ignore")  # of peft, about what is tested here


@pytest.fixture(autouse=True)
def compilers_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what peft leaves of ``CC=gcc`` and ``CXX=gcc`` in the environment when a test adds a BOFT adapter."""
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "before")
        monkeypatch.delenv(name)


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": Q, "task_type": "CAUSAL_LM", **options})


MERGEABLE: dict[str, Callable[[], Any]] = {
    "LoRA": lora,
    "rsLoRA": lambda: lora(use_rslora=True),
    "DoRA": lambda: lora(use_dora=True),
    "PiSSA": lambda: lora(init_lora_weights="pissa"),
    "LoRA with a bias": lambda: lora(lora_bias=True),
    "all biases": lambda: lora(bias="all"),
    "biases of LoRA layers": lambda: lora(bias="lora_only"),
    "patterns": lambda: lora(rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 16}),
    "dropout": lambda: lora(lora_dropout=0.5),
    "embedding": lambda: lora(target_modules=[*Q, EMBEDDING]),
    "embedding, DoRA": lambda: lora(target_modules=[*Q, EMBEDDING], use_dora=True),
    "head": lambda: lora(target_modules=[*Q, HEAD]),
    "head and embedding": lambda: lora(target_modules=[*Q, HEAD, EMBEDDING]),
    "tied embedding": lambda: lora(target_modules=[*Q, EMBEDDING], ensure_weight_tying=True),
    "whole embedding": lambda: lora(modules_to_save=[EMBEDDING]),
    "whole head": lambda: lora(modules_to_save=[HEAD]),
    "whole tied embedding": lambda: lora(modules_to_save=[EMBEDDING], ensure_weight_tying=True),
    "whole norm": lambda: lora(modules_to_save=["norm"]),
    "tokens": lambda: lora(trainable_token_indices=[3, 7]),
    "tokens of head and embedding": lambda: lora(trainable_token_indices={HEAD: [3], EMBEDDING: [9]}),
    "parameters": lambda: lora(target_modules=None, target_parameters=["mlp.up_proj.weight"]),
    "LoHa": lambda: peft.LoHaConfig(target_modules=Q, r=4),
    "LoKr": lambda: peft.LoKrConfig(target_modules=Q, r=4),
    "IA3": lambda: peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4),
    "OFT": lambda: peft.OFTConfig(target_modules=Q, oft_block_size=4, r=0),
    "BOFT": lambda: peft.BOFTConfig(target_modules=Q, boft_block_size=4),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=Q, total_step=10, init_r=4, target_r=2),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["norm", "input_layernorm"]),
    "trainable tokens": lambda: peft.TrainableTokensConfig(target_modules=[EMBEDDING], token_indices=[3, 5]),
}
UNTIED = {"embedding", "embedding, DoRA", "head", "head and embedding", "whole embedding", "whole head"} | {
    "tokens of head and embedding"
}
"""Kinds after which tied embeddings are two different matrices."""


def base_model(*, tied: bool = False, vocab_size: int = 128) -> Any:
    return tiny.llama(tie_word_embeddings=tied, attention_bias=True, vocab_size=vocab_size)


def write_adapter(directory: Path, model: Any, config: Any, scale: float = 0.05) -> Path:
    """Writes an adapter whose trained weights are moved by noise."""
    torch.manual_seed(1)
    peft_model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    peft_model.save_pretrained(directory)
    return directory


def logits(model: Any) -> Tensor:
    ids = tiny.tokens(3, 12)
    ids[0, :5] = torch.tensor([3, 7, 9, 5, 3])
    with torch.no_grad():
        return model(ids).logits


TIED = [kind for kind in MERGEABLE if any(part in kind for part in ("embedding", "head", "tokens"))]
CASES = [*((kind, False) for kind in MERGEABLE), ("LoRA", True), *((kind, True) for kind in TIED)]


@pytest.mark.parametrize(("kind", "tied"), CASES, ids=[f"{kind}{', tied' * tied}" for kind, tied in CASES])
def test_a_merged_adapter_computes_what_it_computed_before(kind: str, tied: bool, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "adapter", base_model(tied=tied), MERGEABLE[kind]())
    live = logits(peft.PeftModel.from_pretrained(base_model(tied=tied), directory).eval())
    plain_model = base_model(tied=tied)
    plain = logits(plain_model)
    before = {name: parameter.clone() for name, parameter in plain_model.named_parameters()}
    merged = merge_with_report(plain_model, directory)
    # 1. The logits are those of the adapter, but for rounding to BF16, whose error the report has.
    error = float((logits(merged.model) - live).norm() / (live - plain).norm())
    assert error < 3 * merged.effect.rounding_error
    assert error < 0.5
    # 2. The config says whether the embeddings share their weight, and a written copy is the same model.
    is_tied = tied and kind not in UNTIED
    assert merged.model.config.tie_word_embeddings is is_tied
    assert (merged.model.lm_head.weight is merged.model.model.embed_tokens.weight) is is_tied
    merged.model.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_causal_lm(tmp_path / "merged")), logits(merged.model))
    # 3. The report counts each weight that differs once.
    after = dict(merged.model.named_parameters())
    new_head = after["lm_head.weight"].numel() if tied and not is_tied else 0
    assert merged.change.weights == sum(parameter.numel() for parameter in before.values()) + new_head
    before.setdefault("lm_head.weight", before["model.embed_tokens.weight"])
    assert merged.change.changed == sum(int((tensor != before[name]).sum()) for name, tensor in after.items())
    assert 0.5 < merged.change.surviving_share < 1.1
    assert f"{merged.change.changed:,} of {merged.change.weights:,} weights changed" in merged.describe()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "prompt tuning": (
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "PROMPT_TUNING cannot be merged into the weights of any model: it trains virtual tokens",
    ),
    "prefix tuning": (
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "PREFIX_TUNING cannot be merged into the weights of any model",
    ),
    "p-tuning": (
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "P_TUNING cannot be merged into the weights of any model",
    ),
    "adaption prompt": (
        lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
        "ADAPTION_PROMPT cannot be merged into the weights of any model",
    ),
    "activated LoRA": (lambda: lora(alora_invocation_tokens=[3, 4]), "an activated LoRA .* acts only after"),
    "layer replication": (
        lambda: lora(layer_replication=[(0, 1), (0, 2)]),
        "layer_replication makes layers that share",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_that_weights_cannot_hold_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    config, message = REFUSED[kind]
    directory = write_adapter(tmp_path / "adapter", base_model(), config())
    with pytest.raises(UserError, match=f"^peft='.*adapter': {message}") as caught:
        merge_adapter(base_model(), directory)
    assert "\n" not in str(caught.value)


def test_a_wrong_merge_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_adapter(tmp_path / "adapter", base_model(), lora())
    correct = peft.tuners.lora.Linear.get_delta_weight
    monkeypatch.setattr(peft.tuners.lora.Linear, "get_delta_weight", lambda *args: 1.5 * correct(*args))
    with pytest.raises(
        UserError, match=r"^peft='.*adapter': peft merges this LORA adapter wrongly: .* differs .* by 0\.\d+ times"
    ):
        merge_adapter(base_model(), directory)


def test_a_wrong_merge_of_a_trained_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    peft_model = peft.get_peft_model(base_model(), lora(init_lora_weights=False))
    correct = peft.tuners.lora.Linear.get_delta_weight
    monkeypatch.setattr(peft.tuners.lora.Linear, "get_delta_weight", lambda *args: -correct(*args))
    with pytest.raises(UserError, match=r"^method=lora: peft merges this LORA adapter wrongly"):
        merge_peft_model(peft_model, tiny.tokens(2, 6), "method=lora")


def test_the_tolerance_is_a_share_of_the_effect() -> None:
    live = torch.tensor([[10.0, 20.0, 30.0], [1.0, -torch.inf, 1.0]])[None]  # as for padding tokens
    plain = live.where(live.isinf(), 0.0)
    check_logits(plain, live, live * 1.005, source="peft", kind="LORA")
    for wrong in (live * 1.05, live * torch.nan):
        with pytest.raises(UserError, match="wrongly"):
            check_logits(plain, live, wrong, source="peft", kind="LORA")


def test_a_merge_leaves_the_compilers_of_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft leaves ``CXX=gcc`` where its CUDA extension for BOFT cannot be compiled; the CPU kernel needs a C++ one."""
    directory = write_adapter(tmp_path / "adapter", base_model(), MERGEABLE["BOFT"]())
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", None)
    monkeypatch.setenv("CC", "clang")
    monkeypatch.delenv("CXX", raising=False)
    merge_adapter(base_model(), directory)
    assert os.environ["CC"] == "clang"
    assert "CXX" not in os.environ


def test_nothing_else_in_the_package_merges_adapters() -> None:
    files = [path for path in (REPOSITORY / "lm_ortho").rglob("*.py") if ".merge_and_unload(" in path.read_text()]
    assert [path.name for path in files] == ["merge.py"]


def test_an_adapter_without_effect_is_refused_and_a_small_one_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merges = {}
    for name, scale in (("zero", 0.0), ("tiny", 1e-9), ("small", 1e-4), ("large", 0.1)):
        torch.manual_seed(1)
        model = peft.get_peft_model(base_model(), lora())
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.copy_(torch.randn_like(parameter) * scale)
        model.save_pretrained(tmp_path / name)
        merges[name] = merge_with_report(base_model(), tmp_path / name)
    with pytest.raises(UserError, match=r"^peft='.*zero': the adapter changes no weight .*: all that it adds is zero"):
        merges["zero"].check_effect()
    with pytest.raises(UserError, match="below the resolution of BF16"):
        merges["tiny"].check_effect()
    caplog.clear()
    merges["large"].check_effect()
    assert not caplog.records
    merges["small"].check_effect()
    assert "the adapter changes so little that rounding to BF16 loses much of it" in caplog.text
    assert 0 < merges["small"].change.surviving_share < 0.75


def test_the_surviving_share_is_the_projection_of_the_rounded_change() -> None:
    before = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    change = WeightChange()
    change.add({"w": before}, {"w": before + torch.tensor([[0.5, 0.001, 0.0, 0.0]])})  # half an ulp of 2 is 0.0078
    assert change.changed == 1
    assert change.surviving_share == pytest.approx(0.25 / (0.25 + 1e-6))


def test_probe_ids_leave_out_special_tokens_and_begin_with_trained_ones() -> None:
    model = tiny.llama()
    ids = draw_probe_ids(model, [5, 9, 500])
    assert ids.shape == (4, 16)
    assert ids.flatten()[:2].tolist() == [5, 9]
    assert not {0, 1} & set(ids.flatten().tolist()), "bos, eos and pad of the config"
    assert torch.equal(ids, draw_probe_ids(model, [5, 9, 500]))


# ---------------------------------------------------------------- vocabularies and directories


def resized_model(tokens: int, *, tied: bool = False) -> Any:
    model = base_model(tied=tied)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "config",
    [
        lambda: lora(modules_to_save=[EMBEDDING, HEAD]),
        lambda: lora(target_modules=[*Q, EMBEDDING, HEAD]),
        lambda: lora(trainable_token_indices=[128, 129, 130]),
        lambda: lora(target_modules=[*Q, HEAD]),
    ],
    ids=["whole", "LoRA", "tokens", "head"],
)
def test_the_vocabulary_is_that_of_the_adapter(config: Callable[[], Any], tied: bool, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "adapter", resized_model(131, tied=tied), config())
    live_model = peft.PeftModel.from_pretrained(fitted_model(directory, tied=tied), directory).eval()
    model = fitted_model(directory, tied=tied)
    assert model.config.vocab_size == 131
    first, second = (fitted_model(directory, tied=tied).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items()), "no random rows"
    rows = base_model(tied=tied).get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[:128], rows)
    assert torch.allclose(model.get_input_embeddings().weight[130], rows.mean(0), rtol=0.01)
    merged = merge_adapter(base_model(tied=tied), directory)
    ids = torch.tensor([[5, 130, 128, 7, 129, 9]])
    with torch.no_grad():
        live, result, plain = (network(ids).logits for network in (live_model, merged, model))
    assert result.shape[-1] == 131
    assert float((result - live).norm() / (live - plain).norm()) < 0.1


def fitted_model(directory: Path, *, tied: bool) -> Any:
    model = base_model(tied=tied)
    assert fit_vocabulary(model, directory) == 131
    assert fit_vocabulary(model, directory) is None, "it fits now"
    return model


def test_a_tokenizer_with_more_tokens_grows_the_vocabulary_and_a_foreign_adapter_is_refused(tmp_path: Path) -> None:
    plain = write_adapter(tmp_path / "plain", base_model(), lora())
    assert fit_vocabulary(base_model(), plain, tokens=120) is None, "rows that pad the matrix"
    assert fit_vocabulary(base_model(), plain, tokens=133) == 133
    padding_removed = write_adapter(tmp_path / "less", resized_model(127), lora(modules_to_save=[EMBEDDING, HEAD]))
    assert fit_vocabulary(base_model(), padding_removed) == 127
    foreign = write_adapter(tmp_path / "foreign", resized_model(60), lora(modules_to_save=[EMBEDDING, HEAD]))
    with pytest.raises(UserError, match=r"its vocabulary has 60 tokens, and that of the model 128; it belongs to"):
        merge_adapter(base_model(), foreign)


def test_several_adapters_in_a_directory_are_named(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_adapter(tmp_path / "both" / name, base_model(), lora())
    with pytest.raises(UserError, match=r"no adapter_config\.json there; .*; give one of its folders, .* one, two$"):
        merge_adapter(base_model(), tmp_path / "both")
    merge_adapter(base_model(), tmp_path / "both" / "one")


def test_an_adapter_of_another_hub_model_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = write_adapter(tmp_path / "adapter", base_model(), lora())
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "some/model-instruct"}))
    for name, is_reported in (
        ("some/model", True),
        ("Some/Model-Instruct", False),
        (str(tmp_path), False),
        ("", False),
    ):
        caplog.clear()
        model = base_model()
        model.config._name_or_path = name
        with warnings.catch_warnings():
            merge_adapter(model, directory)
        assert ("was trained on some/model-instruct and is merged into some/model" in caplog.text) is is_reported


def test_missing_tensors_of_a_whole_module_are_named(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "adapter", base_model(), lora(modules_to_save=["norm"]))
    other = write_adapter(tmp_path / "other", base_model(), lora())
    shutil.copy(other / "adapter_model.safetensors", directory)
    with pytest.raises(UserError, match=r"it lacks the tensor '.*norm\.weight' that its config requires"):
        merge_adapter(base_model(), directory)


def test_the_tokenizer_of_an_adapter_is_found(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "adapter", base_model(), lora())
    assert find_adapter_tokenizer(directory) is None
    (directory / "tokenizer_config.json").write_text("{}")
    assert find_adapter_tokenizer(directory) is None, "transformers makes an empty tokenizer of it"
    (directory / "tokenizer.json").write_text("{}")
    assert find_adapter_tokenizer(str(directory)) == str(directory)
    assert find_adapter_tokenizer("some/adapter") is None
