"""Which layers of a model can be decomposed, and which models cannot be."""

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
# Class names of packed layers: bitsandbytes, GPTQ, AWQ, HQQ, compressed-tensors, EETQ, AQLM and their kin.
_PACKED_CLASSES = ("Linear4bit", "Linear8bitLt", "QuantLinear", "WQLinear", "HQQLinear", "CompressedLinear")
_PACKED_TENSORS = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "SCB", "W_q")
_HEAD_NAMES = ("lm_head", "embed_out", "output_projection")


def find_linear(model: nn.Module, globs: str = "") -> dict[str, nn.Linear]:
    """The linear layers to decompose, by dotted name: all but the output embedding, or what ``globs`` name.

    ``globs`` are `+`-separated shell patterns, matched against the whole name or its last parts (`down_proj`,
    `mlp.*`, `*.layers.0.*`). Raises ``UserError`` for a pattern that matches nothing (naming the closest
    layers), for un-merged adapters, packed weights, a model that is decomposed already, and one without
    linear layers.
    """
    found, skipped = survey(model)
    if not found:
        reasons = sorted(set(skipped.values()))
        raise UserError(
            f"{type(model).__name__} has no linear layer to decompose"
            + (f" (skipped: {'; '.join(reasons)})" if reasons else "")
        )
    if not globs.strip("+ "):
        return found
    chosen: set[str] = set()
    for glob in (part.strip() for part in globs.split("+") if part.strip()):
        matches = {name for name in found if _matches(name, glob)}
        if not matches:
            raise UserError(_nothing_matches(glob, found, skipped))
        chosen |= matches
    return {name: linear for name, linear in found.items() if name in chosen}


def survey(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linear layers that can be decomposed, and what is left alone with the reason for each.

    What is an ``nn.Linear`` in linear form only is among the latter in any other (see ``linear_form``). Raises
    ``UserError`` for a model none of whose layers may be touched, as ``find_linear`` says.
    """
    _refuse_unfit(model)
    heads, tied = _heads(model), _embedding_weights(model)
    found: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            reason = _unreached(module)
        elif module in heads:
            reason = "output embedding"
        elif id(module.weight) in tied:
            reason = "weight tied to an embedding"
        elif type(module).forward is not nn.Linear.forward and not _computes_linear(module):
            reason = f"{type(module).__name__} has a forward of its own"
        else:
            found[name] = module
            continue
        if reason:
            skipped[name] = reason
    return found, skipped


def _unreached(module: nn.Module) -> str:
    """Why weights that this module multiplies by are out of reach; empty where there are none."""
    kind = type(module).__name__
    if is_conv1d(module) or is_fused(module):
        return f"{kind} is a linear layer in linear form only; see lm_ortho.layer.linear_form"
    if isinstance(module, nn.Embedding):
        return ""
    own = {name: held for name, held in module._parameters.items() if held is not None and held.dim() > 1}
    return f"{kind} keeps {' and '.join(own)} to itself, not in an nn.Linear" if own else ""


@torch.no_grad()
def _computes_linear(module: nn.Linear) -> bool:
    """Whether a class of transformers with its own forward computes what ``nn.Linear`` does; tried on random input."""
    weight = module.weight
    if not type(module).__module__.startswith("transformers."):
        return False
    x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0)).to(weight)
    expected = nn.functional.linear(x, weight, module.bias)
    try:
        given = module(x)
    except Exception:  # whatever else it may want
        return False
    near = 8 * torch.finfo(weight.dtype).eps * float(expected.abs().max())
    return (
        isinstance(given, torch.Tensor)
        and given.shape == expected.shape
        and bool((given - expected).abs().max() <= near)
    )


def _refuse_unfit(model: nn.Module) -> None:
    method = _quant_method(model)
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, OrthoLinear):
            raise UserError(f"the model is decomposed already (layer {name!r}); start from its plain weights")
        if hasattr(module, "lora_A") or (_of_peft(module) and hasattr(module, "base_layer")):
            raise UserError(f"layer {name!r} is an un-merged adapter ({kind}); merge it first: merge_and_unload()")
        if _packed(module):
            raise UserError(
                f"layer {name!r} is quantised already ({method or kind}); decompose the 16-bit model instead"
            )
        weight = getattr(module, "weight", None) if isinstance(module, nn.Linear) else None
        if weight is not None and weight.device.type == "meta":
            raise UserError(f"layer {name!r} has no weights in memory (offloaded); load the whole model")
    if any(_of_peft(module) for module in model.modules()):
        raise UserError(f"the model carries an un-merged adapter ({type(model).__name__}); merge it first")
    if method is not None:
        raise UserError(f"the model is quantised already ({method}); decompose the 16-bit model instead")


def _of_peft(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.")


def _quant_method(model: nn.Module) -> str | None:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _packed(module: nn.Module) -> bool:
    if any(mark in type(module).__name__ for mark in _PACKED_CLASSES):
        return True
    own = {**module._parameters, **module._buffers}
    if any(own.get(name) is not None for name in _PACKED_TENSORS):
        return True
    return isinstance(module, nn.Linear) and module.weight.dtype not in _WEIGHT_DTYPES


def _heads(model: nn.Module) -> set[nn.Module]:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    named = {module for name, module in model.named_modules() if name.rpartition(".")[2] in _HEAD_NAMES}
    return named if head is None else named | {head}


def _embedding_weights(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}")


def _nothing_matches(glob: str, found: dict[str, nn.Linear], skipped: dict[str, str]) -> str:
    left_alone = next((name for name in skipped if _matches(name, glob)), None)
    if left_alone is not None:
        return f"targets: {glob!r} matches only {left_alone!r}, which stays as it is: {skipped[left_alone]}"
    near = difflib.get_close_matches(glob, list(dict.fromkeys(_endings(found))), n=3, cutoff=0.5)
    known = sorted({name.rpartition(".")[2] for name in found})
    hint = f"closest: {', '.join(near)}" if near else f"last parts of the names: {', '.join(known)}"
    return f"targets: {glob!r} matches no linear layer; {hint}"


def _endings(found: dict[str, nn.Linear]) -> Iterator[str]:
    """Every name from each of its parts on, the shortest first."""
    split = [name.split(".") for name in found]
    for length in range(1, max(map(len, split), default=0) + 1):
        yield from (".".join(parts[-length:]) for parts in split if len(parts) >= length)
