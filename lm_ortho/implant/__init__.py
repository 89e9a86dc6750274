"""Planting a memory by fine-tuning, and merging it."""

from lm_ortho.implant.lora import Notify, Plan, train_adapter
from lm_ortho.implant.merge import load_causal_lm, load_config, merge_adapter, round_to_bf16

__all__ = [
    "Notify",
    "Plan",
    "load_causal_lm",
    "load_config",
    "merge_adapter",
    "round_to_bf16",
    "train_adapter",
]
