"""LoRA fine-tuning on rows: plants a memory, or teaches a surrogate the retain set."""

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
    """Returns a copy of ``model`` with a trained LoRA adapter on all linear layers but the LM head.

    Experts whose weights are in one tensor get an adapter each. A ``PeftModel`` with a trainable adapter is copied and
    that adapter is trained further, instead of a new one. ``model`` is left unchanged. See ``fine_tune`` for the loss,
    the batches and ``state``.

    Raises:
        UserError: for a model without linear layers, and for one that peft does not adapt.
    """
    peft_model = copy.deepcopy(model).float()
    if not isinstance(model, PeftModel):
        peft_model = add_adapter(peft_model, plan)
    fine_tune(peft_model, examples, plan, progress=progress, stage=stage, state=state)
    return peft_model


def save_adapter(peft_model: PeftModel, directory: Path, base: str) -> None:
    """Writes the adapter in peft's format and BF16, with ``base`` as the name of its base model."""
    state = {name: tensor.bfloat16() for name, tensor in peft_model.state_dict().items() if "lora_" in name}
    peft_model.save_pretrained(str(directory), state_dict=state)
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": base}
    for name in ("target_modules", "target_parameters"):
        # peft writes sets, whose order differs from run to run
        config[name] = sorted(config[name]) if config.get(name) else config.get(name)
    file.write_text(json.dumps(config, indent=2))
    (directory / "README.md").unlink(missing_ok=True)  # an empty template of peft that names the path of the base


def add_adapter(model: torch.nn.Module, plan: FinetunePlan) -> PeftModel:
    """Returns ``model`` with an untrained adapter, whose seed and rank are those of ``plan``; all else is frozen."""
    # 1. Find the layers to adapt, and whether their weights are stored as (in_features, out_features).
    modules = dict(model.named_modules())
    names = find_lora_targets(model)
    weight_layouts = {_is_conv1d(module) for name, module in modules.items() if _is_target(name, names)}
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=2 * plan.rank,
        lora_dropout=0.0,
        target_modules=names,
        target_parameters=find_stacked_experts(model) or None,
        fan_in_fan_out=weight_layouts == {True},
        task_type="CAUSAL_LM",
    )
    # 2. Add an adapter whose initial weights depend on the seed of the plan only.
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed)
        try:
            with suppress_peft_warnings():
                return get_peft_model(model, config)
        except ValueError as error:  # for example Mamba, whose fused kernels bypass the adapter
            raise UserError(
                f"pretrained: peft does not adapt {type(model).__name__} ({first_line(error)}); use method=full"
            ) from None


@contextmanager
def suppress_peft_warnings() -> Iterator[None]:
    """Context without the warning about a deprecated transformers attribute that peft uses; users cannot act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def find_stacked_experts(model: torch.nn.Module) -> list[str]:
    """Returns the last two parts of the names of all parameters that stack one matrix per expert."""
    names = (
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and not isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Conv1d)
    )
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def find_lora_targets(model: torch.nn.Module) -> list[str]:
    """Returns the last parts of the names of all linear layers but the LM head, as ``target_modules`` of peft.

    Whole names are returned if the head has the same last part as a layer. If some linear layers use the ``forward`` of
    ``nn.Linear``, those with another one are left out: a router is one of them and cannot have an adapter.

    Raises:
        UserError: for a model without linear layers.
    """
    # 1. Collect the linear layers but the LM head.
    modules = dict(model.named_modules())
    head = getattr(model, "get_output_embeddings", lambda: None)()
    body = {name: module for name, module in modules.items() if module is not head}
    targets = [name for name, module in body.items() if _is_plain_linear(module) or _is_conv1d(module)]
    # 2. Without plain ones, take those with a forward of their own (Falcon).
    targets = targets or [name for name, module in body.items() if isinstance(module, torch.nn.Linear)]
    if not targets:
        raise UserError(f"pretrained: {type(model).__name__} has no linear layer to adapt; use method=full")
    # 3. Shorten the names if the short ones mean the same modules.
    parts = sorted({name.rpartition(".")[2] for name in targets})
    return parts if {name for name in modules if _is_target(name, parts)} == set(targets) else targets


def _is_target(name: str, parts: Sequence[str]) -> bool:
    """Returns whether peft adapts the module ``name`` for the ``target_modules`` in ``parts``."""
    return any(name == part or name.endswith(f".{part}") for part in parts)


def _is_plain_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and type(module).forward is torch.nn.Linear.forward


def _is_conv1d(module: torch.nn.Module) -> bool:
    """Returns whether this is the linear layer of GPT-2, which stores its weight as (in_features, out_features)."""
    return isinstance(module, Conv1D)
