"""Merges LoRA adapters into models, in BF16 values."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from lm_ortho.errors import UserError
from lm_ortho.finetune.loading import check_finite, round_to_bf16
from lm_ortho.finetune.lora import suppress_peft_warnings
from lm_ortho.hub import describe_hub_error


def merge_adapter(model: nn.Module, peft: str | Path) -> nn.Module:
    """Merges the adapter into ``model`` in place, rounds the weights to BF16 values and returns the model.

    Raises:
        UserError: if the adapter cannot be read, does not fit the model, or has NaN or infinite weights.
    """
    from peft import PeftModel

    # 1. Find the adapter: a local directory, or an id on the hub.
    local = Path(str(peft)).expanduser()
    if (local.is_absolute() or local.is_dir()) and not (local / "adapter_config.json").is_file():
        raise UserError(f"peft={str(peft)!r}: no adapter_config.json there; expected a peft adapter directory")
    source = str(local) if local.is_dir() else str(peft)
    try:
        # 2. Load it twice: only ``load_adapter`` returns which tensors and layers did not match.
        with suppress_peft_warnings():
            warnings.filterwarnings("ignore", message="(?s).*missing adapter keys")  # reported below, as an error
            peft_model = PeftModel.from_pretrained(model, source)
            load_result = peft_model.load_adapter(source, "default")
        _check_adapter_fits(peft_model, load_result, str(peft))
        # 3. Merge it.
        merged_model = peft_model.merge_and_unload()
    except UserError:
        raise
    except Exception as error:  # peft, hub and safetensors errors have no common base
        raise UserError(f"peft={str(peft)!r}: could not be merged ({describe_hub_error(error, peft)})") from None
    return round_to_bf16(merged_model).eval()


_SHARED_TENSORS = ("vblora_vector_bank", "prompt_encoder", "tinylora_v", "unilora_theta_d")
"""Parts of the names of tensors that all layers of an adapter share; peft reports them as missing without need."""


def _check_adapter_fits(peft_model: nn.Module, load_result: Any, peft: str) -> None:
    """Raises ``UserError`` for adapter tensors without a layer, adapted layers without a tensor, and NaN weights."""
    if unexpected := list(load_result.unexpected_keys):
        raise UserError(
            f"peft={peft!r}: {len(unexpected)} of its tensors fit no layer of the model, first {unexpected[0]}; it "
            "belongs to another model"
        )
    if missing := [name for name in load_result.missing_keys if not any(part in name for part in _SHARED_TENSORS)]:
        raise UserError(
            f"peft={peft!r}: it lacks {len(missing)} of the tensors that its config and the model require, first "
            f"{missing[0]}; it belongs to another model, or its tensors were renamed"
        )
    check_finite(peft_model, f"peft={peft!r}")
