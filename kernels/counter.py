"""Counts how often each kernel ran in this process."""

from __future__ import annotations

import threading
from collections import Counter

_lock = threading.Lock()
_calls: Counter[str] = Counter()


def record(kernel: str) -> None:
    """Counts one run of ``kernel``, named ``<implementation>.<path>``."""
    with _lock:
        _calls[kernel] += 1


def calls() -> dict[str, int]:
    """The number of runs of each kernel since the start of the process or the last ``reset_calls``."""
    with _lock:
        return dict(_calls)


def reset_calls() -> None:
    """Sets all counts to zero."""
    with _lock:
        _calls.clear()
