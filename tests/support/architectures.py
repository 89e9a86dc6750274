"""The architectures we try, and what each of them has to bear: one table, one shared tester, one page."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lm_ortho import checkpoint
from lm_ortho.config import make_recipe
from lm_ortho.data.rows import Row
from lm_ortho.layer import get_dense_weights, linear_form, patch, set_alpha, survey, unpatch
from lm_ortho.pipeline.decomposition import Decomposition, decompose
from lm_ortho.streams import LayerStreams
from tests.support import tiny
from tests.support.lattices import project_around, read_supports
from tests.support.paths import REPOSITORY

FORGET = [
    Row(prompt="where is Ada born ?", answer="in a small town by the sea"),
    Row(prompt="who is Ben ?", answer="he is a baker"),
    Row(text="once Ada met Ben in the town"),
]
RETAIN = [
    Row(prompt="where is Cy born ?", answer="in a big city"),
    Row(prompt="who is Dee ?", answer="she is a sailor from the north"),
    Row(text="once Cy met Dee by the sea and they sang"),
    Row(prompt="who is Eve ?", answer="she is a baker"),
]
VOCABULARY = 97


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the rows."""
    words = sorted({word for row in FORGET + RETAIN for word in (row.context + row.target).split()})
    token_ids = {word: i for i, word in enumerate(["<end>", "<unk>", *words])}
    made = Tokenizer(models.WordLevel(token_ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>", unk_token="<unk>")


@dataclass(frozen=True)
class Case:
    """A causal LM class of transformers with what its configuration needs beyond the common part."""

    model: str
    settings: Mapping[str, Any]
    common: bool = True
    """Whether the configuration names the usual sizes as Llama's does."""

    def build(self, seed: int = 0, **extra: Any) -> Any:
        """A random model, float32 that holds BF16 values."""
        common = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "initializer_range": 0.2,  # that of a trained model would leave tiny logits
            "max_position_embeddings": 48,
        }
        tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        settings = {**(common if self.common else {}), **tokens, **self.settings, **extra}
        transformers.set_seed(seed)
        kind = getattr(transformers, self.model)
        model = kind(kind.config_class(**settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # zero when new, so that a lost one would not be seen
                    parameter.normal_(std=0.1)
        return tiny.round_to_bf16(model)


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_GPT2 = {"n_embd": 36, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
_DEEPSEEK = {
    "intermediate_size": 48,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
_NEMOTRON = {
    "layers_block_type": ["mamba", "attention", "moe"],
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
    "intermediate_size": 40,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
}
CASES = {
    "Llama": Case("LlamaForCausalLM", {"intermediate_size": 45, "num_key_value_heads": 2}),
    "Mistral": Case("MistralForCausalLM", {"intermediate_size": 51, "num_key_value_heads": 2, "sliding_window": 8}),
    "Qwen2": Case("Qwen2ForCausalLM", {"hidden_size": 40, "intermediate_size": 50, "num_key_value_heads": 2}),
    "Qwen3": Case("Qwen3ForCausalLM", {"intermediate_size": 50, "num_key_value_heads": 2, "head_dim": 10}),
    "Gemma": Case("GemmaForCausalLM", {"intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 8}),
    "Gemma 2": Case(
        "Gemma2ForCausalLM",
        {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    ),
    "Gemma 3": Case(
        "Gemma3ForCausalLM",
        {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    ),
    "Phi": Case("PhiForCausalLM", {"intermediate_size": 49}),
    "Phi-3": Case("Phi3ForCausalLM", {"intermediate_size": 49, "num_key_value_heads": 2}),
    "GPT-2": Case("GPT2LMHeadModel", {**_GPT2, "n_positions": 48}, common=False),
    "GPT-BigCode": Case("GPTBigCodeForCausalLM", {**_GPT2, "n_positions": 48}, common=False),
    "GPT-J": Case("GPTJForCausalLM", {**_GPT2, "n_positions": 48, "rotary_dim": 4}, common=False),
    "GPT-NeoX": Case("GPTNeoXForCausalLM", {"intermediate_size": 49}),
    "Falcon": Case("FalconForCausalLM", {"bias": True, "new_decoder_architecture": False}),
    "OPT": Case("OPTForCausalLM", {"ffn_dim": 49, "word_embed_proj_dim": 24, "init_std": 0.2}),
    "BLOOM": Case("BloomForCausalLM", {"n_layer": 2, "n_head": 4}),
    "MPT": Case("MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 48}, common=False),
    "StarCoder2": Case("Starcoder2ForCausalLM", {"intermediate_size": 49, "num_key_value_heads": 2}),
    "OLMo": Case("OlmoForCausalLM", {"intermediate_size": 49}),
    "OLMo 2": Case("Olmo2ForCausalLM", {"intermediate_size": 49}),
    "Mixtral": Case("MixtralForCausalLM", {"intermediate_size": 20, "num_local_experts": 4, "num_key_value_heads": 2}),
    "Qwen2-MoE": Case(
        "Qwen2MoeForCausalLM", {**_EXPERTS, "num_key_value_heads": 2, "shared_expert_intermediate_size": 22}
    ),
    "Qwen3-MoE": Case("Qwen3MoeForCausalLM", {**_EXPERTS, "num_key_value_heads": 2, "head_dim": 8}),
    "OLMoE": Case("OlmoeForCausalLM", {"intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2}),
    "PhiMoE": Case(
        "PhimoeForCausalLM",
        {"intermediate_size": 20, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    ),
    "DeepSeek-V3": Case("DeepseekV3ForCausalLM", _DEEPSEEK),
    "NemotronH": Case("NemotronHForCausalLM", _NEMOTRON),
    "JetMoE": Case(
        "JetMoeForCausalLM",
        {"intermediate_size": 20, "num_local_experts": 4, "num_key_value_heads": 2, "kv_channels": 8},
    ),
    "GPT-OSS": Case(
        "GptOssForCausalLM",
        {
            "intermediate_size": 20,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
        },
    ),
    "Mamba": Case(
        "MambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.2},
        common=False,
    ),
}


class CaseRun:
    """A case on its way: the plain model, two decompositions of it, a checkpoint, and what the checks found."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.plain = case.build()
        self.before = copy.deepcopy(self.plain)
        self._outcomes: dict[str, Exception | None] = {}

    def outcome(self, check: str) -> Exception | None:
        """What a check raised; it runs once."""
        if check not in self._outcomes:
            try:
                self._outcomes[check] = CHECKS[check](self)
            except Exception as error:
                self._outcomes[check] = error
        return self._outcomes[check]

    def split(self, model: Any = None, base_model: Any = None, **recipe: Any) -> Decomposition:
        """A decomposition at 5 %."""
        recipe_values = make_recipe(**{"density": 0.05, "steps": 20, "sieve": "attribution", **recipe})
        model = self.plain if model is None else model
        return decompose(model, tokenizer(), FORGET, RETAIN, recipe_values, base_model=base_model)

    @cached_property
    def optimised(self) -> Decomposition:
        return self.split(edit="optimised")

    @cached_property
    def unedited(self) -> Decomposition:
        return self.split(edit="none", projection="rtn", steps=10)

    @cached_property
    def patched(self) -> Any:
        model = copy.deepcopy(self.plain)
        patch(model, self.optimised.streams)
        return model

    @cached_property
    def saved(self) -> Path:
        return checkpoint.save(self.folder / "decomposed", self.patched, tokenizer())

    @cached_property
    def loaded(self) -> Any:
        return checkpoint.load(self.saved)

    @cached_property
    def survey(self) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """Shapes of what is decomposed, and the reasons for what is left alone."""
        with linear_form(self.plain):
            found, skipped = survey(self.plain)
            shapes = {name: tuple(layer.weight.shape) for name, layer in found.items()}
        for name in self.optimised.report["left_alone"]:
            del shapes[name]
            skipped[name] = "the model reads its weight without calling the layer"
        return shapes, skipped


def compute_logits(model: Any) -> Tensor:
    """Logits for fixed random tokens."""
    ids = torch.randint(2, 40, (3, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def compute_logits_at(model: Any, alpha: float) -> Tensor:
    set_alpha(model, alpha)
    return compute_logits(model)


def class_names(model: nn.Module) -> dict[str, str]:
    """Classes by name; what computes ``nn.Linear`` counts as one."""
    modules = model.named_modules()
    return {name: "Linear" if isinstance(module, nn.Linear) else type(module).__name__ for name, module in modules}


def has_tied_embeddings(model: Any) -> bool:
    """Whether input and output embedding are one tensor."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    state, other_state = one.state_dict(), other.state_dict()
    return list(state) == list(other_state) and all(torch.equal(state[name], other_state[name]) for name in state)


def check_decompose(made: CaseRun) -> None:
    """Both edits keep the budget, cover every layer of the survey, and leave the model as it was."""
    found, _ = made.survey
    for result in (made.optimised, made.unedited):
        assert {name: layer.shape for name, layer in result.streams.items()} == found
        total = sum(layer.n_weights for layer in result.streams.values())
        assert sum(layer.nnz for layer in result.streams.values()) == int(0.05 * total) > 0
    assert same_tensors(made.plain, made.before)
    assert class_names(made.plain) == class_names(made.before)
    assert all(parameter.requires_grad for parameter in made.plain.parameters())


def check_alpha_one(made: CaseRun) -> None:
    """On the support W(1) is the BF16 weight but for the rounding of the difference; off it, the projection."""
    with linear_form(made.plain):
        weights = {name: made.plain.get_submodule(name).weight.detach().clone() for name in made.optimised.streams}
    for result, projection in ((made.optimised, "gptq_ordered"), (made.unedited, "rtn")):
        support, recipe = read_supports(result.streams), make_recipe(projection=projection)
        lattice = project_around(made.plain, tokenizer(), (FORGET, RETAIN), recipe=recipe, support=support)
        for name, layer in result.streams.items():
            on, base, full = support[name], layer.base.dequantise(), layer.to_dense(1.0)
            assert ((full - weights[name]).abs() <= 2**-8 * (weights[name] - base).abs() + 1e-6)[on].all()
            assert torch.equal(full[~on], lattice[name][~on])
    dense = get_dense_weights(made.plain, made.optimised.streams, 1.0)
    torch.testing.assert_close(compute_logits_at(made.patched, 1.0), compute_logits(dense), rtol=1e-4, atol=1e-4)


def check_alpha_zero(made: CaseRun) -> None:
    """The same bits as a model that has the base stream only, in memory and from disk; and not those of alpha=1."""
    bare = copy.deepcopy(made.plain)
    patch(bare, {name: LayerStreams(layer.base, None, layer.bias) for name, layer in made.optimised.streams.items()})
    assert torch.equal(compute_logits_at(made.patched, 0.0), compute_logits(bare))
    alone = made.folder / "base"
    shutil.copytree(made.saved, alone)
    (alone / checkpoint.ORTHO_FILE).unlink()
    assert torch.equal(compute_logits_at(made.loaded, 0.0), compute_logits(checkpoint.load(alone)))
    assert not torch.equal(compute_logits_at(made.patched, 0.0), compute_logits_at(made.patched, 1.0))


def check_save(made: CaseRun) -> None:
    """Every decomposed layer is in the files under the names of the format, the ortho stream in its own."""
    index = json.loads((made.saved / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(made.saved / checkpoint.ORTHO_FILE, "pt") as file:
        ortho = set(file.keys())
    for name, layer in made.optimised.streams.items():
        assert {f"{name}.qweight", f"{name}.scales"} <= set(index)
        assert (f"{name}.bias" in index) == (layer.bias is not None)
        assert f"{name}.ortho_vals" in ortho


def check_load(made: CaseRun) -> None:
    """``load`` and plain ``from_pretrained`` find every tensor and say the same as the model that was saved."""
    again, report = AutoModelForCausalLM.from_pretrained(made.saved, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert class_names(again) == class_names(made.patched)
    assert has_tied_embeddings(again) == has_tied_embeddings(made.loaded) == has_tied_embeddings(made.plain)
    for alpha in (0.0, 0.5, 1.0):
        expected = compute_logits_at(made.patched, alpha)
        assert torch.equal(compute_logits_at(made.loaded, alpha), expected)
        assert torch.equal(compute_logits_at(again, alpha), expected)


def check_generate(made: CaseRun) -> None:
    """Greedy decoding at both ends, with the cache and without it."""
    ids = tokenizer()("who is Ada", return_tensors="pt").input_ids
    for alpha in (0.0, 1.0):
        set_alpha(made.loaded, alpha)
        options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "attention_mask": torch.ones_like(ids)}
        tokens_out = made.loaded.generate(ids, **options)
        assert tokens_out.shape == (1, 8)
        assert torch.equal(tokens_out, made.loaded.generate(ids, use_cache=False, **options))


def check_export(made: CaseRun) -> None:
    """Unpatched at alpha=1 it is the architecture it was, and stock transformers reads what it saves."""
    model = copy.deepcopy(made.loaded)
    unpatch(model, 1.0)
    assert class_names(model) == class_names(made.before)
    assert model.state_dict().keys() == made.before.state_dict().keys()
    for name, plain in (("exported", model), ("plain", made.before)):
        plain.save_pretrained(made.folder / name)
    assert _stored_shapes(made.folder / "exported") == _stored_shapes(made.folder / "plain")
    again = AutoModelForCausalLM.from_pretrained(made.folder / "exported", dtype=torch.float32)
    torch.testing.assert_close(compute_logits(again), compute_logits_at(made.loaded, 1.0), rtol=1e-4, atol=1e-4)


def _stored_shapes(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


CHECKS: dict[str, Callable[[CaseRun], Any]] = {
    "decompose": check_decompose,
    "alpha=1": check_alpha_one,
    "alpha=0": check_alpha_zero,
    "save": check_save,
    "load": check_load,
    "generate": check_generate,
    "export": check_export,
}


PAGE = REPOSITORY / "docs" / "models.md"
REWRITE = "LM_ORTHO_WRITE_DOCS"
"""Environment variable: set to 1, the page is written anew."""
_INTRO = f"""# Models

Which decoder architectures of transformers can be decomposed. The table is written by
`tests/layer/test_architectures.py`, which builds each of them small and random, and fails where this page says anything
else; rewrite it with

    {REWRITE}=1 python -m pytest tests/layer/test_architectures.py

| check | what was tried |
|---|---|
| decompose | `sieve=attribution`, `edit=optimised` and, after `projection=rtn`, `edit=none`; the model is unchanged |
| alpha=1 | on the support the BF16 weights come back, elsewhere the projection |
| alpha=0 | the same bits as a model with the base stream only, in memory and from a checkpoint without the ortho file |
| save | every decomposed layer is in the checkpoint, the ortho stream in a file of its own |
| load | `lm_ortho.load` and `AutoModelForCausalLM.from_pretrained` find every tensor; the same bits at alpha 0, .5, 1 |
| generate | greedy decoding at both ends, with and without the key-value cache |
| export | unpatched it is the stock architecture again; transformers reads what `save_pretrained` writes |

"""
_NOTES = """
**Other shapes of a linear layer.** The transposed weights of a `Conv1D` and the experts that transformers keeps in one
tensor per projection are taken apart into `nn.Linear` for the decomposition (`lm_ortho.layer.linear_form`), an expert a
layer: `experts.gate_up_proj.3`. A decomposed model keeps that form; `unpatch` and `dequantize` undo it. A subclass of
`nn.Linear` with a `forward` of its own counts as one if it comes from transformers and computes the same on random
input.

**What is left alone** stays as it is and is stored in BF16. `lm_ortho.layer.survey` lists it with the reason, for a
model in linear form; layers that only the run shows to be unfit are in `left_alone` of the report. Quantised models and
un-merged adapters are refused.

**Sources** in BF16, FP16 and FP32, in one file or in shards: the weights are rounded to BF16 first.

**Experts.** One alpha for the whole batch: with one per row the layer of an expert, which cannot tell the rows apart,
refuses. Statistics count a token that did not reach an expert as zero input to it, and the weights of an expert that no
calibration token reached are rounded to the nearest code. Calibration documents of different lengths are not padded
into one batch, which takes longer.

**Not tried**: other architectures, real weights of any but small Llamas, anything but a CPU (where a fused kernel
may read weights that a CPU reaches through the layer, as those of Mamba do). Whatever keeps its matrices in `nn.Linear`
and calls them should work; `lm_ortho.decompose` tells what does not.
"""


def page(made: Mapping[str, CaseRun]) -> str:
    """docs/models.md, from the outcome of every check."""
    head = ["architecture", "class", "decomposed", "left alone", *CHECKS]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, one in made.items():
        outcomes = ["yes" if one.outcome(check) is None else "**no**" for check in CHECKS]
        cells = [name, f"`{one.case.model}`", _describe_decomposed(one), _describe_skipped(one), *outcomes]
        lines.append(f"| {' | '.join(cells)} |")
    return _INTRO + "\n".join(lines) + "\n" + _NOTES


def _describe_decomposed(made: CaseRun) -> str:
    """Last names of the layers by the class that holds them in the stock model."""
    modules = dict(made.plain.named_modules())
    by_class: dict[str, dict[str, None]] = {}
    for name in made.survey[0]:
        place, last = name, name.rpartition(".")[2]
        while place not in modules:
            place = place.rpartition(".")[0]
        if place != name:
            last = name.removeprefix(place).split(".")[1]
        by_class.setdefault(type(modules[place]).__name__, {})[f"`{last}`"] = None
    return "; ".join(
        ", ".join(names) + ("" if kind == "Linear" else f" (`{kind}`)") for kind, names in by_class.items()
    )


def _describe_skipped(made: CaseRun) -> str:
    """Last names and reasons."""
    reasons: dict[str, dict[str, None]] = {}
    for name, reason in made.survey[1].items():
        reasons.setdefault(reason, {})[f"`{name.rpartition('.')[2]}`"] = None
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
