"""RepSelect: one step along the forget gradient, in which the gradient's own principal directions are damped."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from torch import Tensor, nn

from lm_ortho.baselines.interface import Material, Result, Run, Settings, arxiv_link, method
from lm_ortho.baselines.kfac import select_late_feed_forward
from lm_ortho.baselines.losses import nll_loss
from lm_ortho.baselines.training import (
    Term,
    TokenSets,
    accumulate_gradients,
    answer_passes,
    compute_answer_logps,
    encode_material,
)
from lm_ortho.finetune.lora import suppress_peft_warnings
from lm_ortho.layer import find_linear
from lm_ortho.layer.linear_form import linear_form
from lm_ortho.runtime.precision import fast_matmul

ADAPTER_RANK = 8
ROWS = 16
"""Rows of one step of the adapter."""
_ZERO = 1e-6
"""Singular values below this share of the largest count as zero."""


class RepSelectSettings(Settings):
    """Settings of RepSelect. The paper gives a learning rate, and applies the change until the retain rows suffer."""

    length: float = Field(
        0.03, gt=0, lt=10, description="Length of the change, relative to that of the weights that are edited."
    )
    directions: int = Field(
        64, ge=0, description="Number of principal directions of each gradient that are damped; 0 damps none."
    )
    adapter_lr: float = Field(
        0.01, ge=0, description="Learning rate of the adapter that brings the memory out beforehand; 0 for no adapter."
    )


@method(
    "repselect",
    objective="W - c D; D: the gradient g of - loss per token of forget rows, with its part along each of its first "
    "`directions` singular vectors divided, on both sides, by the singular value (that of the last of them being 1); "
    "c: the length of all changes is `length` times that of all edited weights; no retain row is read",
    paper=f"Sondej et al. 2026, {arxiv_link('2606.17168')}, with the collapse of its published code (soft, on both "
    "sides); c relative instead of a learning rate",
    settings=RepSelectSettings,
    grid=[{"length": length, "directions": directions} for directions in (64, 128) for length in (0.01, 0.03, 0.1)],
)
def repselect(material: Material, settings: RepSelectSettings, run: Run) -> Result:
    """Edits the feed-forward layers, as in the paper, after two passes over the forget rows.

    The first pass descends the forget loss by an adapter (plain gradient steps), the second sums up the gradient of the
    weights with the adapter in place; the adapter is then removed. Without retain rows and with one gradient it costs
    two training passes of the forget set: the budget does not apply.
    """
    model, sets = copy.deepcopy(material.merged).float(), encode_material(material)
    with linear_form(model):
        names = select_late_feed_forward(list(find_linear(model)), depth=0.0)
        # 1. The gradient of every layer.
        gradients = compute_forget_gradients(model, names, sets, settings.adapter_lr, run=run)
        # 2. Damp the principal directions of each.
        changes = dict[str, Tensor]()
        for number, name in enumerate(names, 1):
            changes[name] = damp_principal_directions(gradients.pop(name), settings.directions)
            run.progress("repselect", number, len(names), name)
        # 3. One step, of a length relative to the weights.
        weights = _get_weights(model, names)
        scale = settings.length * total_norm(weights) / max(total_norm(changes), 1e-30)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.sub_(scale * changes[name].to(weight))
    return Result(model, {"layers": len(names), "scale": scale})


def compute_forget_gradients(
    model: nn.Module, names: Sequence[str], sets: TokenSets, adapter_lr: float, *, run: Run
) -> dict[str, Tensor]:
    """Gradient (out, in) of - mean loss per token of all forget rows, by the weight of each layer in ``names``.

    With an ``adapter_lr`` it is taken with an adapter on these layers that has descended the forget loss in one pass;
    the adapter is removed from ``model`` afterwards.
    """
    rows = list(range(len(sets.forget)))
    weights = _get_weights(model, names)
    model.requires_grad_(False)
    adapted_model: nn.Module = model
    with answer_passes(model, sets.max_length):
        # 1. One pass of plain gradient descent by the adapter.
        if adapter_lr:
            adapted_model = _add_adapter(model, names, run.seed)
            parameters = [parameter for parameter in adapted_model.parameters() if parameter.requires_grad]
            for batch in _split(random.Random(run.seed).sample(rows, len(rows)), run, "repselect: adapter"):
                _add_gradient(adapted_model, sets, batch, weight=1.0, run=run)
                for parameter in parameters:
                    parameter.data.sub_(adapter_lr * _take_gradient(parameter))
            adapted_model.requires_grad_(False)
        # 2. One pass that sums up the gradient of the weights.
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in _split(rows, run, "repselect: gradient"):
            _add_gradient(adapted_model, sets, batch, weight=-len(batch) / len(rows), run=run)
    gradients = {name: _take_gradient(weight) for name, weight in weights.items()}
    # 3. Remove the adapter.
    if isinstance(adapted_model, PeftModel):
        adapted_model.unload()
    model.requires_grad_(False)
    return gradients


def _get_weights(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The weight of each layer."""
    return {name: cast(nn.Parameter, model.get_submodule(name).weight) for name in names}


