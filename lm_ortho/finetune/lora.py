"""LoRA fine-tuning on rows: plants a memory, or teaches a surrogate what may be kept."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D

from lm_ortho.data.encoding import Example
from lm_ortho.errors import UserError
from lm_ortho.finetune.train import FinetunePlan, fine_tune
from lm_ortho.hub import first_line
from lm_ortho.runtime.progress import ProgressCallback


def train_adapter(
    model: torch.nn.Module,
    examples: Sequence[Example],
    plan: FinetunePlan,
    progress: ProgressCallback,
    stage: str = "adapter",
    state: Path | None = None,
) -> PeftModel:
    """A copy of ``model`` with a trained LoRA on all linear layers but the LM head; ``model`` is left unchanged.

    Experts that share a tensor have an adapter each.

    Of a ``PeftModel`` with a trainable adapter, that adapter is trained further instead of a new one. Loss, batches
    and ``state`` are those of ``fine_tune``.

    Raises:
        UserError: for a model without linear layers, and for one that peft does not adapt.
    """
    adapted = copy.deepcopy(model).float() if isinstance(model, PeftModel) else _with_lora(model, plan)
    fine_tune(adapted, examples, plan, progress, stage, state)
    return adapted


def save_adapter(adapted: PeftModel, directory: Path, base: str) -> None:
    """Writes the adapter in peft's format and BF16, with ``base`` as the name of its model."""
    state = {name: tensor.bfloat16() for name, tensor in adapted.state_dict().items() if "lora_" in name}
    adapted.save_pretrained(str(directory), state_dict=state)
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": base}
    for name in ("target_modules", "target_parameters"):
        config[name] = sorted(config[name]) if config.get(name) else config.get(name)  # the order of a set differs
    file.write_text(json.dumps(config, indent=2))
    (directory / "README.md").unlink(missing_ok=True)  # an empty form of peft that names the path of the base


def _with_lora(model: torch.nn.Module, plan: FinetunePlan) -> PeftModel:
    modules = dict(model.named_modules())
    names = lora_targets(model)
    transposed = {_transposed(module) for name, module in modules.items() if _ends_in(name, names)}
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=2 * plan.rank,
        lora_dropout=0.0,
        target_modules=names,
        target_parameters=stacked_experts(model) or None,
        fan_in_fan_out=transposed == {True},
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed)
        try:
            with without_notices():
                return get_peft_model(copy.deepcopy(model).float(), config)
        except ValueError as error:  # Mamba, say, whose fused kernels pass the adapter by
            raise UserError(
                f"pretrained: peft does not adapt {type(model).__name__} ({first_line(error)}); use method=full"
            ) from None


@contextmanager
def without_notices() -> Iterator[None]:
    """Inside, peft may call what transformers will rename without a warning, which no user can do anything about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def stacked_experts(model: torch.nn.Module) -> list[str]:
    """The last two parts of the names of all weights that hold one matrix per expert."""
    stacks = (
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and not isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Conv1d)
    )
    return sorted({".".join(name.split(".")[-2:]) for name in stacks})


def lora_targets(model: torch.nn.Module) -> list[str]:
    """The last parts of the names of all linear layers but the LM head; whole names where the head shares a part.

    Where some linear layers are plain ones, those with a ``forward`` of their own are left out: a router is one of
    them, which does not bear an adapter.

    Raises:
        UserError: for a model without linear layers.
    """
    modules = dict(model.named_modules())
    head = getattr(model, "get_output_embeddings", lambda: None)()
    body = {name: module for name, module in modules.items() if module is not head}
    wanted = [name for name, module in body.items() if _plain(module) or _transposed(module)]
    wanted = wanted or [name for name, module in body.items() if isinstance(module, torch.nn.Linear)]  # Falcon's
    if not wanted:
        raise UserError(f"pretrained: {type(model).__name__} has no linear layer to adapt; use method=full")
    parts = sorted({name.rpartition(".")[2] for name in wanted})
    return parts if {name for name in modules if _ends_in(name, parts)} == set(wanted) else wanted


def _ends_in(name: str, parts: Sequence[str]) -> bool:
    """Whether peft takes ``parts`` to mean the module ``name``."""
    return any(name == part or name.endswith(f".{part}") for part in parts)


def _plain(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and type(module).forward is torch.nn.Linear.forward


def _transposed(module: torch.nn.Module) -> bool:
    """The linear layer of GPT-2 and its kin, which stores its weight as (in_features, out_features)."""
    return isinstance(module, Conv1D)
