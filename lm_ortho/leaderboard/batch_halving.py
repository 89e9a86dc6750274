"""Out of memory: the batch is halved, and said so, until one request alone does not fit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

_REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until", "token_scores")
_TOLD_BY_CPU = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, or the allocator of the CPU, had no room."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(told in str(error) for told in _TOLD_BY_CPU)


def halve_when_full(lm: Any, say: Callable[[str], None]) -> None:
    """Lets each request method of an lm-eval model try again with half of the rows when memory runs out.

    The answers of one call are asked for again from the start; between processes nothing is exchanged in there, so
    each of several may do so alone.
    """

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def ask(*arguments: Any, **options: Any) -> Any:
            while True:
                try:
                    return method(*arguments, **options)
                except (RuntimeError, MemoryError) as error:
                    rows = _rows(lm)
                    if not is_out_of_memory(error) or rows <= 1:
                        raise
                _set_rows(lm, rows // 2)
                say(f"out of memory with {rows} rows at once; going on with {rows // 2}")
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

        return ask

    for name in _REQUESTS:
        if hasattr(lm, name):
            setattr(lm, name, guarded(getattr(lm, name)))


def _rows(lm: Any) -> int:
    """Rows at once; of an automatic batch size, which lm-eval halves itself, 1."""
    given = str(getattr(lm, "most_rows", None) or getattr(lm, "batch_size_per_gpu", 1))
    return int(given) if given.isdigit() else 1


def _set_rows(lm: Any, rows: int) -> None:
    if getattr(lm, "most_rows", None):
        lm.most_rows = rows
    else:
        lm.batch_size_per_gpu = rows
