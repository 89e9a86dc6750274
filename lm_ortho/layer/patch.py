"""Replacing layers of a model by two-stream layers and back, and setting alpha."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lm_ortho.errors import UserError
from lm_ortho.kernels import KERNELS, Choice, ProductSpec, choose
from lm_ortho.layer.alpha import Alpha, Dial, current_alpha
from lm_ortho.layer.guard import (
    FloatGuard,
    ForwardGuard,
    GenerateGuard,
    Guard,
    HalfGuard,
    UnattachedGuard,
    remove_guards,
)
from lm_ortho.layer.linear_form import make_linear, mark_as_transposed, restore_form, to_linear_form
from lm_ortho.layer.ortho_linear import OrthoLinear
from lm_ortho.streams import LayerStreams


def patch(model: nn.Module, streams: Mapping[str, LayerStreams]) -> list[str]:
    """Replaces ``nn.Linear`` modules of ``model`` by ``OrthoLinear`` in place and returns their names.

    ``streams`` are those of each layer by dotted name. Modules that hold such a layer in another form are converted
    to linear form. The new layers have alpha 0 and keep the bias of the old ones unless the streams have one.

    Raises:
        UserError: before anything is changed, for an unknown name, another shape, the output embedding, or streams of
            which only some have an ortho part.
    """
    converted_names = to_linear_form(model, streams)
    try:
        linears = {name: _get_linear(model, name, layer) for name, layer in streams.items()}
        _check_memories(model, streams)
    except UserError:
        restore_form(model, converted_names)
        raise
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in streams.items():
        old = linears[name]
        if layer.bias is None and old.bias is not None:
            layer = LayerStreams(layer.base, layer.ortho, old.bias, layer.named_memories)
        new = OrthoLinear.from_streams(layer.to(old.weight.device), dtype=old.weight.dtype)
        new.origin = getattr(old, "origin", None)
        replacements[old] = new
    replace_modules(model, replacements)
    connect(model)
    if not isinstance(vars(model).get(UnattachedGuard.method), Guard):
        UnattachedGuard.install(model)
    return list(streams)


def connect(model: nn.Module) -> Dial:
    """Makes all ``OrthoLinear`` layers of ``model`` share one dial, and returns it.

    Also makes ``model.forward`` and ``model.generate`` keep their alpha while they run, and ``model.float`` and
    ``model.half`` work. A second call changes nothing.

    Raises:
        UserError: for a model without such layers.
    """
    layers = _require_layers(model)
    guard = model.__dict__.get("forward")
    dial = guard.dial if isinstance(guard, ForwardGuard) else next(iter(layers.values())).dial
    for layer in layers.values():
        layer.dial = dial
    ForwardGuard.install(model, dial)
    GenerateGuard.install(model, dial)
    FloatGuard.install(model)
    HalfGuard.install(model)
    return dial


def unpatch(model: nn.Module, alpha: float | Mapping[str, float] = 1.0) -> list[str]:
    """Replaces the ``OrthoLinear`` layers of ``model`` by plain weights W(alpha) in place and returns their names.

    ``alpha`` as in ``set_alpha``. The layers become ``nn.Linear``, or what they were before (``Conv1D``, a part of
    fused experts). The weights are trainable and have the dtype of the other parameters of the model.

    Raises:
        UserError: for a model without such layers, with an adapter on them, or without an ortho stream when ``alpha``
            is not 0.
    """
    layers = _require_layers(model)
    if adapted := next((name for name in layers if name.endswith(".base_layer")), None):
        raise UserError(
            f"unpatch: layer {adapted.removesuffix('.base_layer')!r} carries an adapter; remove it first with unload()"
        )
    checked_alpha = Alpha.parse(alpha)
    for layer in layers.values():
        layer.check(checked_alpha)
    factors = checked_alpha.to_factors()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    replacements: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        bias = None if layer.bias is None else layer.bias.detach().to(dtype, copy=True)
        new = make_linear(layer.streams().to_dense(factors, dtype), bias)
        mark_as_transposed(new, layer.origin)
        replacements[layer] = new
    replace_modules(model, replacements)
    restore_form(model)
    _remove_markers(model)
    return list(layers)


def get_dense_weights(
    model: nn.Module, streams: Mapping[str, LayerStreams], alpha: float | Mapping[str, float]
) -> nn.Module:
    """A copy of the plain ``model`` with the weights W(alpha) of these streams."""
    dense_model = copy.deepcopy(model)
    patch(dense_model, streams)
    unpatch(dense_model, alpha)
    return dense_model


def set_alpha(model: nn.Module, alpha: float | Mapping[str, float]) -> None:
    """Sets the alpha of every later call of ``model`` outside any ``alpha_scope``.

    ``alpha`` is one number for all memories, or one for each by name (those left out: 0).

    Raises:
        UserError: for a number outside [0, 1], a model that is not decomposed, an unknown memory, and anything but 0
            where there is no ortho stream.
    """
    checked_alpha = Alpha.parse(alpha)
    if checked_alpha.batch is not None:
        raise UserError("set_alpha takes one number; for one per row use alpha_scope")
    layers = _require_layers(model).values()
    for layer in layers:
        layer.check(checked_alpha)
    is_change = any(layer.dial.default.to_numbers() != checked_alpha.to_numbers() for layer in layers)
    for dial in {layer.dial for layer in layers}:
        dial.default = checked_alpha
    if is_change:  # one dense copy of the weights at a time, not one for each alpha
        for layer in layers:
            layer._cache.forget_weights(checked_alpha)


def get_alpha(model: nn.Module) -> float | Tensor | dict[str, float | Tensor]:
    """The alpha that a call of ``model`` would run with now; one per row, or by memory, inside such a scope."""
    layer = next(iter(_require_layers(model).values()))
    return current_alpha(layer.dial).to_numbers()


def set_kernel(model: nn.Module, kernel: str) -> None:
    """Selects the implementation of the products of ``model``: ``auto``, ``reference``, ``cpu`` or ``triton``.

    A product that it cannot compute falls back to the reference kernel, which is logged once.

    Raises:
        UserError: for another name and for a model that is not decomposed.
    """
    if kernel not in KERNELS:
        raise UserError(f"kernel={kernel!r} is unknown; known: {', '.join(KERNELS)}")
    for layer in _require_layers(model).values():
        layer.kernel = kernel


def choose_kernels(model: nn.Module, dtype: torch.dtype) -> dict[str, Choice]:
    """The kernel of each layer, by name, for one row of activations in ``dtype`` without gradients."""
    choices = {}
    for name, layer in ortho_layers(model).items():
        spec = ProductSpec(
            device=layer.device.type,
            dtype=dtype,
            rows=1,
            out_features=layer.out_features,
            in_features=layer.in_features,
            bits=layer.bits,
            group_size=layer.group_size,
        )
        choices[name] = choose(layer.kernel, spec)
    return choices


def ortho_layers(model: nn.Module) -> dict[str, OrthoLinear]:
    """The two-stream layers of ``model`` by dotted name; empty for a plain model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OrthoLinear)}


