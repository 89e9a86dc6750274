"""RMU (representation misdirection): steers the hidden states of forget rows towards a random vector."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from lm_ortho.baselines.interface import Material, Result, Run, arxiv_link, method
from lm_ortho.baselines.losses import draw_direction, mask_predicting_tokens, misdirection_loss
from lm_ortho.baselines.training import (
    MICRO_BATCH_TOKENS,
    Term,
    TrainingSettings,
    count_example_tokens,
    encode_material,
    learning_rate_grid,
    train_copy,
)
from lm_ortho.calibration.by_block import compute_block_output
from lm_ortho.data.encoding import Example, batch_by_length, pad_batch
from lm_ortho.errors import UserError
from lm_ortho.runtime.precision import transformer_blocks

TRAINED_BLOCKS = 3
"""Number of blocks whose weights are trained: the block whose states are steered, and two before it."""


class RmuSettings(TrainingSettings):
    """Settings of RMU. The paper steers the 8th of 32 blocks and gives the length in absolute terms (6.5 for Zephyr).

    With a weight of 100 for the retain rows the embedded model hardly changes at the lower learning rates.
    """

    depth: float = Field(
        0.5, gt=0, le=1, description="Position of the block whose states are steered, as a share of all blocks."
    )
    length: float = Field(
        2.0, gt=0, description="Length of the vector, relative to the mean length of the states it replaces."
    )
    retain: float = Field(10.0, ge=0, description="Weight of the distance on the retain rows (1200 in the paper).")


def compute_states(model: nn.Module, block: nn.Module, ids: Tensor) -> Tensor:
    """The hidden states after ``block`` (rows, tokens, width) in float32; later blocks are not computed."""
    output = compute_block_output(model, block, ids)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states.float()


def select_blocks(model: nn.Module, depth: float) -> list[nn.Module]:
    """The blocks to be trained; the states after the last of them are steered.

    Raises:
        UserError: for a model without a list of transformer blocks.
    """
    blocks = transformer_blocks(model)
    if not blocks:
        raise UserError(f"method=rmu: {type(model).__name__} has no list of transformer blocks")
    end = math.ceil(depth * len(blocks))
    return blocks[max(0, end - TRAINED_BLOCKS) : end]


@method(
    "rmu",
    objective="mean ||h - c u||^2 over forget rows + `retain` * mean ||h - h_merged||^2 over retain rows; h: states "
    "after a block, u: a random unit vector, c: `length` times the mean ||h_merged|| of forget rows",
    paper=f"Li et al. 2024, {arxiv_link('2403.03218')}, section 4; c relative to the states as in "
    f"Dang et al. 2024, {arxiv_link('2408.06223')}",
    settings=RmuSettings,
    grid=learning_rate_grid(retain=(10.0, 40.0)),
    trains=True,
)
def rmu(material: Material, settings: RmuSettings, run: Run) -> Result:
    """RMU on the tokens from which answers are predicted; only the block and two before it are trained."""
    # 1. The target of forget rows: a random direction, scaled to the states of the original model.
    sets, frozen = encode_material(material), material.merged
    frozen_block = select_blocks(frozen, settings.depth)[-1]
    blocks = transformer_blocks(frozen)
    depth = (blocks.index(frozen_block) + 1) / len(blocks)
    norm = mean_state_norm(frozen, frozen_block, sets.forget)
    run.tokens.add_forward(count_example_tokens(sets.forget), depth)
    direction = draw_direction(get_state_width(frozen, frozen_block, sets.forget[0]), run.seed)
    target = (settings.length * norm * direction).to(next(frozen.parameters()).device)

    # 2. The loss: distance of forget states to the target, and of retain states to those of the original model.

    def forget_loss(model: nn.Module, rows: Sequence[int]) -> Tensor:
        ids, roles = pad_batch([sets.forget[i] for i in rows], target.device)
        states = compute_states(model, select_blocks(model, settings.depth)[-1], ids)
        return misdirection_loss(states, target, mask_predicting_tokens(roles))

    def retain_loss(model: nn.Module, rows: Sequence[int]) -> Tensor:
        ids, roles = pad_batch([sets.retain[i] for i in rows], target.device)
        with torch.no_grad():
            frozen_states = compute_states(frozen, frozen_block, ids)
        states = compute_states(model, select_blocks(model, settings.depth)[-1], ids)
        return misdirection_loss(states, frozen_states, mask_predicting_tokens(roles))

    def select_parameters(model: nn.Module) -> list[nn.Parameter]:
        return [parameter for block in select_blocks(model, settings.depth) for parameter in block.parameters()]

    # 3. Train the last blocks up to the steered one.
    model = train_copy(
        frozen,
        sets,
        run,
        lr=settings.lr,
        forget=Term(forget_loss, (sets.forget,), depth=depth),
        retain=Term(retain_loss, (sets.retain,), settings.retain, has_teacher=True, depth=depth),
        stage="rmu",
        select_parameters=select_parameters,
    )
    return Result(model, {"block": blocks.index(frozen_block), "state_length": norm})


@torch.no_grad()
def mean_state_norm(model: nn.Module, block: nn.Module, examples: Sequence[Example]) -> float:
    """Mean norm of the states after ``block``, over all tokens from which an answer token is predicted."""
    total, count, device = 0.0, 0, next(model.parameters()).device
    for batch in batch_by_length(examples, tokens=MICRO_BATCH_TOKENS):
        ids, roles = pad_batch([examples[i] for i in batch], device)
        lengths = compute_states(model, block, ids).norm(dim=-1)[mask_predicting_tokens(roles)]
        total, count = total + float(lengths.sum()), count + lengths.numel()
    return total / count


@torch.no_grad()
def get_state_width(model: nn.Module, block: nn.Module, example: Example) -> int:
    """Width of the states after ``block``."""
    return compute_states(model, block, pad_batch([example], next(model.parameters()).device)[0]).shape[-1]
