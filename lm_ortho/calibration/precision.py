"""How the passes of a training loop compute: precision of matrix products, kind of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def fast_matmul() -> torch.autocast:
    """BF16 matrix products in the forward pass on a CPU that has them in hardware; elsewhere nothing changes.

    A CPU without the instruction emulates it, many times slower than float32. Casts are not cached: the cache is one
    for all threads, and no weight is used twice in a pass.
    """
    capable: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(capable.get("avx512_bf16")), cache_enabled=False)


SHORT = 128
"""Tokens up to which plain attention is taken on a CPU."""


@contextmanager
def attention_for(model: torch.nn.Module, longest: int) -> Iterator[None]:
    """Plain attention for documents of up to ``longest`` tokens on a CPU, if they are short; as it was afterwards.

    The fused kernel of PyTorch for CPUs made training on 23-token documents a third slower than plain products.
    """
    config = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    switch: Callable[[str], None] | None = getattr(model, "set_attn_implementation", None)
    if switch is None or before in (None, "eager") or longest > SHORT or not on_cpu:
        yield
        return
    switch("eager")
    try:
        yield
    finally:
        switch(before)
