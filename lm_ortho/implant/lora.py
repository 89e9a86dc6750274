"""LoRA fine-tuning on rows: plants a memory, or teaches a surrogate what may be kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lm_ortho.calibration.examples import Example
from lm_ortho.implant.train import Notify, Plan, fine_tune

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def train_adapter(
    model: torch.nn.Module,
    examples: Sequence[Example],
    plan: Plan,
    notify: Notify,
    stage: str = "adapter",
    state: Path | None = None,
) -> PeftModel:
    """A copy of ``model`` with a trained LoRA on all linear layers but the LM head; ``model`` is left unchanged.

    Of a ``PeftModel`` with a trainable adapter, that adapter is trained further instead of a new one. Loss, batches
    and ``state`` are those of ``fine_tune``.
    """
    adapted = copy.deepcopy(model).float() if isinstance(model, PeftModel) else _with_lora(model, plan)
    fine_tune(adapted, examples, plan, notify, stage, state)
    return adapted


def _with_lora(model: torch.nn.Module, plan: Plan) -> PeftModel:
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=2 * plan.rank,
        lora_dropout=0.0,
        target_modules=_targets(model),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed)
        return get_peft_model(copy.deepcopy(model).float(), config)


def _targets(model: torch.nn.Module) -> list[str] | str:
    """Last names of the linear layers where all of them are usual ones, else whole names, else peft's own choice.

    A router may be an ``nn.Linear`` with a ``forward`` of its own, which does not bear an adapter.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    named = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    last = {name.rpartition(".")[2] for name in named}
    if last <= set(PROJECTIONS):
        return [name for name in PROJECTIONS if name in last] or "all-linear"
    return [name for name, m in named.items() if type(m).forward is torch.nn.Linear.forward] or "all-linear"
