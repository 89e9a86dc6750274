"""Loads the original model, the base model and the tokenizer that a specification names."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lm_ortho import finetune
from lm_ortho.config import ModelSpec
from lm_ortho.data.tokenizer import count_ids
from lm_ortho.finetune import load_causal_lm
from lm_ortho.finetune.adapter import fit_vocabulary
from lm_ortho.finetune.merge import merge_with_report
from lm_ortho.pipeline.spec import ResolvedModel, locate_model
from lm_ortho.runtime.progress import ProgressCallback, no_progress


def load_models(
    resolved: ResolvedModel, progress: ProgressCallback = no_progress
) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """The merged model and, if it is known, the base model; float32 holding BF16 values.

    Both have the vocabulary that the adapter needs. ``progress`` gets a line about what the adapter changed.

    Raises:
        UserError: names the argument at fault; for an adapter that changes nothing.
    """
    spec, peft = resolved.spec, resolved.adapter
    model = load_causal_lm(resolved.location, **spec.loading_options)
    tokens = count_ids(load_tokenizer(resolved)) if peft else 0
    size = fit_vocabulary(model, peft, tokens) if peft else None
    base_model: Any = None
    if spec.base not in ("auto", "none"):
        base_model = load_base(spec)
        if size is not None and peft and base_model.get_input_embeddings().weight.shape[0] < size:
            fit_vocabulary(base_model, peft, tokens)
    elif peft and spec.base == "auto":
        base_model = copy.deepcopy(model)
    if not peft:
        return model, base_model
    merged = merge_with_report(model, peft, tokens)
    merged.check_effect()
    progress("adapter", 1, 1, merged.describe())
    return merged.model, base_model


def load_base(spec: ModelSpec) -> torch.nn.Module:
    """The base model that ``spec.base`` names; ``trust_remote_code`` and ``token`` apply to it as well."""
    return load_causal_lm(locate_model(spec.base), argument="base", **spec.access_options)


def load_tokenizer(resolved: ResolvedModel) -> Any:
    """The tokenizer that was named, or the one of the adapter or of the model; ``UserError`` if there is none."""
    named = resolved.tokenizer
    if named is not None and not isinstance(named, str):
        return named
    default = resolved.location.name_or_path if resolved.kind == "object" else resolved.location
    is_of_adapter = named is not None and resolved.spec.tokenizer is None
    options = resolved.spec.access_options if is_of_adapter else resolved.spec.loading_options
    return finetune.load_tokenizer(named or default, **options)