def _split(rows: Sequence[int], run: Run, stage: str) -> Iterator[Sequence[int]]:
    """Batches of ``ROWS`` rows; each is reported when it is finished."""
    for start in range(0, len(rows), ROWS):
        yield rows[start : start + ROWS]
        run.progress(stage, min(start + ROWS, len(rows)), len(rows), "")


def _add_gradient(model: nn.Module, sets: TokenSets, rows: Sequence[int], *, weight: float, run: Run) -> None:
    """Adds the gradient of ``weight`` times the mean loss per token of the forget rows to the trainable parameters."""

    def loss(model: nn.Module, rows: Sequence[int]) -> Tensor:
        with fast_matmul(next(model.parameters()).device.type):
            return nll_loss(*compute_answer_logps(model, sets.forget, rows))

    term = Term(loss, (sets.forget,), weight)
    accumulate_gradients(model, (term,), (rows,))
    run.tokens.add(sum(term.count_tokens(row) for row in rows))


def _take_gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient of the parameter, which then has none; zeros where no token reached it (an expert)."""
    gradient, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if gradient is None else gradient


def _add_adapter(model: nn.Module, names: Sequence[str], seed: int) -> nn.Module:
    """Adds an adapter that changes nothing yet to the layers of ``model``, in place."""
    config = LoraConfig(r=ADAPTER_RANK, lora_alpha=ADAPTER_RANK, lora_dropout=0.0, target_modules=list(names))
    with torch.random.fork_rng(), suppress_peft_warnings():
        torch.manual_seed(seed)
        return cast(nn.Module, get_peft_model(cast(Any, model), config))


def damp_principal_directions(gradient: Tensor, count: int) -> Tensor:
    """``gradient`` (out, in) with its parts along its first ``count`` singular vectors damped, in float32.

    On the output side and then on the input side, the part along the i-th vector is divided by s_i / s_k, where s_k is
    the last of the ``count`` singular values (or the last that is not zero): s_i becomes s_k^2 / s_i.
    """
    matrix = gradient.double()
    # 1. Singular vectors, from the eigenvectors of the smaller product of the matrix with itself.
    is_wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)
    values = squares.flip(0).clamp_min(0).sqrt()
    count = min(count, int((values > _ZERO * values[0]).sum()))
    if not count:
        return gradient.float()
    values, near = values[:count], vectors.flip(1)[:, :count]
    far = (matrix.T if is_wide else matrix) @ near / values
    outputs, inputs = (near, far) if is_wide else (far, near)
    # 2. Damp the output side, then the input side.
    surplus = 1 - values[-1] / values
    matrix = matrix - (outputs * surplus) @ (outputs.T @ matrix)
    return (matrix - (matrix @ inputs) @ (inputs * surplus).T).float()


def total_norm(tensors: Mapping[str, Tensor]) -> float:
    """Length of all tensors as one vector."""
    return math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in tensors.values()))
