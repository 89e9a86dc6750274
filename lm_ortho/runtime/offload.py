"""CPU offload: a model computes on an accelerator while the weights of its blocks stay in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lm_ortho.errors import UserError
from lm_ortho.runtime.precision import replace_forwards, transformer_blocks


@contextmanager
def offload_blocks(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Context in which ``model`` computes on ``device``, which holds the weights of one block at a time.

    Everything outside the blocks (embeddings, norms, head) moves to ``device``. Parameters of blocks stay where they
    are and are copied for the duration of a call; gradients are carried back to them. A backward pass keeps the input
    of each block and recomputes the rest (Chen et al. 2016, arXiv 1604.06174), so in one training step the weights are
    copied to the device twice and the gradients back once. On exit everything is moved back.

    Not thread-safe. Blocks must not write to their buffers. A deep copy of the model works only inside the context.

    Raises:
        UserError: for a model without a list of blocks.
    """
    blocks, device = transformer_blocks(model), torch.device(device)
    if not blocks:
        raise UserError(f"offload: {type(model).__name__} has no list of blocks that could be moved one at a time")
    remainder, cache = _NonBlockTensors(model, blocks), _CopyCache()
    # 1. Let each block fetch its own weights when it is called.
    with replace_forwards({block: _OffloadedForward(block, block.forward, device, cache=cache) for block in blocks}):
        try:
            # 2. Keep everything outside the blocks on the device for the whole context.
            remainder.move_to(device)
            yield
        finally:
            # 3. Move it back, together with its gradients. The blocks never left the host.
            remainder.move_back()


def is_offloaded(model: nn.Module) -> bool:
    """Returns whether ``model`` is inside ``offload_blocks``."""
    return any(isinstance(vars(block).get("forward"), _OffloadedForward) for block in transformer_blocks(model))


_TensorVersion = tuple[Tensor, int, int]
"""A tensor, the address of its data, and the number of writes to it."""


class _CopyCache:
    """The device copy of the block called last, for passes that take many documents through one block."""

    def __init__(self) -> None:
        self.key: list[_TensorVersion] = []
        self.copies: dict[str, Tensor] = {}

    def matches(self, key: Sequence[_TensorVersion]) -> bool:
        """Returns whether the copies are those of the same tensors, with the same address and number of writes."""
        return len(key) == len(self.key) and all(
            tensor is cached_tensor and address == cached_address and version == cached_version
            for (tensor, address, version), (cached_tensor, cached_address, cached_version) in zip(
                key, self.key, strict=True
            )
        )

    def clear(self) -> None:
        self.key, self.copies = [], {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _CopyCache:
        return _CopyCache()  # the copy of a model has other weights


class _OffloadedForward:
    """Forward of a block whose weights are on the device only during a call."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any], device: torch.device, cache: _CopyCache) -> None:
        self._inside, self._device, self._cache = _OriginalBlock(block, forward), device, cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Without gradients: compute with the cached copies, which the next call may use again.
        if not torch.is_grad_enabled():
            return functional_call(self._inside, self._cached_copies(), args, kwargs=kwargs)
        # With gradients: keep the inputs only. The backward pass calls ``_forward_with_fresh_copies`` again.
        has_dropout = self._inside.block.training  # the recomputation has to draw the same dropout mask
        return checkpoint(
            self._forward_with_fresh_copies, *args, use_reentrant=False, preserve_rng_state=has_dropout, **kwargs
        )

    def _forward_with_fresh_copies(self, *args: Any, **kwargs: Any) -> Any:
        self._cache.clear()
        # The backward pass of ``to`` carries the gradients back to the parameters on the host.
        copies = {name: tensor.to(self._device) for name, tensor in self._tensors()}
        return functional_call(self._inside, copies, args, kwargs=kwargs)

    def _cached_copies(self) -> dict[str, Tensor]:
        tensors = list(self._tensors())
        if any(tensor.is_inference() for _, tensor in tensors):  # inference tensors have no version counter
            return {name: tensor.to(self._device) for name, tensor in tensors}
        key = [(tensor, tensor.data_ptr(), tensor._version) for _, tensor in tensors]
        if not self._cache.matches(key):
            self._cache.clear()  # free the old copies before the new ones are made
            self._cache.copies = {name: tensor.to(self._device) for name, tensor in tensors}
            self._cache.key = key
        return self._cache.copies

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        return chain(self._inside.named_parameters(), self._inside.named_buffers())


class _OriginalBlock(nn.Module):
    """A block with its original forward, so that calling it does not call ``_OffloadedForward`` again."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.block, self._forward = block, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the output of the block."""
        return self._forward(*args, **kwargs)


class _NonBlockTensors:
    """Parameters and buffers outside the blocks: embeddings, norms, head."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        inside = {id(module) for block in blocks for module in block.modules()}
        self._modules = [module for module in model.modules() if id(module) not in inside]
        self._parameters = {id(p): p for module in self._modules for p in module.parameters(recurse=False)}
        self._original_devices = {key: p.device for key, p in self._parameters.items()}
        self._buffers = [
            (module, name, buffer.device)
            for module in self._modules
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def move_to(self, device: torch.device) -> None:
        for parameter in self._parameters.values():
            parameter.data = parameter.data.to(device)
        for module, name, _ in self._buffers:
            module._buffers[name] = module.get_buffer(name).to(device)

    def move_back(self) -> None:
        for key, parameter in self._parameters.items():
            original_device = self._original_devices[key]
            # A gradient must be on the device of its parameter, so it is detached while the parameter moves.
            gradient, parameter.grad = parameter.grad, None
            parameter.data = parameter.data.to(original_device)
            parameter.grad = None if gradient is None else gradient.to(original_device)
        for module, name, original_device in self._buffers:
            module._buffers[name] = module.get_buffer(name).to(original_device)
