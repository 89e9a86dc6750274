"""Second moments of what every linear layer is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lm_ortho.calibration.examples import Example, in_batches, lengths, logits_of, pad

DAMPING = 0.01
"""Share of the mean diagonal that is added to it before inverting, as in the code of GPTQ."""


def damped_inverse(moment: Tensor) -> Tensor:
    """Inverse (in, in) in float64 of a second moment, damped; inputs that never fire get a unit diagonal."""
    h = moment.double().clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    return torch.cholesky_inverse(torch.linalg.cholesky(h))


def read_directly(model: nn.Module, layers: Mapping[str, nn.Linear], example: Example) -> list[str]:
    """Names of the layers that ``model`` never calls, although what it says depends on their weights.

    It then multiplies by the weight itself, so that another layer in that place would go unnoticed. The weights have to
    require gradients.
    """
    called: set[str] = set()
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, layer in layers.items()
    ]
    try:
        logits = logits_of(model, pad([example], next(model.parameters()).device)[0])
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in layers if name not in called]
    if not silent:
        return []
    weights = [layers[name].weight for name in silent]
    gradients = torch.autograd.grad(logits.square().mean(), weights, allow_unused=True)
    return [name for name, g in zip(silent, gradients, strict=True) if g is not None]


class _PartialError(Exception):
    """A layer was given some of the positions only, as the experts of a mixture are."""


def input_moments(model: nn.Module, layers: Mapping[str, nn.Linear], examples: Sequence[Example]) -> dict[str, Tensor]:
    """E[x x^T] (in, in) in float32 per layer, over all real tokens of the examples; padding is left out.

    To a layer that sees some of the tokens only (an expert) the others count as x = 0. Which tokens it saw cannot be
    told, so documents of different lengths are then kept apart, and nothing is padded.
    """
    try:
        return _moments(model, layers, examples, in_batches(examples))
    except _PartialError:
        return _moments(model, layers, examples, in_batches(examples, padded=False))


@torch.no_grad()
def _moments(
    model: nn.Module, layers: Mapping[str, nn.Linear], examples: Sequence[Example], batches: list[list[int]]
) -> dict[str, Tensor]:
    moments = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}
    real: list[Tensor] = []

    def hook(name: str):  # type: ignore[no-untyped-def]
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            if not real[0].all():
                x = _without_padding(x, real[0])
            moments[name] += (x.T @ x).to(moments[name].device)

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    device = next(model.parameters()).device
    try:
        for batch in batches:
            chosen = [examples[i] for i in batch]
            ids, _ = pad(chosen, device)
            real[:] = [torch.arange(ids.shape[1])[None].lt(lengths(chosen)[:, None]).flatten().to(device)]
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    tokens = int(lengths(examples).sum())
    return {name: moment / tokens for name, moment in moments.items()}


def _without_padding(x: Tensor, real: Tensor) -> Tensor:
    if len(x) != len(real):
        raise _PartialError
    return x[real]
