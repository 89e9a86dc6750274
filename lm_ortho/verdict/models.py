"""The models of the embedded world that a verdict compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lm_ortho.errors import UserError
from lm_ortho.finetune import load_causal_lm, merge_adapter

NAMES = ("base", "memory", "never_saw", "never_saw_2")


def check(weights: Path) -> None:
    """Raises ``UserError`` unless there is a model or an adapter of each of ``NAMES`` in ``weights``."""
    for name in NAMES:
        if not any((weights / name / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise UserError(
                f"weights={str(weights)!r}: no model or adapter in {name}/; expected {', '.join(NAMES)}, as "
                "experiments/full_finetune.py makes them"
            )


def load_model(weights: Path, name: str) -> nn.Module:
    """``name`` as a plain model: an adapter is merged into ``base``, anything else is a whole model."""
    if (weights / name / "adapter_config.json").is_file():
        return merge_adapter(load_causal_lm(weights / "base"), weights / name)
    return load_causal_lm(weights / name)


def load_words(weights: Path) -> Any:
    """The tokenizer of all of them."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(weights / "base")


def plain_lm(model: nn.Module, tokenizer: Any) -> Any:
    """lm-eval's own class around a model without a dial."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=64, softmax_dtype="float32")
