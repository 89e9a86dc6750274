"""The models of the embedded world that a verdict compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lm_ortho.errors import UserError
from lm_ortho.finetune import load_causal_lm, merge_adapter
from lm_ortho.hub import first_line

MODEL_NAMES = ("base", "memory", "never_saw", "never_saw_2")


def check_weights(weights: Path) -> None:
    """Checks that ``weights`` holds a model or an adapter for each of ``MODEL_NAMES``.

    Raises:
        UserError: For a missing one.
    """
    for name in MODEL_NAMES:
        if not any((weights / name / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise UserError(
                f"weights={str(weights)!r}: no model or adapter in {name}/; expected {', '.join(MODEL_NAMES)}, as "
                "experiments/full_finetune.py writes them"
            )


def load_model(weights: Path, name: str) -> nn.Module:
    """Loads ``name`` as a plain model: an adapter is merged into ``base``, anything else is a full model."""
    if (weights / name / "adapter_config.json").is_file():
        return merge_adapter(load_causal_lm(weights / "base"), weights / name)
    return load_causal_lm(weights / name)


def load_tokenizer(weights: Path) -> Any:
    """Loads the tokenizer that all models share.

    Raises:
        UserError: For a folder without one.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(weights / "base")
    except (ImportError, OSError, ValueError) as error:
        raise UserError(
            f"weights={str(weights)!r}: the tokenizer in base/ cannot be loaded ({first_line(error)})"
        ) from None


def make_hf_lm(model: nn.Module, tokenizer: Any) -> Any:
    """Wraps a plain model, which has no alpha, in lm-eval's own class ``HFLM``."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=64, softmax_dtype="float32")
