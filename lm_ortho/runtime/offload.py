"""A model that computes on one device while the weights of its blocks stay in the memory of the host."""

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
from lm_ortho.runtime.precision import computing_by, transformer_blocks


@contextmanager
def offload_blocks(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Inside, ``model`` computes on ``device``, which holds one block's weights at a time and all that is no block.

    Parameters of blocks stay where they are and are copied for the time of a call; a gradient is carried back to them.
    A backward pass keeps what each block was given and computes the rest again (Chen et al. 2016, arXiv 1604.06174),
    so weights come twice and gradients go once in a step. Afterwards all is where it was. For one thread at a time, and
    for models whose blocks leave their buffers alone; a copy made inside works there only.

    Raises:
        UserError: for a model without a list of blocks.
    """
    blocks, device = transformer_blocks(model), torch.device(device)
    if not blocks:
        raise UserError(f"offload: {type(model).__name__} has no list of blocks that could come to the device in turn")
    rest, last = _Rest(model, blocks), _Last()
    with computing_by({block: _Visit(block, block.forward, device, last) for block in blocks}):
        try:
            rest.move(device)
            yield
        finally:
            rest.back()


def is_offloaded(model: nn.Module) -> bool:
    """Whether ``model`` is inside ``offload_blocks``."""
    return any(isinstance(vars(block).get("forward"), _Visit) for block in transformer_blocks(model))


class _Last:
    """The copy of the block that was called last, for passes that take many documents through a block."""

    def __init__(self) -> None:
        self.key: list[tuple[Tensor, int, int]] = []
        self.copies: dict[str, Tensor] = {}

    def fits(self, key: Sequence[tuple[Tensor, int, int]]) -> bool:
        """Whether the copies are those of these tensors, each with where its data lie and how often it was written."""
        return len(key) == len(self.key) and all(
            mine is theirs and place == kept and version == count
            for (mine, place, version), (theirs, kept, count) in zip(key, self.key, strict=True)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _Last:
        return _Last()  # another model, other weights


class _Visit:
    """The forward of a block whose weights come for the time of a call."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any], device: torch.device, last: _Last) -> None:
        self._inside, self._device, self._last = _Inside(block, forward), device, last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return functional_call(self._inside, self._copies(), args, kwargs)
        random = self._inside.block.training  # dropout has to fall on the same places again
        return checkpoint(self._run, *args, use_reentrant=False, preserve_rng_state=random, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self._last.key, self._last.copies = [], {}
        here = {name: tensor.to(self._device) for name, tensor in self._tensors()}  # its backward brings gradients home
        return functional_call(self._inside, here, args, kwargs)

    def _copies(self) -> dict[str, Tensor]:
        tensors = list(self._tensors())
        if any(tensor.is_inference() for _, tensor in tensors):  # they do not count what is written to them
            return {name: tensor.to(self._device) for name, tensor in tensors}
        key = [(tensor, tensor.data_ptr(), tensor._version) for _, tensor in tensors]
        if not self._last.fits(key):
            self._last.key, self._last.copies = [], {}  # before the next ones are made
            self._last.copies = {name: tensor.to(self._device) for name, tensor in tensors}
            self._last.key = key
        return self._last.copies

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        return chain(self._inside.named_parameters(), self._inside.named_buffers())


class _Inside(nn.Module):
    """A block behind a call that does not come back to ``_Visit``."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.block, self._forward = block, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block gives."""
        return self._forward(*args, **kwargs)


class _Rest:
    """What belongs to no block: embeddings, norms, head."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        inside = {id(part) for block in blocks for part in block.modules()}
        self._modules = [part for part in model.modules() if id(part) not in inside]
        self._parameters = {id(p): p for part in self._modules for p in part.parameters(recurse=False)}
        self._from = {key: p.device for key, p in self._parameters.items()}
        self._buffers = [
            (part, name, buffer.device) for part in self._modules for name, buffer in part.named_buffers(recurse=False)
        ]

    def move(self, device: torch.device) -> None:
        for parameter in self._parameters.values():
            parameter.data = parameter.data.to(device)
        for part, name, _ in self._buffers:
            part._buffers[name] = part.get_buffer(name).to(device)

    def back(self) -> None:
        for key, parameter in self._parameters.items():
            gradient, parameter.grad = parameter.grad, None
            parameter.data = parameter.data.to(self._from[key])
            parameter.grad = None if gradient is None else gradient.to(self._from[key])
        for part, name, device in self._buffers:
            part._buffers[name] = part.get_buffer(name).to(device)
