"""Second moments of random inputs."""

from __future__ import annotations

import torch


def draw_moment(width, seed=0):
    x = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / len(x)