def get_streams(model: nn.Module) -> dict[str, LayerStreams]:
    """The streams of every decomposed layer of ``model``, checked."""
    return {name: layer.streams() for name, layer in ortho_layers(model).items()}


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces modules of ``model`` (old -> new) wherever they occur: a layer shared by two blocks occurs twice."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, attribute, replacements[child].train(child.training))


def _require_layers(model: nn.Module) -> dict[str, OrthoLinear]:
    layers = ortho_layers(model)
    if not layers:
        raise UserError(f"{type(model).__name__} is not decomposed: it has no OrthoLinear layer")
    return layers


def _get_linear(model: nn.Module, name: str, streams: LayerStreams) -> nn.Linear:
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


def _check_memories(model: nn.Module, streams: Mapping[str, LayerStreams]) -> None:
    if not streams:
        raise UserError("no layer to patch: the streams are empty")
    memory_sets = {frozenset(layer.memories) for layer in streams.values()}
    memory_sets |= {frozenset(layer.memories) for layer in ortho_layers(model).values()}
    if len(memory_sets) > 1:
        raise UserError(
            "some layers have an ortho stream and some have none, or of other memories; use OrthoStream.empty"
        )


def _remove_markers(model: nn.Module) -> None:
    """Removes the guards and the quantisation config, so that ``model`` is a plain one again."""
    remove_guards(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        # The method of transformers for this purpose; calling it needs no import here.
        quantizer.remove_quantization_config(model)
