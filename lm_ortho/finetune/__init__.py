"""Fine-tunes a model on rows, which plants a memory, and merges adapters."""

from lm_ortho.finetune.loading import load_causal_lm, load_config, load_tokenizer, round_to_bf16
from lm_ortho.finetune.lora import save_adapter, train_adapter
from lm_ortho.finetune.merge import merge_adapter
from lm_ortho.finetune.train import FinetunePlan, draw_batches, fine_tune, minimise, train_full

__all__ = [
    "FinetunePlan",
    "draw_batches",
    "fine_tune",
    "load_causal_lm",
    "load_config",
    "load_tokenizer",
    "merge_adapter",
    "minimise",
    "round_to_bf16",
    "save_adapter",
    "train_adapter",
    "train_full",
]
