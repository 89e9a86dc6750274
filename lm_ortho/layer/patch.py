"""Putting two-stream layers into a model and taking them out again, and turning the dial."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lm_ortho.errors import UserError
from lm_ortho.kernels import KERNELS, Ask, Choice, choose
from lm_ortho.layer.alpha import Alpha, Dial, effective
from lm_ortho.layer.guard import ForwardGuard, GenerateGuard, Guard, UnattachedGuard, remove_guards
from lm_ortho.layer.linear_form import as_linear, mark_as_transposed, restore_form, to_linear_form
from lm_ortho.layer.ortho_linear import OrthoLinear
from lm_ortho.streams import LayerStreams


def patch(model: nn.Module, streams: Mapping[str, LayerStreams]) -> list[str]:
    """The names of the ``nn.Linear`` modules of ``model`` that were replaced by ``OrthoLinear``.

    Modules of ``model`` that the names need in linear form are put into it. The new layers have alpha 0 and keep the
    bias of the old ones unless the streams bring one. Raises ``UserError``, before anything is changed, for an unknown
    name, another shape, the output embedding, or streams of which only some have an ortho part.
    """
    changed = to_linear_form(model, streams)
    try:
        linears = {name: _linear(model, name, layer) for name, layer in streams.items()}
        _check_ortho(model, streams)
    except UserError:
        restore_form(model, changed)
        raise
    swaps: dict[nn.Module, nn.Module] = {}
    for name, layer in streams.items():
        old = linears[name]
        if layer.bias is None and old.bias is not None:
            layer = LayerStreams(layer.base, layer.ortho, old.bias, layer.named)
        new = OrthoLinear.from_streams(layer.to(old.weight.device), dtype=old.weight.dtype)
        new.origin = getattr(old, "origin", None)
        swaps[old] = new
    replace_modules(model, swaps)
    connect(model)
    if not isinstance(vars(model).get(UnattachedGuard.method), Guard):
        UnattachedGuard.install(model)
    return list(streams)


def connect(model: nn.Module) -> Dial:
    """The one dial that all ``OrthoLinear`` layers of ``model`` share from now on.

    Also makes ``model.forward`` and ``model.generate`` keep their alpha while they run. Harmless when done
    twice. Raises ``UserError`` for a model without such layers.
    """
    layers = _require_layers(model)
    guard = model.__dict__.get("forward")
    dial = guard.dial if isinstance(guard, ForwardGuard) else next(iter(layers.values())).dial
    for layer in layers.values():
        layer.dial = dial
    ForwardGuard.install(model, dial)
    GenerateGuard.install(model, dial)
    return dial


def unpatch(model: nn.Module, alpha: float | Mapping[str, float] = 1.0) -> list[str]:
    """The names of the ``OrthoLinear`` layers of ``model`` that were replaced by plain weights W(alpha).

    ``alpha`` as in ``set_alpha``. They are ``nn.Linear``, or what they were before (``Conv1D``, a part of fused
    experts). The weights are trainable and have the dtype of the other parameters of the model. Raises ``UserError``
    for a model without such layers, or without an ortho stream when ``alpha`` is not 0.
    """
    layers = _require_layers(model)
    wanted = Alpha.of(alpha)
    for layer in layers.values():
        layer.check(wanted)
    factors = wanted.factors()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    swaps: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        bias = None if layer.bias is None else layer.bias.detach().to(dtype, copy=True)
        new = as_linear(layer.streams().dense(factors, dtype), bias)
        mark_as_transposed(new, layer.origin)
        swaps[layer] = new
    replace_modules(model, swaps)
    restore_form(model)
    _unmark(model)
    return list(layers)


def get_dense_weights(
    model: nn.Module, streams: Mapping[str, LayerStreams], alpha: float | Mapping[str, float]
) -> nn.Module:
    """A copy of the plain ``model`` with the weights W(alpha) of these streams."""
    copied = copy.deepcopy(model)
    patch(copied, streams)
    unpatch(copied, alpha)
    return copied


def set_alpha(model: nn.Module, alpha: float | Mapping[str, float]) -> None:
    """Sets the alpha of every later call of ``model`` that no ``alpha_scope`` decides.

    One number for all memories, or one for each by name (those left out: 0). Raises ``UserError`` outside [0, 1],
    for a model that is not decomposed, an unknown memory, and anything but 0 where there is no ortho stream.
    """
    wanted = Alpha.of(alpha)
    if wanted.batch is not None:
        raise UserError("set_alpha takes one number; for one per row use alpha_scope")
    layers = _require_layers(model).values()
    for layer in layers:
        layer.check(wanted)
    for dial in {layer.dial for layer in layers}:
        dial.default = wanted


def get_alpha(model: nn.Module) -> float | Tensor | dict[str, float | Tensor]:
    """The alpha a call of ``model`` made here would run with; one per row, or by memory, inside such a scope."""
    layer = next(iter(_require_layers(model).values()))
    return effective(layer.dial).plain()


def set_kernel(model: nn.Module, kernel: str) -> None:
    """Asks for an implementation of the products of ``model``: ``auto``, ``reference``, ``cpu`` or ``triton``.

    Where it refuses a product the reference computes it, which is logged once. Raises ``UserError`` for another name
    and for a model that is not decomposed.
    """
    if kernel not in KERNELS:
        raise UserError(f"kernel={kernel!r} is unknown; known: {', '.join(KERNELS)}")
    for layer in _require_layers(model).values():
        layer.kernel = kernel


def chosen_kernels(model: nn.Module, dtype: torch.dtype) -> dict[str, Choice]:
    """What computes the product of one row of activations in ``dtype``, without gradients, by name of the layer."""
    return {
        name: choose(
            layer.kernel,
            Ask(layer._device().type, dtype, 1, layer.out_features, layer.in_features, layer.bits, layer.group_size),
        )
        for name, layer in ortho_layers(model).items()
    }


def ortho_layers(model: nn.Module) -> dict[str, OrthoLinear]:
    """The two-stream layers of ``model`` by dotted name; empty for a plain model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OrthoLinear)}


