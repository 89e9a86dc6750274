"""K-FAC: directions of little curvature on general text are taken out, without looking at a forget set."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lm_ortho.baselines.interface import Material, Result, Run, Settings, arxiv, method
from lm_ortho.baselines.training import encoded
from lm_ortho.calibration.activations import input_moments
from lm_ortho.data.encoding import Example, batch_by_length, compute_logits, pad
from lm_ortho.layer import find_linear
from lm_ortho.layer.linear_form import linear_form
from lm_ortho.runtime.precision import fast_matmul, select_attention

_FEED_FORWARD = ("mlp", "ffn", "feed_forward", "experts")


class Kfac(Settings):
    """Settings of the K-FAC edit."""

    kept: float = Field(0.5, gt=0, le=1, description="Share of the mass of each matrix's curvature that stays.")
    depth: float = Field(0.5, ge=0, lt=1, description="Share of the blocks, from the input on, that is left alone.")


@method(
    "kfac",
    objective="C = U_G^T W U_A in the eigenbases of E[g g^T] and E[x x^T] on retain rows; entries beyond the largest "
    "products of eigenvalues that make up `kept` of the mass are set to 0; no forget row is read",
    paper=f"Merullo et al. 2025, {arxiv('2510.24256')}",
    settings=Kfac,
    grid=[{"kept": kept} for kept in (0.5, 0.3, 0.7, 0.9)],
)
def kfac(material: Material, settings: Kfac, run: Run) -> Result:
    """The feed-forward layers of the later blocks, as in the paper; the rest stays."""
    model, sets = copy.deepcopy(material.merged), encoded(material)
    with linear_form(model):
        every = find_linear(model)
        layers = {name: every[name] for name in late_feed_forward(list(every), settings.depth)}
        inputs, outputs = factors(model, layers, sets.retain, run.seed)
        for number, (name, layer) in enumerate(layers.items(), 1):
            layer.weight.data.copy_(keep_mass(layer.weight.detach(), outputs[name], inputs[name], settings.kept))
            run.progress("kfac", number, len(layers), name)
    return Result(model, {"layers": len(layers)})


def late_feed_forward(names: Sequence[str], depth: float) -> list[str]:
    """Those of the layers that are in blocks after the first ``depth`` of all, and in an MLP where some are."""
    block = {name: int(found[0]) for name in names if (found := re.findall(r"\d+", name))}
    numbers = sorted(set(block.values()))
    late = set(numbers[int(depth * len(numbers)) :])
    chosen = [name for name in names if block.get(name) in late] or list(names)
    return [name for name in chosen if any(part in name for part in _FEED_FORWARD)] or chosen


def keep_mass(weight: Tensor, outputs: Tensor, inputs: Tensor, kept: float) -> Tensor:
    """``weight`` (out, in) less the entries of least curvature in the eigenbases of both factors, in float32.

    ``outputs`` is E[g g^T] (out, out), ``inputs`` E[x x^T] (in, in). What stays makes up ``kept`` of the mass at most.
    """
    (g, left), (a, right) = (torch.linalg.eigh(moment.double().to(weight.device)) for moment in (outputs, inputs))
    mass = g.clamp_min(0)[:, None] * a.clamp_min(0)[None]
    order = mass.flatten().argsort(descending=True)
    within = mass.flatten()[order].cumsum(0) <= kept * mass.sum() * (1 + 1e-9)
    mask = torch.zeros_like(mass, dtype=torch.bool)
    mask.view(-1)[order[within]] = True
    return (left @ ((left.T @ weight.double() @ right) * mask) @ right.T).float()


def factors(
    model: nn.Module, layers: Mapping[str, nn.Linear], examples: Sequence[Example], seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """E[x x^T] (in, in) and the sum of g g^T (out, out) of each layer, labels drawn from the model itself."""
    outputs = {name: torch.zeros(layer.out_features, layer.out_features) for name, layer in layers.items()}
    model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    handles = [layer.register_forward_hook(_watch(outputs[name])) for name, layer in layers.items()]
    try:
        _gradients(model, examples, seed)
    finally:
        for handle in handles:
            handle.remove()
        model.requires_grad_(False)
    return input_moments(model, layers, examples), outputs


def _watch(total: Tensor) -> Callable[..., None]:
    """A hook that adds g g^T of what the layer gives to ``total``, once gradients come back."""

    def backward(gradient: Tensor) -> None:
        flat = gradient.flatten(0, -2).float()
        total.add_((flat.T @ flat).cpu())

    def forward(_module: Any, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(backward)

    return forward


def _gradients(model: nn.Module, examples: Sequence[Example], seed: int) -> None:
    """Gradients of the log-probability of drawn labels, for the hooks to see."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with select_attention(model, max(len(e.ids) for e in examples)):
        for batch in batch_by_length(examples):
            ids, _ = pad([examples[i] for i in batch], device)
            with fast_matmul(device.type):
                logp = compute_logits(model, ids).log_softmax(-1)
            ends = torch.tensor([[len(examples[i].ids) - 1] for i in batch], device=device)
            real = torch.arange(ids.shape[1], device=device)[None] < ends
            wanted = torch.multinomial(logp[real].detach().exp(), 1, generator=generator)
            (-logp[real].gather(-1, wanted)).sum().backward()
            model.zero_grad()
