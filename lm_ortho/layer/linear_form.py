"""Conversion of linear layers in other shapes to ``nn.Linear`` and back.

transformers stores some weights transposed (the ``Conv1D`` of GPT-2) or many in one tensor (the experts of a mixture).
A model is in *linear form* when each of them is an ``nn.Linear``, the only class that the rest of lm-ortho handles.
Classes are recognised by their names and attributes, because this package imports torch only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lm_ortho.errors import UserError

_FLAGS = ("is_transposed", "has_bias", "has_gate", "has_post_expert_norm")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TransposedLinear(nn.Linear):
    """A ``Conv1D`` in linear form; ``origin`` is its original class."""

    origin: type[nn.Module]


class SplitExperts(nn.Module):
    """The experts of a mixture in linear form: for each projection a list of one ``nn.Linear`` per expert.

    ``origin`` is the original class; all other attributes of the object stay as they are.
    """

    origin: type[Any]
    is_transposed: bool
    has_bias: bool
    has_gate: bool
    has_post_expert_norm: bool
    act_fn: Any
    post_expert_norm: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(positions, hidden): the weighted sum of the selected experts, as the plain loop of transformers computes it.

        ``top_k_index`` and ``top_k_weights`` are (positions, k). An index beyond the last expert means no expert.
        """
        first, last = (_get_layers(self, name) for name in projections(self))
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= len(last):
                continue
            # Sorted by position, so that an expert which receives all of them receives them in order.
            position, choice = (top_k_index == expert).nonzero(as_tuple=True)
            # Passed as one row of a batch: it is no longer known which row a position belongs to, and with one alpha
            # per row the layer then refuses instead of mistaking positions for rows.
            inner = first[expert](hidden_states[position][None])
            out = last[expert](self._activate(inner))[0]
            out = self.post_expert_norm(out) if self.has_post_expert_norm else out
            result.index_add_(0, position, (out * top_k_weights[position, choice, None]).to(result.dtype))
        return result

    def _activate(self, inner: Tensor) -> Tensor:
        output: Tensor = self.origin._apply_gate(self, inner) if self.has_gate else self.act_fn(inner)
        return output


def to_linear_form(model: nn.Module, layers: Iterable[str] | None = None) -> list[str]:
    """Converts modules of ``model`` to linear form in place and returns their names; an empty list for most models.

    With ``layers``, names of linear layers, only the modules that these are or lie in are converted. The parameters of
    converted modules are new objects that hold the same values.

    Raises:
        UserError: for a module to convert whose ``forward`` was replaced, before anything is changed.
    """
    targets = None if layers is None else {part for name in layers for part in _enclosing_names(name)}
    modules = [(name, module) for name, module in model.named_modules() if targets is None or name in targets]
    converted_names = []
    for name, module in modules:
        if (is_conv1d(module) or is_fused(module)) and "forward" in vars(module):
            raise UserError(
                f"layer {name!r}: something (a device_map, say) replaced its forward; load the model on one device"
            )
    for name, module in modules:
        if is_conv1d(module):
            _convert_conv1d(module)
        elif is_fused(module):
            _split_experts(module)
        else:
            continue
        converted_names.append(name)
    return converted_names


def restore_form(model: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """Converts modules back from linear form, all or those of ``names``, and returns their names.

    Experts of which some layers are not an ``nn.Linear`` (decomposed ones) stay split.
    """
    restored_names = []
    for name, module in list(model.named_modules()):
        if names is not None and name not in names:
            continue
        if isinstance(module, TransposedLinear):
            _restore_conv1d(module)
        elif isinstance(module, SplitExperts) and _has_only_linear(module):
            _fuse_experts(module)
        else:
            continue
        restored_names.append(name)
    return restored_names


@contextmanager
def linear_form(model: nn.Module) -> Iterator[None]:
    """Holds ``model`` in linear form inside the ``with`` block and restores its form afterwards."""
    names = to_linear_form(model)
    try:
        yield
    finally:
        restore_form(model, names)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is a transformers ``Conv1D``: y = x W + b with W (in_features, out_features)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and _is_float_parameter(module, "weight", 2)


def is_fused(module: nn.Module) -> bool:
    """Whether this holds experts in one tensor per projection, marked by ``use_experts_implementation``."""
    if isinstance(module, SplitExperts) or not all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS):
        return False
    experts: Any = module
    names = projections(experts)
    has_tensors = all(_is_float_parameter(experts, name, 3) for name in names)
    if experts.has_bias:
        has_tensors = has_tensors and all(_is_float_parameter(experts, f"{name}_bias", 2) for name in names)
    return has_tensors and not getattr(experts, "_is_expert_parallel", False)


