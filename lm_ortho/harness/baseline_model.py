"""A model without a dial as lm-eval sees it, with what ours has over ``hf``: FP32 softmax, processes on CPUs."""

from __future__ import annotations

from typing import Any

from lm_ortho.harness import distributed
from lm_ortho.harness.batching import BatchingMixin
from lm_ortho.runtime.device import BATCH_ROWS, choose_device


class BaselineLM(distributed.DistributedMixin, BatchingMixin):
    """``hf`` with our choices of device, softmax and rows at once, so that its numbers compare with ours."""

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = BATCH_ROWS,
        **options: Any,
    ) -> None:
        """Takes the model args of ``hf``; a batch size of 1 is left to the logits, as ours is."""
        most = self.allow_rows(batch_size, max_batch_size)
        chosen = choose_device(device).choice
        processes = distributed.make_accelerator(chosen)
        super().__init__(
            pretrained,
            device=chosen,
            batch_size=batch_size,
            max_batch_size=most,
            softmax_dtype=options.pop("softmax_dtype", "float32"),
            **options,
        )
        self.pretrained_argument = pretrained
        self.spread(processes)
