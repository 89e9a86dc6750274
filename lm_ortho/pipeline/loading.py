"""Loads the original model, the base model and the tokenizer that a specification names."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lm_ortho import finetune, world
from lm_ortho.config import ModelSpec
from lm_ortho.finetune import load_causal_lm, merge_adapter
from lm_ortho.pipeline.spec import ResolvedModel, locate_model


def load_models(resolved: ResolvedModel) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """The merged model and, if it is known, the base model; float32 holding BF16 values."""
    spec = resolved.spec
    peft = str(world.get_path("memory")) if resolved.kind == "embedded" else spec.peft
    model = load_causal_lm(resolved.location, **spec.loading_options)
    base_model: torch.nn.Module | None = None
    if spec.base not in ("auto", "none"):
        base_model = load_base(spec)
    elif peft and spec.base == "auto":
        base_model = copy.deepcopy(model)
    return (merge_adapter(model, peft) if peft else model), base_model


def load_base(spec: ModelSpec) -> torch.nn.Module:
    """The base model that ``spec.base`` names; ``trust_remote_code`` and ``token`` apply to it as well."""
    return load_causal_lm(locate_model(spec.base), argument="base", **spec.access_options)


def load_tokenizer(resolved: ResolvedModel) -> Any:
    """The tokenizer that was named, or the one in the directory of the model; ``UserError`` if there is none."""
    spec = resolved.spec
    if spec.tokenizer is not None and not isinstance(spec.tokenizer, str):
        return spec.tokenizer
    default = resolved.location.name_or_path if resolved.kind == "object" else resolved.location
    return finetune.load_tokenizer(spec.tokenizer or default, **spec.loading_options)