def projections(experts: Any) -> tuple[str, str]:
    """The names of the two projections of experts, in the order of use."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def make_linear(weight: Tensor, bias: Tensor | None = None, trainable: bool = True) -> nn.Linear:
    """An ``nn.Linear`` that holds ``weight`` (out_features, in_features) and ``bias`` themselves, not copies."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=trainable)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=trainable)
    return linear


def mark_as_transposed(linear: Any, origin: type[nn.Module] | None) -> None:
    """Marks an ``nn.Linear`` for ``restore_form`` as a former ``Conv1D`` of class ``origin``; None does nothing."""
    if origin is not None:
        linear.origin = origin
        linear.__class__ = TransposedLinear


def _convert_conv1d(conv: Any) -> None:
    conv.origin = type(conv)
    conv.in_features, conv.out_features = conv.weight.shape
    conv.weight = _transpose_parameter(conv.weight)
    conv.__class__ = TransposedLinear


def _restore_conv1d(linear: Any) -> None:
    linear.nx, linear.nf = linear.in_features, linear.out_features
    linear.weight = _transpose_parameter(linear.weight)
    linear.__class__ = linear.origin
    for name in ("origin", "in_features", "out_features"):
        delattr(linear, name)


def _transpose_parameter(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)


def _split_experts(experts: Any) -> None:
    for name in projections(experts):
        fused = experts._parameters.pop(name)
        weights = fused.detach().transpose(1, 2) if experts.is_transposed else fused.detach()
        biases = experts._parameters.pop(f"{name}_bias").detach() if experts.has_bias else [None] * len(weights)
        # Copies, not views: replacing some of the experts then frees their part of the memory.
        layers = [
            make_linear(_copy_contiguous(w), None if b is None else _copy_contiguous(b), fused.requires_grad)
            for w, b in zip(weights, biases, strict=True)
        ]
        experts.register_module(name, nn.ModuleList(layers).train(experts.training))
    experts.origin = type(experts)
    experts.__class__ = SplitExperts


def _copy_contiguous(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _fuse_experts(experts: Any) -> None:
    for name in projections(experts):
        layers = experts._modules.pop(name)
        trainable = any(layer.weight.requires_grad for layer in layers)
        weights = torch.stack([layer.weight.detach() for layer in layers])
        weights = weights.transpose(1, 2).contiguous() if experts.is_transposed else weights
        experts.register_parameter(name, nn.Parameter(weights, requires_grad=trainable))
        if experts.has_bias:
            biases = torch.stack([layer.bias.detach() for layer in layers])
            experts.register_parameter(f"{name}_bias", nn.Parameter(biases, requires_grad=trainable))
    experts.__class__ = experts.origin
    del experts.origin


def _get_layers(experts: SplitExperts, name: str) -> nn.ModuleList:
    layers: Any = experts._modules[name]
    return layers


def _has_only_linear(experts: SplitExperts) -> bool:
    return all(isinstance(layer, nn.Linear) for name in projections(experts) for layer in _get_layers(experts, name))


def _is_float_parameter(module: nn.Module, name: str, dim: int) -> bool:
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.dim() == dim and parameter.dtype in _FLOATS


def _enclosing_names(name: str) -> Iterator[str]:
    """The names of all modules that the module ``name`` lies in, and ``name`` itself."""
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts) + 1))
