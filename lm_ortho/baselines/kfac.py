"""K-FAC edit: removes the directions of least curvature on general text, without reading a forget set."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from lm_ortho.baselines.interface import Material, Result, Run, Settings, arxiv_link, method
from lm_ortho.baselines.training import MICRO_BATCH_TOKENS, answer_passes, count_example_tokens, encode_material
from lm_ortho.calibration.activations import input_moments
from lm_ortho.data.encoding import Example, batch_by_length, pad_batch
from lm_ortho.data.logits import compute_logits
from lm_ortho.layer import find_linear
from lm_ortho.layer.linear_form import linear_form
from lm_ortho.runtime.precision import fast_matmul

_FEED_FORWARD = ("mlp", "ffn", "feed_forward", "experts")


class KfacSettings(Settings):
    """Settings of the K-FAC edit."""

    kept: float = Field(0.5, gt=0, le=1, description="Share of the curvature mass of each weight matrix that is kept.")
    depth: float = Field(
        0.5, ge=0, lt=1, description="Share of the blocks, counted from the input, that is not edited."
    )


@method(
    "kfac",
    objective="C = U_G^T W U_A in the eigenbases of E[g g^T] and E[x x^T] on retain rows; entries beyond the largest "
    "products of eigenvalues that make up `kept` of the mass are set to 0; no forget row is read",
    paper=f"Merullo et al. 2025, {arxiv_link('2510.24256')}",
    settings=KfacSettings,
    grid=[{"kept": kept} for kept in (0.5, 0.3, 0.7, 0.9)],
)
def kfac(material: Material, settings: KfacSettings, run: Run) -> Result:
    """Edits the feed-forward layers of the later blocks, as in the paper; the other layers stay."""
    model, sets = copy.deepcopy(material.merged), encode_material(material)
    tokens = count_example_tokens(sets.retain)  # once for the gradients, once for the input moments
    run.tokens.add(tokens)
    run.tokens.add_forward(tokens)
    with linear_form(model):
        linear_layers = find_linear(model)
        names = select_late_feed_forward(list(linear_layers), settings.depth)
        layers = {name: linear_layers[name] for name in names}
        inputs, outputs = compute_factors(model, layers, sets.retain, run.seed)
        for number, (name, layer) in enumerate(layers.items(), 1):
            weight = keep_curvature_mass(layer.weight.detach(), outputs[name], inputs[name], settings.kept)
            layer.weight.data.copy_(weight)
            run.progress("kfac", number, len(layers), name)
    return Result(model, {"layers": len(layers)})


def select_late_feed_forward(names: Sequence[str], depth: float) -> list[str]:
    """The feed-forward layers in the blocks after the first share ``depth`` of all blocks.

    All layers of those blocks where no name tells a feed-forward layer, and all ``names`` where none has a number.
    """
    block = {name: int(numbers[0]) for name in names if (numbers := re.findall(r"\d+", name))}
    block_numbers = sorted(set(block.values()))
    late_blocks = set(block_numbers[int(depth * len(block_numbers)) :])
    late_layers = [name for name in names if block.get(name) in late_blocks] or list(names)
    return [name for name in late_layers if any(part in name for part in _FEED_FORWARD)] or late_layers


def keep_curvature_mass(weight: Tensor, outputs: Tensor, inputs: Tensor, mass_share: float) -> Tensor:
    """``weight`` (out, in) without the entries of least curvature in the eigenbases of both factors, in float32.

    ``outputs`` is E[g g^T] (out, out), ``inputs`` E[x x^T] (in, in). The entries that stay make up ``mass_share`` of
    the curvature mass at most.
    """
    # 1. Eigenbases of both factors; the curvature of an entry is the product of its two eigenvalues.
    (g, left), (a, right) = (torch.linalg.eigh(moment.double().to(weight.device)) for moment in (outputs, inputs))
    mass = g.clamp_min(0)[:, None] * a.clamp_min(0)[None]
    # 2. Keep the largest entries until their share of the mass is reached.
    order = mass.flatten().argsort(descending=True)
    is_within = mass.flatten()[order].cumsum(0) <= mass_share * mass.sum() * (1 + 1e-9)
    mask = torch.zeros_like(mass, dtype=torch.bool)
    mask.view(-1)[order[is_within]] = True
    # 3. Project into the eigenbases, mask, and project back.
    return (left @ ((left.T @ weight.double() @ right) * mask) @ right.T).float()


def compute_factors(
    model: nn.Module, layers: Mapping[str, nn.Linear], examples: Sequence[Example], seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """E[x x^T] (in, in) and the sum of g g^T (out, out) of each layer; labels are sampled from the model itself."""
    outputs = {name: torch.zeros(layer.out_features, layer.out_features) for name, layer in layers.items()}
    model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    handles = [layer.register_forward_hook(_make_gradient_hook(outputs[name])) for name, layer in layers.items()]
    try:
        _backpropagate_samples(model, examples, seed)
    finally:
        for handle in handles:
            handle.remove()
        model.requires_grad_(False)
    return input_moments(model, layers, examples), outputs


def _make_gradient_hook(total: Tensor) -> Callable[..., None]:
    """A forward hook that adds g g^T of the gradients of the layer's output to ``total`` in the backward pass."""

    def backward(gradient: Tensor) -> None:
        flat = gradient.flatten(0, -2).float()
        total.add_((flat.T @ flat).cpu())

    def forward(_module: Any, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(backward)

    return forward


def _backpropagate_samples(model: nn.Module, examples: Sequence[Example], seed: int) -> None:
    """Backpropagates the log-probability of labels sampled from the model, so that the hooks receive gradients."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    longest = max(len(example.ids) for example in examples)
    with answer_passes(model, longest):
        for batch in batch_by_length(examples, tokens=MICRO_BATCH_TOKENS):
            ids, _ = pad_batch([examples[i] for i in batch], device)
            ends = torch.tensor([[len(examples[i].ids) - 1] for i in batch], device=device)
            is_token = torch.arange(ids.shape[1], device=device)[None] < ends
            with fast_matmul(device.type):
                logits = compute_logits(model, ids, is_token)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            functional.cross_entropy(logits, labels, reduction="sum").backward()
            model.zero_grad()
