"""Weights that are linear layers in another shape, made ``nn.Linear`` and back.

transformers keeps some of them transposed (the ``Conv1D`` of GPT-2) or many in one tensor (the experts of a mixture).
A model is in *linear form* when each of them is an ``nn.Linear``, which is all that the other rooms know. Classes are
told by their names and attributes, as this room imports torch only.
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
    """A ``Conv1D`` in linear form; ``origin`` is the class it has otherwise."""

    origin: type[nn.Module]


class SplitExperts(nn.Module):
    """The experts of a mixture in linear form: for each projection a list of one ``nn.Linear`` per expert.

    ``origin`` is the class it has otherwise; what else such an object holds stays as it is.
    """

    origin: type[Any]
    is_transposed: bool
    has_bias: bool
    has_gate: bool
    has_post_expert_norm: bool
    act_fn: Any
    post_expert_norm: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(positions, hidden): the weighted sum of the chosen experts, as the plain loop of transformers computes it.

        ``top_k_index`` and ``top_k_weights`` are (positions, chosen). An index beyond the experts stands for none.
        """
        first, last = (_layers(self, name) for name in projections(self))
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= len(last):
                continue
            # position by position, so that an expert which sees all of them sees them in order
            position, choice = (top_k_index == expert).nonzero(as_tuple=True)
            # As one row of a batch: whose row a position is has been lost, and with one alpha per row the layer then
            # refuses instead of taking positions for rows.
            inner = first[expert](hidden_states[position][None])
            out = last[expert](self._activated(inner))[0]
            out = self.post_expert_norm(out) if self.has_post_expert_norm else out
            result.index_add_(0, position, (out * top_k_weights[position, choice, None]).to(result.dtype))
        return result

    def _activated(self, inner: Tensor) -> Tensor:
        made: Tensor = self.origin._apply_gate(self, inner) if self.has_gate else self.act_fn(inner)
        return made


def to_linear_form(model: nn.Module, layers: Iterable[str] | None = None) -> list[str]:
    """The names of the modules of ``model`` that were put into linear form, in place; none for most models.

    With ``layers``, names of linear layers, only the modules that these are or lie in. The parameters of these modules
    are new objects that hold the same values.
    """
    wanted = None if layers is None else {part for name in layers for part in _parts(name)}
    found = [(name, module) for name, module in model.named_modules() if wanted is None or name in wanted]
    changed = []
    for name, module in found:
        if (is_conv1d(module) or is_fused(module)) and "forward" in vars(module):
            raise UserError(
                f"layer {name!r}: something (a device_map, say) replaced its forward; load the model on one device"
            )
    for name, module in found:
        if is_conv1d(module):
            _turn(module)
        elif is_fused(module):
            _split(module)
        else:
            continue
        changed.append(name)
    return changed


def restore_form(model: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """The names of the modules that were put back into the form they had, all or those of ``names``.

    Experts some of whose layers are no ``nn.Linear`` (decomposed ones) stay split.
    """
    changed = []
    for name, module in list(model.named_modules()):
        if names is not None and name not in names:
            continue
        if isinstance(module, TransposedLinear):
            _turn_back(module)
        elif isinstance(module, SplitExperts) and _all_linear(module):
            _fuse(module)
        else:
            continue
        changed.append(name)
    return changed


@contextmanager
def linear_form(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in linear form; afterwards in the one it had."""
    changed = to_linear_form(model)
    try:
        yield
    finally:
        restore_form(model, changed)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is a transformers ``Conv1D``: y = x W + b with W (in_features, out_features)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and _float_of(module, "weight", 2)


def is_fused(module: nn.Module) -> bool:
    """Whether these are experts in one tensor per projection, marked by ``use_experts_implementation``."""
    if isinstance(module, SplitExperts) or not all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS):
        return False
    experts: Any = module
    names = projections(experts)
    held = all(_float_of(experts, name, 3) for name in names)
    if experts.has_bias:
        held = held and all(_float_of(experts, f"{name}_bias", 2) for name in names)
    return held and not getattr(experts, "_is_expert_parallel", False)


def projections(experts: Any) -> tuple[str, str]:
    """The names of the two projections of experts, in the order of use."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def as_linear(weight: Tensor, bias: Tensor | None = None, trainable: bool = True) -> nn.Linear:
    """An ``nn.Linear`` that holds ``weight`` (out_features, in_features) and ``bias`` themselves, not copies."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=trainable)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=trainable)
    return made


def mark_as_transposed(linear: Any, origin: type[nn.Module] | None) -> None:
    """Lets ``restore_form`` make an ``nn.Linear`` a ``Conv1D`` of that class; does nothing for None."""
    if origin is not None:
        linear.origin = origin
        linear.__class__ = TransposedLinear


def _turn(conv: Any) -> None:
    conv.origin = type(conv)
    conv.in_features, conv.out_features = conv.weight.shape
    conv.weight = _transposed(conv.weight)
    conv.__class__ = TransposedLinear


def _turn_back(linear: Any) -> None:
    linear.nx, linear.nf = linear.in_features, linear.out_features
    linear.weight = _transposed(linear.weight)
    linear.__class__ = linear.origin
    for name in ("origin", "in_features", "out_features"):
        delattr(linear, name)


def _transposed(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)


def _split(experts: Any) -> None:
    for name in projections(experts):
        fused = experts._parameters.pop(name)
        weights = fused.detach().transpose(1, 2) if experts.is_transposed else fused.detach()
        biases = experts._parameters.pop(f"{name}_bias").detach() if experts.has_bias else [None] * len(weights)
        # each in memory of its own, so that what is left of the tensor goes when its experts are replaced
        layers = [
            as_linear(_copied(w), None if b is None else _copied(b), fused.requires_grad)
            for w, b in zip(weights, biases, strict=True)
        ]
        experts.register_module(name, nn.ModuleList(layers).train(experts.training))
    experts.origin = type(experts)
    experts.__class__ = SplitExperts


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _fuse(experts: Any) -> None:
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


def _layers(experts: SplitExperts, name: str) -> nn.ModuleList:
    layers: Any = experts._modules[name]
    return layers


def _all_linear(experts: SplitExperts) -> bool:
    return all(isinstance(layer, nn.Linear) for name in projections(experts) for layer in _layers(experts, name))


def _float_of(module: nn.Module, name: str, dim: int) -> bool:
    held = module._parameters.get(name)
    return held is not None and held.dim() == dim and held.dtype in _FLOATS


def _parts(name: str) -> Iterator[str]:
    """The name and those of all modules it lies in."""
    split = name.split(".")
    return (".".join(split[:length]) for length in range(1, len(split) + 1))
