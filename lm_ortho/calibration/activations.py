"""Second moments of what every linear layer is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lm_ortho.calibration.examples import Example, in_batches, lengths, pad

DAMPING = 0.01
"""Share of the mean diagonal that is added to it before inverting, as in the code of GPTQ."""


def damped_inverse(moment: Tensor) -> Tensor:
    """Inverse (in, in) in float64 of a second moment, damped; inputs that never fire get a unit diagonal."""
    h = moment.double().clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    return torch.cholesky_inverse(torch.linalg.cholesky(h))


@torch.no_grad()
def input_moments(model: nn.Module, layers: Mapping[str, nn.Linear], examples: Sequence[Example]) -> dict[str, Tensor]:
    """E[x x^T] (in, in) in float32 per layer, over all real tokens of the examples; padding is left out."""
    moments = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}
    real: list[Tensor] = []

    def hook(name: str):  # type: ignore[no-untyped-def]
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0][real[0]].float()
            moments[name] += (x.T @ x).to(moments[name].device)

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    device = next(model.parameters()).device
    try:
        for batch in in_batches(examples):
            chosen = [examples[i] for i in batch]
            ids, _ = pad(chosen, device)
            real[:] = [torch.arange(ids.shape[1])[None].lt(lengths(chosen)[:, None]).to(device)]
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    tokens = int(lengths(examples).sum())
    return {name: moment / tokens for name, moment in moments.items()}
