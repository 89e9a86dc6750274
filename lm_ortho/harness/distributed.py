"""Evaluation in several processes started by torchrun: each holds a whole model and a share of the documents."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import chain
from typing import Any

from lm_ortho.harness.round_robin import interleave


def world_size() -> int:
    """Returns the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Returns the number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def make_accelerator(device: str) -> Any:
    """Returns the accelerator that connects the processes, or None for a single process.

    lm-eval (0.4.13) itself connects processes on GPUs only. The time limit is that of lm-eval: one process may
    decompose a model for hours while the others wait.
    """
    if world_size() < 2:
        return None
    from accelerate import Accelerator, InitProcessGroupKwargs

    timeout = InitProcessGroupKwargs(timeout=timedelta(weeks=52))
    atexit.register(_leave_group)
    return Accelerator(cpu=device.startswith("cpu"), kwargs_handlers=[timeout])


def _leave_group() -> None:
    """Ends the connection while the interpreter is whole; threads of it that outlive that can abort the process."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def broadcast(value: Any) -> Any:
    """Returns the value of the first process in every process."""
    if world_size() < 2:
        return value
    import torch

    make_accelerator("cuda" if torch.cuda.is_available() else "cpu")
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


class DistributedMixin:
    """Mixin for ``HFLM``: documents are distributed over the processes, and results return in document order.

    lm-eval concatenates the results of the processes. A bootstrap draws by position, so without the order of the
    documents the bounds of an interval would depend on the number of processes.
    """

    _rank: int
    _world_size: int
    accelerator: Any
    _samples: Sequence[Mapping[str, Any]] | None = None

    def spread(self, accelerator: Any) -> None:
        """Restricts this model to the documents of its process; does nothing without an accelerator."""
        if accelerator is not None:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def gather_object(self, obj: Any, dst: int = 0) -> Any:
        """Returns the results of all processes as one on process ``dst``; None on the others."""
        parts = super().gather_object(obj, dst)  # type: ignore[misc]
        if not parts or len(parts) < 2:
            return parts
        if any(isinstance(value, list) for value in obj.values()):
            self._samples = parts
            return [{task: _merge_samples([part[task] for part in parts]) for task in obj}]
        samples, self._samples = self._samples, None  # lm-eval gathers the samples of an evaluation first
        return [{task: _merge_values(task, parts, samples) for task in obj}]


def _merge_samples(parts: Sequence[Sequence[Mapping[str, Any]]]) -> list[Any]:
    """Merges logged samples, sorted by filter and by document within a filter."""
    samples = list(chain.from_iterable(parts))
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    return sorted(samples, key=lambda sample: (filters.index(sample["filter"]), sample["doc_id"]))


def _merge_values(task: str, parts: Sequence[Any], samples: Sequence[Any] | None) -> dict[Any, list[Any]]:
    """Merges the values of each metric in document order.

    A document may lack a metric; the ``samples`` of each process, if they were logged, show which documents do.
    """
    keys = dict.fromkeys(key for part in parts for key in part[task])
    merged = {}
    for metric, filter_name in keys:
        values = [part[task].get((metric, filter_name), []) for part in parts]
        if samples is None:
            merged[metric, filter_name] = list(interleave(*values))
            continue
        pairs: list[tuple[int, Any]] = []
        for part_samples, part_values in zip(samples, values, strict=True):
            ids = _documents_with_metric(part_samples[task], metric, filter_name)
            pairs += zip(ids, part_values, strict=True)
        merged[metric, filter_name] = [value for _, value in sorted(pairs, key=lambda pair: pair[0])]
    return merged


def _documents_with_metric(samples: Sequence[Mapping[str, Any]], metric: str, filter_name: str) -> list[int]:
    """Returns the ids of the documents that have a value for the metric, in the order of the samples."""
    return [s["doc_id"] for s in samples if s["filter"] == filter_name and metric in s["metrics"]]
