"""Adam over named tensors for optimisers that need each update itself, to score it or to clamp what it leads to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BETAS = (0.9, 0.98)
WARM_UP = 5
"""Steps over which the learning rate rises to its peak."""


class Adam:
    """Moments of the gradients and bias-corrected updates (Kingma and Ba 2015, arXiv 1412.6980).

    ``first`` and ``second`` hold the running means of the gradient and of its square by name, in ``dtype`` or else in
    the dtype of the tensor. Updates are returned and not applied.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, epsilon: float, dtype: torch.dtype | None = None) -> None:
        self.first = {name: torch.zeros_like(tensor, dtype=dtype) for name, tensor in tensors.items()}
        self.second = {name: torch.zeros_like(moment) for name, moment in self.first.items()}
        self._epsilon = epsilon

    @torch.no_grad()
    def compute_update(self, name: str, gradient: Tensor, *, step: int, rate: float) -> Tensor:
        """Takes in the ``gradient`` of step 1, 2, ... and returns the float32 change of the tensor at this ``rate``."""
        first, second = self.first[name], self.second[name]
        # 1. Update the running means.
        first.lerp_(gradient.to(first.dtype), 1 - BETAS[0])
        second.lerp_((gradient * gradient).to(second.dtype), 1 - BETAS[1])
        # 2. Correct their bias towards the zeros they began with.
        mean = first.float() / (1 - BETAS[0] ** step)
        deviation = (second.float() / (1 - BETAS[1] ** step)).sqrt()
        # 3. Step against the gradient.
        return -rate * mean / (deviation + self._epsilon)


def scheduled_rate(peak: float, step: int, steps: int, *, floor: float) -> float:
    """Learning rate of ``step`` (1 to ``steps``): a linear warm-up to ``peak`` times a linear decay.

    The decay goes from 1 towards 0 and stops at ``floor``.
    """
    return peak * min(1.0, step / WARM_UP) * max(floor, 1 - step / steps)


def restore(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies the saved values into the tensors of the same names, which may be parameters."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])
