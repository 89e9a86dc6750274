"""What a computation costs: floating-point operations, counted while it runs, and processor time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lm_ortho.markdown import write_text
from lm_ortho.runtime.progress import ProgressCallback

_aten = torch.ops.aten


def _count_sampled_product(pattern: Any, left: Any, *_: Any, **__: Any) -> int:
    """Returns the operations of a product that is computed at the positions of a sparse ``pattern`` only."""
    return 2 * int(pattern.values().numel()) * int(left.shape[-1])


FORMULAS: dict[Any, Any] = {
    **flop_registry,
    # PyTorch has formulas for its attention on GPUs only, and none for sampled products.
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
    _aten.sparse_sampled_addmm: _count_sampled_product,
}


class OperationCounter(TorchDispatchMode):
    """Counts the floating-point operations of matrix products and attention, of every model, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator; adds its operations by ``FORMULAS`` (a multiplication and an addition: two)."""
        result = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=result)
        return result


@dataclass
class Cost:
    """What a computation took: operations in matrix products, and seconds of processor time of this process.

    The sums go on in an interrupted computation, so work that was lost by the interruption counts as well.
    """

    operations: float = 0.0
    seconds: float = 0.0


SAVE_SECONDS = 30.0


@contextmanager
def measure_cost(file: Path) -> Iterator[Callable[[ProgressCallback], ProgressCallback]]:
    """Context that measures a cost and adds it to that in ``file``; yields a wrapper of the progress that saves it."""
    earlier = Cost(**json.loads(file.read_text())) if file.is_file() else Cost()
    start, last_save = time.process_time(), time.monotonic()

    def write() -> None:
        cost = Cost(earlier.operations + counter.operations, earlier.seconds + time.process_time() - start)
        write_text(file, json.dumps(vars(cost)))

    def wrap(progress: ProgressCallback) -> ProgressCallback:
        def report(stage: str, step: int, total: int, text: str) -> None:
            nonlocal last_save
            progress(stage, step, total, text)
            if time.monotonic() - last_save > SAVE_SECONDS:
                write()
                last_save = time.monotonic()

        return report

    with OperationCounter() as counter:
        yield wrap
    write()
