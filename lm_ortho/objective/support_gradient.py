"""Gradients of linear layers at the positions of the support only, instead of at all weights.

The gradient of a weight W_ij is the sum over tokens of dY_ti X_tj. For a support of 1 % of the weights the sums at its
positions alone (a sampled dense-dense product, SDDMM) cost a small part of the whole product.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lm_ortho.runtime.precision import replace_forwards

SAMPLED_DENSITY = 1 / 8
"""Density of the support of a layer from which on its whole product costs less, in float32 on a CPU.

Measured with one thread of an AMD EPYC for layers of 320 x 320, 960 x 320, 576 x 576, 1536 x 576 and 576 x 1536 and
for 500 to 3000 tokens: the sampled product with its transposed operands took 0.15 to 0.4 of the time of the whole one
at 1 %, 0.3 to 0.5 at 3 %, and 0.7 to 0.9 at 10 %.
"""
BF16_FACTOR = 1 / 4
"""Factor of ``SAMPLED_DENSITY`` where the whole product is one of BF16, for which the CPU has instructions."""
TOKEN_CHUNK = 1024
"""Tokens of one sampled product: operands of more leave the cache, and transposing them took three times as long."""


class SupportGradient:
    """The gradient of one layer at ``positions``, flat ascending indices of its weight (out_features, in_features).

    ``values`` is a leaf (positions,) that stands for the weights there: its gradient is theirs.

    Raises:
        ValueError: for positions that are not ascending.
    """

    def __init__(self, layer: nn.Linear, positions: Tensor) -> None:
        self.shape = layer.weight.shape
        self.positions = positions
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        self.values = torch.zeros(positions.numel(), dtype=dtype, device=positions.device, requires_grad=True)
        at = positions.cpu()
        if not (at.diff() > 0).all():
            raise ValueError("the positions of a support must be ascending")
        # Row pointers and columns in the CSR format. Outputs and inputs without a position are left out where they are
        # most of all: a support takes much of some matrices and little of others.
        self._outputs, rows, height = _number_used(at // self.shape[1], self.shape[0])
        self._inputs, self._columns, width = _number_used(at % self.shape[1], self.shape[1])
        self._rows = functional.pad(torch.bincount(rows, minlength=height).cumsum(0), (1, 0))
        self._size = (height, width)

    def compute(self, gradient: Tensor, inputs: Tensor) -> Tensor:
        """Sums over tokens of ``gradient`` (tokens, out_features) times ``inputs`` (tokens, in_features)."""
        if not self._is_sampled(gradient):
            product = gradient.t() @ inputs
            return product.flatten()[self.positions.to(product.device)].to(self.values.dtype)
        result = torch.zeros_like(self.values)
        for low in range(0, len(gradient), TOKEN_CHUNK):
            chunk = slice(low, low + TOKEN_CHUNK)
            left = _transpose(gradient[chunk], self._outputs, result.dtype)
            right = _transpose(inputs[chunk], self._inputs, result.dtype)
            total = torch.sparse_csr_tensor(self._rows, self._columns, result, size=self._size, check_invariants=False)
            result = torch.sparse.sampled_addmm(total, left, right.t()).values()
        return result

    def _is_sampled(self, gradient: Tensor) -> bool:
        """Whether the products at the positions cost less than the whole product."""
        factor = BF16_FACTOR if gradient.dtype == torch.bfloat16 else 1.0
        is_sparse = self.positions.numel() < factor * SAMPLED_DENSITY * self.shape.numel()
        return is_sparse and gradient.device.type == "cpu" and has_sampled_product()


@lru_cache
def has_sampled_product() -> bool:
    """Returns whether this build of PyTorch has sampled products for CPUs (those with MKL have)."""
    try:
        with warnings.catch_warnings():  # the first CSR tensor of a process warns that the format is a beta version
            warnings.simplefilter("ignore")
            pattern = torch.eye(2).to_sparse_csr()
        product = torch.sparse.sampled_addmm(pattern, torch.ones(2, 3), torch.ones(3, 2), beta=0.0)
    except RuntimeError:
        return False
    return product.values().tolist() == [3.0, 3.0]


def _number_used(index: Tensor, count: int) -> tuple[Tensor | None, Tensor, int]:
    """The distinct values of ``index``, ``index`` as places among these, and their number.

    None, ``index`` itself and ``count`` if they are more than half of all ``count`` values.
    """
    used, places = index.unique(return_inverse=True)
    return (used, places, len(used)) if 2 * len(used) <= count else (None, index, count)


def _transpose(operand: Tensor, used: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The ``used`` columns of ``operand`` (tokens, features) as rows, as the kernel reads them."""
    columns = operand if used is None else operand.index_select(1, used)
    return columns.to(dtype).t().contiguous()


@contextmanager
def support_gradients(layers: Mapping[str, nn.Linear], positions: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Context in which the layers have gradients at ``positions`` only; yields their leaves by name.

    The gradient of a leaf (positions,) is that of the weights at the positions of its layer. No weight of the
    ``layers`` requires a gradient inside, so autograd stops at the first layer with a position: nothing below it is
    differentiated, and no activation there is stored or computed again. Layers may be called several times or never,
    in several threads, under autocast, inside gradient checkpointing and with weights of another device. Weights and
    biases may change between passes.

    Raises:
        ValueError: for positions that are not ascending.
    """
    has_sampled_product()  # before any thread starts
    supports = {name: SupportGradient(layer, positions[name]) for name, layer in layers.items()}
    forwards: dict[nn.Module, Callable[..., Any]] = {
        layer: partial(_forward, layer, supports[name]) for name, layer in layers.items() if positions[name].numel()
    }
    required = {name: layer.weight.requires_grad for name, layer in layers.items()}
    for layer in layers.values():
        layer.weight.requires_grad_(False)
    try:
        with replace_forwards(forwards):
            yield {name: support.values for name, support in supports.items()}
    finally:
        for name, layer in layers.items():
            layer.weight.requires_grad_(required[name])


def _forward(layer: nn.Linear, support: SupportGradient, inputs: Tensor) -> Tensor:
    """The output of the layer, with the weight that it has now: offloading replaces it by a copy on another device."""
    values = support.values.to(inputs.device)
    if not torch.is_grad_enabled():
        return functional.linear(inputs, layer.weight, layer.bias)
    bias = None if layer.bias is None else layer.bias.detach()
    # The function sees a matrix: it must not return a view, which a model could not write to in place (Falcon does).
    tokens = inputs.reshape(-1, inputs.shape[-1])
    output: Tensor = _SupportLinear.apply(tokens, values, layer.weight.detach(), bias, support)
    return output.view(*inputs.shape[:-1], output.shape[-1])


class _SupportLinear(torch.autograd.Function):
    """x W^T + b, (tokens, out_features), whose backward pass computes the gradients of x and of W at the support."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, support: SupportGradient
    ) -> Tensor:
        kind = inputs.device.type
        ctx.input_dtype, ctx.support = inputs.dtype, support
        # As autocast does; its copy of the weight is made again in the backward pass, which saves memory.
        if torch.is_autocast_enabled(kind) and inputs.dtype != torch.float64:
            inputs = inputs.to(torch.get_autocast_dtype(kind))
        ctx.save_for_backward(inputs, weight)
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        inputs, weight = ctx.saved_tensors
        values = ctx.support.compute(gradient, inputs).to(inputs.device)
        if not ctx.needs_input_grad[0]:
            return None, values, None, None, None
        return (gradient @ weight.to(gradient.dtype)).to(ctx.input_dtype), values, None, None, None
