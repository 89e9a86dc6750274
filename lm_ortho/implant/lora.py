"""LoRA fine-tuning on rows: plants a memory, or teaches a surrogate what may be kept."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lm_ortho.calibration.examples import Example, answer_loss

Notify = Callable[[str, int, int, str], None]
"""Called with the stage, the steps done, the steps in all and a short text."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Plan:
    """How an adapter is trained: AdamW, warm-up of 20 steps, then a straight line to zero."""

    steps: int
    rows: int = 32
    lr: float = 5e-3
    rank: int = 16
    seed: int = 0


def train_adapter(
    model: torch.nn.Module, examples: Sequence[Example], plan: Plan, notify: Notify, stage: str = "adapter"
) -> PeftModel:
    """A copy of ``model`` with a trained LoRA on all linear layers but the LM head; ``model`` is left unchanged.

    The loss is that of the answer tokens. Batches go through shuffled passes over ``examples``. A ``PeftModel``
    is trained further instead, in place.
    """
    if isinstance(model, PeftModel):
        adapted = model
    else:
        present = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        known = [name for name in PROJECTIONS if name in present]
        config = LoraConfig(
            r=plan.rank,
            lora_alpha=2 * plan.rank,
            lora_dropout=0.0,
            target_modules=known if known else "all-linear",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(plan.seed)
            adapted = get_peft_model(copy.deepcopy(model).float(), config)
    adapted.train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.0)
    draw, order = random.Random(plan.seed), list[int]()
    for step in range(plan.steps):
        optimiser.param_groups[0]["lr"] = plan.lr * min((step + 1) / 20, 1 - step / plan.steps)
        if len(order) < plan.rows:
            order += draw.sample(range(len(examples)), len(examples))
        batch, order = order[: plan.rows], order[plan.rows :]
        loss = answer_loss(adapted, [examples[i] for i in batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 10 == 9 or step + 1 == plan.steps:
            notify(stage, step + 1, plan.steps, f"loss {loss.item():.3f}")
    adapted.eval()
    return adapted
