"""Device, dtype and batch size: what is chosen when the user leaves it open, and why."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from lm_ortho.errors import UserError

BATCH_ROWS = 64
"""Rows per batch at most; more brings nothing for the small models and short documents this is for."""
_LOGIT_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Float32 logits held at once; they are the largest activation of a small model."""


class Decision(NamedTuple):
    """A choice and its reason, to be printed together."""

    choice: Any
    reason: str


def require_device(asked: str | None) -> Decision:
    """The device to run on where it was the user who named it: one that is not there is a ``UserError``."""
    if asked and asked.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"device={asked!r}: this machine has no CUDA device that PyTorch can use; leave it out for the CPU"
        )
    return choose_device(asked)


def choose_device(asked: str | None) -> Decision:
    """The device to run on; a CUDA device that is not there becomes the CPU, as in ``lm_eval``.

    ``lm_eval`` fills in ``cuda:0`` for a user who said nothing, so a missing one is no error.
    """
    if asked and asked.partition(":")[0] not in ("cpu", "cuda", "mps", "xpu", "npu", "hpu"):
        raise UserError(f"device={asked!r} is unknown; use cpu or cuda")
    if asked and not asked.startswith("cuda"):
        return Decision(asked, "as asked")
    if not torch.cuda.is_available():
        return Decision("cpu", "no CUDA device")
    index = asked.partition(":")[2] if asked else ""
    if index and not (index.isdigit() and int(index) < torch.cuda.device_count()):
        raise UserError(f"device={asked!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return Decision(asked or "cuda", "as asked" if asked else "a CUDA device is there")


def choose_dtype(asked: str | torch.dtype | None, device: str, stored: torch.dtype) -> Decision:
    """The dtype of activations and dense weights; ``auto`` is the stored one if the device computes in it."""
    if asked not in (None, "auto"):
        dtype = getattr(torch, asked, None) if isinstance(asked, str) else asked
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise UserError(f"dtype={asked!r} is unknown; use auto, float32, bfloat16 or float16")
        return Decision(dtype, "as asked")
    half = stored in (torch.bfloat16, torch.float16)
    if device.startswith("cpu") and half and not (stored == torch.bfloat16 and native_bfloat16()):
        return Decision(torch.float32, f"this CPU has no {str(stored).removeprefix('torch.')} arithmetic")
    return Decision(stored, "as stored")


def native_bfloat16() -> bool:
    """Whether the CPU multiplies BF16 in hardware; elsewhere PyTorch emulates it, many times slower."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(there for name, there in capabilities.items() if "bf16" in name)


def batch_rows(longest: int, vocabulary: int, device: str, most: int = BATCH_ROWS) -> int:
    """Rows per batch so that the float32 logits of ``longest`` tokens each fit the budget of the device."""
    budget = _LOGIT_BYTES.get(device.partition(":")[0], _LOGIT_BYTES["cpu"])
    return max(1, min(most, budget // (4 * vocabulary * max(1, longest))))
