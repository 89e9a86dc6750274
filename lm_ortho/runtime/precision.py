"""Forward passes of training loops: precision of matrix products, attention kernel, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def fast_matmul(device: str = "cpu") -> torch.autocast:
    """Returns a context with BF16 matrix products in the forward pass where the hardware has them; else a no-op.

    A CPU without the instruction would emulate it many times slower than float32. Casts are not cached: the autocast
    cache is shared by all threads, and no weight is used twice in a pass.
    """
    if device == "cuda":
        return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_bf16_supported(), cache_enabled=False)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(capabilities.get("avx512_bf16")), cache_enabled=False)


MAX_EAGER_TOKENS = 128
"""Longest documents, in tokens, for which a CPU uses the eager attention implementation."""


@contextmanager
def select_attention(model: torch.nn.Module, longest: int) -> Iterator[None]:
    """Context with eager attention on a CPU for short documents, of up to ``longest`` tokens; then restores the old.

    PyTorch's fused attention kernel for CPUs made training on 23-token documents a third slower than plain products.
    """
    config = getattr(model, "config", None)
    previous = getattr(config, "_attn_implementation", None)
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    set_attention: Callable[[str], None] | None = getattr(model, "set_attn_implementation", None)
    if set_attention is None or previous in (None, "eager") or longest > MAX_EAGER_TOKENS or not on_cpu:
        yield
        return
    set_attention("eager")
    try:
        yield
    finally:
        set_attention(previous)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of the model in order: the members of the ``nn.ModuleList`` with the most weights."""
    lists: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    largest = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=nn.ModuleList())
    return list(largest.children())


@contextmanager
def gradient_checkpointing(model: nn.Module) -> Iterator[None]:
    """Context in which each block keeps only its input for the backward pass and recomputes the rest.

    Chen et al. 2016, arXiv 1604.06174: activations take the memory of one block and of the inputs of all blocks, at the
    cost of one more forward pass. Dropout must be off.
    """
    with replace_forwards({block: _CheckpointedForward(block.forward) for block in transformer_blocks(model)}):
        yield


def is_checkpointed(model: nn.Module) -> bool:
    """Returns whether ``model`` is inside ``gradient_checkpointing``."""
    return any(isinstance(vars(block).get("forward"), _CheckpointedForward) for block in transformer_blocks(model))


class _CheckpointedForward:
    """Forward of a block whose activations are computed again in the backward pass.

    A block below the first one with a gradient stores nothing, and nothing of it is computed again.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self._forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@contextmanager
def replace_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Context in which these modules compute with other forward functions; then restores the previous ones.

    A forward that accelerate has set on an instance is restored, too.
    """
    previous = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, previous_forward in previous.items():
            del vars(module)["forward"]
            if previous_forward is not None:
                vars(module)["forward"] = previous_forward
