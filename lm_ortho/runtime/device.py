"""Default device, dtype and batch size, each with the reason for the choice."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

from lm_ortho.errors import UserError

MAX_BATCH_ROWS = 64
"""Largest number of rows per batch; more does not help with the small models and short documents of this package."""
_LOGIT_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Memory for the float32 logits of one batch; they are the largest activation of a small model."""


class Decision(NamedTuple):
    """A choice and its reason, to be printed together."""

    choice: Any
    reason: str


_BATCH_SIZE = re.compile(r"[1-9][0-9]{0,8}|auto(:[1-9][0-9]{0,8})?")


def is_batch_size(value: object) -> bool:
    """Whether lm-eval takes ``value`` as a batch size: a whole number above 0, ``auto``, ``auto:N``, or None."""
    is_number = type(value) is int and 0 < value < 10**9
    return value is None or is_number or (isinstance(value, str) and bool(_BATCH_SIZE.fullmatch(value)))


def check_batch_size(value: object) -> None:
    """Raises ``UserError`` for a batch size that lm-eval does not take."""
    if not is_batch_size(value):
        raise UserError(f"batch_size={value!r:.80} must be a whole number from 1 on, auto, or auto:N")


def require_device(device: str | None) -> Decision:
    """Returns the device to run on; for a device that the user named.

    Raises:
        UserError: if a CUDA device was named and PyTorch cannot use one.
    """
    if device and device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"device={device!r}: this machine has no CUDA device that PyTorch can use; leave it out for the CPU"
        )
    return choose_device(device)


def choose_device(device: str | None) -> Decision:
    """Returns the device to run on; a missing CUDA device is replaced by the CPU, as in ``lm_eval``.

    ``lm_eval`` fills in ``cuda:0`` for users who name no device, so a missing one is not an error.

    Raises:
        UserError: for an unknown device, and for an index beyond the last CUDA device.
    """
    if device and device.partition(":")[0] not in ("cpu", "cuda", "mps", "xpu", "npu", "hpu"):
        raise UserError(f"device={device!r} is unknown; use cpu or cuda")
    if device and not device.startswith("cuda"):
        return Decision(device, "as requested")
    if not torch.cuda.is_available():
        return Decision("cpu", "no CUDA device")
    index = device.partition(":")[2] if device else ""
    if index and not (index.isdecimal() and int(index) < torch.cuda.device_count()):
        raise UserError(f"device={device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return Decision(device or "cuda", "as requested" if device else "a CUDA device is available")


def choose_dtype(dtype: str | torch.dtype | None, device: str, stored_dtype: torch.dtype) -> Decision:
    """Returns the dtype of activations and dense weights.

    None and ``auto`` mean ``stored_dtype``, the dtype of the checkpoint, or float32 on a CPU without arithmetic for it.

    Raises:
        UserError: for an unknown dtype.
    """
    if dtype not in (None, "auto"):
        choice = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(choice, torch.dtype) or not choice.is_floating_point:
            raise UserError(f"dtype={dtype!r} is unknown; use auto, float32, bfloat16 or float16")
        return Decision(choice, "as requested")
    is_half = stored_dtype in (torch.bfloat16, torch.float16)
    if device.startswith("cpu") and is_half and not (stored_dtype == torch.bfloat16 and has_native_bfloat16()):
        return Decision(torch.float32, f"this CPU has no {str(stored_dtype).removeprefix('torch.')} arithmetic")
    return Decision(stored_dtype, "as stored")


def has_native_bfloat16() -> bool:
    """Returns whether the CPU multiplies BF16 in hardware; without that, PyTorch emulates it many times slower."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(is_available for name, is_available in capabilities.items() if "bf16" in name)


def max_batch_rows(longest: int, vocabulary: int, device: str, limit: int = MAX_BATCH_ROWS) -> int:
    """Returns the number of rows of ``longest`` tokens whose float32 logits fit the budget of the device.

    The result is at least 1 and at most ``limit``.
    """
    budget = _LOGIT_BYTES.get(device.partition(":")[0], _LOGIT_BYTES["cpu"])
    return max(1, min(limit, budget // (4 * vocabulary * max(1, longest))))
