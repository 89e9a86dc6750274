"""Retries requests that ran out of memory with half the batch, down to a single row."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

_REQUEST_METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until", "token_scores")
_CPU_MESSAGES = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, or the allocator of the CPU, ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _CPU_MESSAGES)


def halve_batch_on_oom(lm: Any, warn: Callable[[str], None]) -> None:
    """Wraps the request methods of an lm-eval model: each retries with half of the rows when memory runs out.

    A retry computes the answers of the whole call again. Processes exchange nothing within a call, so each of them may
    retry on its own.
    """

    def add_retries(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*arguments: Any, **options: Any) -> Any:
            while True:
                try:
                    return method(*arguments, **options)
                except (RuntimeError, MemoryError) as error:
                    rows = _get_batch_rows(lm)
                    if not is_out_of_memory(error) or rows <= 1:
                        raise
                _set_batch_rows(lm, rows // 2)
                warn(f"out of memory with {rows} rows at once; retrying with {rows // 2}")
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

        return call

    for name in _REQUEST_METHODS:
        if hasattr(lm, name):
            setattr(lm, name, add_retries(getattr(lm, name)))


def _get_batch_rows(lm: Any) -> int:
    """Number of rows in a batch; 1 for an automatic batch size, which lm-eval halves itself."""
    rows = str(getattr(lm, "most_rows", None) or getattr(lm, "batch_size_per_gpu", 1))
    return int(rows) if rows.isdecimal() else 1


def _set_batch_rows(lm: Any, rows: int) -> None:
    if getattr(lm, "most_rows", None):
        lm.most_rows = rows
    else:
        lm.batch_size_per_gpu = rows
