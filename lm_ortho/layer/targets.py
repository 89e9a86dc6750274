"""Selection of the layers to decompose, and checks for models that cannot be decomposed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch
from torch import nn

from lm_ortho.errors import UserError
from lm_ortho.layer.linear_form import is_conv1d, is_fused
from lm_ortho.layer.ortho_linear import OrthoLinear

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Class names of packed layers: bitsandbytes, GPTQ, AWQ, HQQ, compressed-tensors, EETQ, AQLM and similar libraries.
_PACKED_CLASSES = ("Linear4bit", "Linear8bitLt", "QuantLinear", "WQLinear", "HQQLinear", "CompressedLinear")
_PACKED_TENSORS = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "SCB", "W_q")
_HEAD_NAMES = ("lm_head", "embed_out", "output_projection")


def find_linear(model: nn.Module, globs: str = "") -> dict[str, nn.Linear]:
    """The linear layers to decompose, by dotted name: all but the output embedding, or those that ``globs`` match.

    ``globs`` are `+`-separated shell patterns, matched against the whole name or its last parts (`down_proj`,
    `mlp.*`, `*.layers.0.*`).

    Raises:
        UserError: for a pattern that matches nothing (naming the closest layers), for un-merged adapters, packed
            weights, a model that is decomposed already, and one without linear layers.
    """
    layers, skip_reasons = survey(model)
    if not layers:
        reasons = sorted(set(skip_reasons.values()))
        raise UserError(
            f"{type(model).__name__} has no linear layer to decompose"
            + (f" (skipped: {'; '.join(reasons)})" if reasons else "")
        )
    if not globs.strip("+ "):
        return layers
    targets: set[str] = set()
    for glob in (part.strip() for part in globs.split("+") if part.strip()):
        matches = {name for name in layers if _matches(name, glob)}
        if not matches:
            raise UserError(_describe_unmatched(glob, layers, skip_reasons))
        targets |= matches
    return {name: linear for name, linear in layers.items() if name in targets}


def survey(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linear layers that can be decomposed, and the names of skipped modules with the reason for each.

    A module that is an ``nn.Linear`` in linear form only (see ``linear_form``) is skipped in any other form.

    Raises:
        UserError: for a model that cannot be decomposed, as in ``find_linear``.
    """
    _check_model(model)
    heads, embedding_ids = _find_output_embeddings(model), _embedding_weight_ids(model)
    layers: dict[str, nn.Linear] = {}
    skip_reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            reason = _explain_unreachable(module)
        elif module in heads:
            reason = "output embedding"
        elif id(module.weight) in embedding_ids:
            reason = "weight tied to an embedding"
        elif type(module).forward is not nn.Linear.forward and not _computes_linear(module):
            reason = f"{type(module).__name__} has a forward of its own"
        else:
            layers[name] = module
            continue
        if reason:
            skip_reasons[name] = reason
    return layers, skip_reasons


def _explain_unreachable(module: nn.Module) -> str:
    """Why the weight matrices of this module cannot be decomposed; empty for a module without any."""
    kind = type(module).__name__
    if is_conv1d(module) or is_fused(module):
        return f"{kind} is a linear layer in linear form only; see lm_ortho.layer.linear_form"
    if isinstance(module, nn.Embedding):
        return ""
    matrices = [name for name, parameter in module._parameters.items() if parameter is not None and parameter.dim() > 1]
    return f"{kind} keeps {' and '.join(matrices)} to itself, not in an nn.Linear" if matrices else ""


@torch.no_grad()
def _computes_linear(module: nn.Linear) -> bool:
    """Whether a class of transformers with its own forward computes what ``nn.Linear`` does, tested on random input."""
    weight = module.weight
    if not type(module).__module__.startswith("transformers."):
        return False
    x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0)).to(weight)
    expected = nn.functional.linear(x, weight, module.bias)
    try:
        output = module(x)
    except Exception:  # it may need other arguments
        return False
    tolerance = 8 * torch.finfo(weight.dtype).eps * float(expected.abs().max())
    return (
        isinstance(output, torch.Tensor)
        and output.shape == expected.shape
        and bool((output - expected).abs().max() <= tolerance)
    )


def _check_model(model: nn.Module) -> None:
    """Raises ``UserError`` for a model that cannot be decomposed at all."""
    method = _quant_method(model)
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, OrthoLinear) or isinstance(getattr(module, "base_layer", None), OrthoLinear):
            raise UserError(f"the model is decomposed already (layer {name!r}); start from its plain weights")
        if hasattr(module, "lora_A") or (_is_peft_module(module) and hasattr(module, "base_layer")):
            raise UserError(f"layer {name!r} is an un-merged adapter ({kind}); merge it first: merge_and_unload()")
        if _is_packed(module):
            raise UserError(
                f"layer {name!r} is quantised already ({method or kind}); decompose the 16-bit model instead"
            )
        weight = getattr(module, "weight", None) if isinstance(module, nn.Linear) else None
        if weight is not None and weight.device.type == "meta":
            raise UserError(f"layer {name!r} has no weights in memory (offloaded); load the whole model")
    if any(_is_peft_module(module) for module in model.modules()):
        raise UserError(f"the model carries an un-merged adapter ({type(model).__name__}); merge it first")
    if method is not None:
        raise UserError(f"the model is quantised already ({method}); decompose the 16-bit model instead")


def _is_peft_module(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.")


def _quant_method(model: nn.Module) -> str | None:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _is_packed(module: nn.Module) -> bool:
    if any(mark in type(module).__name__ for mark in _PACKED_CLASSES):
        return True
    tensors = {**module._parameters, **module._buffers}
    if any(tensors.get(name) is not None for name in _PACKED_TENSORS):
        return True
    return isinstance(module, nn.Linear) and module.weight.dtype not in _WEIGHT_DTYPES


def _find_output_embeddings(model: nn.Module) -> set[nn.Module]:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    heads = {module for name, module in model.named_modules() if name.rpartition(".")[2] in _HEAD_NAMES}
    return heads if head is None else heads | {head}


def _embedding_weight_ids(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}")


def _describe_unmatched(glob: str, layers: dict[str, nn.Linear], skip_reasons: dict[str, str]) -> str:
    skipped_name = next((name for name in skip_reasons if _matches(name, glob)), None)
    if skipped_name is not None:
        return f"targets: {glob!r} matches only {skipped_name!r}, which stays as it is: {skip_reasons[skipped_name]}"
    closest = difflib.get_close_matches(glob, list(dict.fromkeys(_name_endings(layers))), n=3, cutoff=0.5)
    last_parts = sorted({name.rpartition(".")[2] for name in layers})
    hint = f"closest: {', '.join(closest)}" if closest else f"last parts of the names: {', '.join(last_parts)}"
    return f"targets: {glob!r} matches no linear layer; {hint}"


def _name_endings(layers: dict[str, nn.Linear]) -> Iterator[str]:
    """The last parts of every name: first all endings of one part, then of two, and so on."""
    split_names = [name.split(".") for name in layers]
    for length in range(1, max(map(len, split_names), default=0) + 1):
        yield from (".".join(parts[-length:]) for parts in split_names if len(parts) >= length)