def get_streams(model: nn.Module) -> dict[str, LayerStreams]:
    """The streams of every decomposed layer of ``model``, checked."""
    return {name: layer.streams() for name, layer in ortho_layers(model).items()}


def replace_modules(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Puts new modules in the place of old ones, in every place: a layer shared by two blocks has two."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is not None and child in swaps:
                setattr(parent, attribute, swaps[child].train(child.training))


def _require_layers(model: nn.Module) -> dict[str, OrthoLinear]:
    layers = ortho_layers(model)
    if not layers:
        raise UserError(f"{type(model).__name__} is not decomposed: it has no OrthoLinear layer")
    return layers


def _linear(model: nn.Module, name: str, streams: LayerStreams) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UserError(f"layer {name!r}: {type(model).__name__} has no module of that name") from None
    if not isinstance(module, nn.Linear):
        raise UserError(f"layer {name!r} is a {type(module).__name__}, not an nn.Linear")
    shape = (module.out_features, module.in_features)
    if shape != streams.shape:
        raise UserError(f"layer {name!r} has shape {shape}, its streams have {streams.shape}")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if module is head:
        raise UserError(f"layer {name!r} is the output embedding, which stays as it is")
    return module


def _check_ortho(model: nn.Module, streams: Mapping[str, LayerStreams]) -> None:
    if not streams:
        raise UserError("no layer to patch: the streams are empty")
    kinds = {frozenset(layer.memories) for layer in streams.values()}
    kinds |= {frozenset(layer.memories) for layer in ortho_layers(model).values()}
    if len(kinds) > 1:
        raise UserError(
            "some layers have an ortho stream and some have none, or of other memories; use OrthoStream.empty"
        )


def _unmark(model: nn.Module) -> None:
    remove_guards(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        # transformers' own way to make a model a plain one again; `layer` needs no import for it.
        quantizer.remove_quantization_config(model)
