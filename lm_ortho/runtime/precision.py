"""How the passes of a training loop compute: precision of matrix products, kind of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def fast_matmul(device: str = "cpu") -> torch.autocast:
    """BF16 matrix products in the forward pass on a GPU, or a CPU, that has them in hardware; else nothing changes.

    A CPU without the instruction emulates it, many times slower than float32. Casts are not cached: the cache is one
    for all threads, and no weight is used twice in a pass.
    """
    if device == "cuda":
        return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_bf16_supported(), cache_enabled=False)
    capable: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(capable.get("avx512_bf16")), cache_enabled=False)


SHORT = 128
"""Tokens up to which plain attention is taken on a CPU."""


@contextmanager
def select_attention(model: torch.nn.Module, longest: int) -> Iterator[None]:
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


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of the model, from the input on: the members of the ``nn.ModuleList`` that holds the most weights."""
    lists: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    held = max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=nn.ModuleList())
    return list(held.children())


@contextmanager
def gradient_checkpointing(model: nn.Module) -> Iterator[None]:
    """Inside, a block of the model keeps its input for a backward pass and computes the rest again (Chen et al. 2016).

    arXiv 1604.06174: the memory of activations is that of one block and of the inputs of all, for a forward pass more.
    Dropout is taken to be off.
    """
    again = {
        block: partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        for block in transformer_blocks(model)
    }
    with computing_by(again):
        yield


@contextmanager
def computing_by(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, these modules compute by other functions; afterwards as before, be it by one of accelerate's."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, old in before.items():
            del vars(module)["forward"]
            if old is not None:
                vars(module)["forward"] = old
