"""Several processes that torchrun started: a whole model in each, the documents between them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import chain
from typing import Any

from lm_ortho.harness.round_robin import in_turns


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def make_accelerator(device: str) -> Any:
    """The accelerator that connects the processes, or None where there is only one.

    By itself lm-eval (0.4.13) joins processes on GPUs only. The time limit is lm-eval's: one process may decompose for
    hours while the others wait.
    """
    if world_size() < 2:
        return None
    from accelerate import Accelerator, InitProcessGroupKwargs

    forever = InitProcessGroupKwargs(timeout=timedelta(weeks=52))
    return Accelerator(cpu=device.startswith("cpu"), kwargs_handlers=[forever])


def broadcast(value: Any) -> Any:
    """What the first process says, in every process."""
    if world_size() < 2:
        return value
    import torch

    make_accelerator("cuda" if torch.cuda.is_available() else "cpu")
    heard = [value]
    torch.distributed.broadcast_object_list(heard, src=0)
    return heard[0]


class DistributedMixin:
    """Mixin for ``HFLM``: documents are dealt out to the processes, and come back in their own order.

    lm-eval joins what the processes found one after the other. A bootstrap draws by position, so without the order of
    the documents the bounds of an interval would depend on the number of processes.
    """

    _rank: int
    _world_size: int
    accelerator: Any
    _samples: Sequence[Mapping[str, Any]] | None = None

    def spread(self, accelerator: Any) -> None:
        """Makes this model the share of its process; nothing without an accelerator."""
        if accelerator is not None:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def gather_object(self, obj: Any, dst: int = 0) -> Any:
        """What all processes have, as that of one process; None on the others."""
        parts = super().gather_object(obj, dst)  # type: ignore[misc]
        if not parts or len(parts) < 2:
            return parts
        if any(isinstance(value, list) for value in obj.values()):
            self._samples = parts
            return [{task: _joined_samples([part[task] for part in parts]) for task in obj}]
        seen, self._samples = self._samples, None  # of this evaluation: lm-eval gathers samples first
        return [{task: _joined_values(task, parts, seen) for task in obj}]


def _joined_samples(parts: Sequence[Sequence[Mapping[str, Any]]]) -> list[Any]:
    """Logged samples by filter, and by document within a filter."""
    every = list(chain.from_iterable(parts))
    filters = list(dict.fromkeys(sample["filter"] for sample in every))
    return sorted(every, key=lambda sample: (filters.index(sample["filter"]), sample["doc_id"]))


def _joined_values(task: str, parts: Sequence[Any], seen: Sequence[Any] | None) -> dict[Any, list[Any]]:
    """Values of each metric by document. A document may lack a metric; the samples, if logged, say which ones do."""
    keys = dict.fromkeys(key for part in parts for key in part[task])
    joined = {}
    for metric, name in keys:
        values = [part[task].get((metric, name), []) for part in parts]
        if seen is None:
            joined[metric, name] = list(in_turns(*values))
        else:
            ids = [[s["doc_id"] for s in part[task] if s["filter"] == name and metric in s["metrics"]] for part in seen]
            pairs = [pair for mine, own in zip(ids, values, strict=True) for pair in zip(mine, own, strict=True)]
            joined[metric, name] = [value for _, value in sorted(pairs, key=lambda pair: pair[0])]
    return joined
