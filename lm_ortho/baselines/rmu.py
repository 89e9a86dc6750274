"""RMU: what a block says of the forget rows is turned towards a random vector."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from lm_ortho.baselines.interface import Material, Result, Run, arxiv, method
from lm_ortho.baselines.losses import direction, misdirection
from lm_ortho.baselines.training import Pair, Trained, encoded, grid_of, trained_copy
from lm_ortho.calibration.by_block import output_of
from lm_ortho.data.encoding import CONTEXT, Example, batch_by_length, pad
from lm_ortho.errors import UserError
from lm_ortho.runtime.precision import transformer_blocks

MOVED = 3
"""Blocks whose weights are trained: the one that is looked at, and two before it."""


class Rmu(Trained):
    """Settings of RMU. In the paper the block is the 8th of 32, and the length is given as it is (6.5 for Zephyr).

    At a factor of 100 for retain rows the embedded model hardly moves at the lower rates.
    """

    depth: float = Field(0.5, gt=0, le=1, description="Which block is looked at, as a share of all.")
    length: float = Field(
        2.0, gt=0, description="Length of the vector, over the mean length of the states it replaces."
    )
    retain: float = Field(10.0, ge=0, description="Factor of the distance on the retain rows (1200 in the paper).")


def states_of(model: nn.Module, block: nn.Module, ids: Tensor) -> Tensor:
    """What ``block`` gives (rows, tokens, width), in float32; the rest of the model is not computed."""
    output = output_of(model, block, ids)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states.float()


def speaking(roles: Tensor) -> Tensor:
    """Which tokens (rows, tokens) have one after them that is to be predicted."""
    ahead = roles[:, 1:] != CONTEXT
    return torch.cat([ahead, torch.zeros_like(ahead[:, :1])], 1)


def chosen_blocks(model: nn.Module, depth: float) -> list[nn.Module]:
    """The blocks to be trained; the last of them is looked at. Raises ``UserError`` for a model without blocks."""
    blocks = transformer_blocks(model)
    if not blocks:
        raise UserError(f"method=rmu: {type(model).__name__} has no list of blocks to look into")
    at = math.ceil(depth * len(blocks))
    return blocks[max(0, at - MOVED) : at]


@method(
    "rmu",
    objective="mean ||h - c u||^2 over forget rows + `retain` * mean ||h - h_merged||^2 over retain rows; h: states "
    "after a block, u: a random unit vector, c: `length` times the mean ||h_merged|| of forget rows",
    paper=f"Li et al. 2024, {arxiv('2403.03218')}, section 4; c relative to the states as in "
    f"Dang et al. 2024, {arxiv('2408.06223')}",
    settings=Rmu,
    grid=grid_of(retain=(10.0, 40.0)),
    trains=True,
)
def representation_misdirection(material: Material, settings: Rmu, run: Run) -> Result:
    """RMU on the tokens from which answers are predicted; only the block and two before it are trained."""
    sets, frozen = encoded(material), material.merged
    fixed = chosen_blocks(frozen, settings.depth)[-1]
    size = mean_length(frozen, fixed, sets.forget)
    target = settings.length * size * direction(states_width(frozen, fixed, sets.forget[0]), run.seed)
    target = target.to(next(frozen.parameters()).device)

    def loss(model: nn.Module, pair: Pair) -> Tensor:
        block = chosen_blocks(model, settings.depth)[-1]
        ids, roles = pad([sets.forget[i] for i in pair[0]], target.device)
        lost = misdirection(states_of(model, block, ids), target, speaking(roles))
        ids, roles = pad([sets.retain[i] for i in pair[1]], target.device)
        with torch.no_grad():
            before = states_of(frozen, fixed, ids)
        kept = misdirection(states_of(model, block, ids), before, speaking(roles))
        return lost + settings.retain * kept

    def moved(model: nn.Module) -> list[nn.Parameter]:
        return [p for block in chosen_blocks(model, settings.depth) for p in block.parameters()]

    made = trained_copy(frozen, sets, run, settings.lr, loss, "rmu", moved)
    return Result(made, {"block": transformer_blocks(frozen).index(fixed), "state_length": size})


@torch.no_grad()
def mean_length(model: nn.Module, block: nn.Module, examples: Sequence[Example]) -> float:
    """Mean length of the states after ``block`` of all tokens from which an answer is predicted."""
    total, count, device = 0.0, 0, next(model.parameters()).device
    for batch in batch_by_length(examples):
        ids, roles = pad([examples[i] for i in batch], device)
        lengths = states_of(model, block, ids).norm(dim=-1)[speaking(roles)]
        total, count = total + float(lengths.sum()), count + lengths.numel()
    return total / count


@torch.no_grad()
def states_width(model: nn.Module, block: nn.Module, example: Example) -> int:
    """Width of the states after ``block``."""
    return states_of(model, block, pad([example], next(model.parameters()).device)[0]).shape[-1]
