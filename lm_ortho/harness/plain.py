"""A model without a dial as lm-eval sees it, with what ours has over ``hf``: FP32 softmax, processes on CPUs."""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM

from lm_ortho.harness import machine, ranks


class PlainLM(ranks.Spread, HFLM):
    """``hf`` with our choices of device, softmax and rows at once, so that its numbers compare with ours."""

    def __init__(
        self, pretrained: str, *, device: str | None = None, batch_size: int | str = 1, **options: Any
    ) -> None:
        """Takes the model args of ``hf``; a batch size of 1 is left to the logits, as ours is."""
        chosen = machine.choose_device(device).choice
        processes = ranks.join(chosen)
        super().__init__(
            pretrained,
            device=chosen,
            batch_size=machine.BATCH_ROWS if batch_size in (1, "1") else batch_size,
            softmax_dtype=options.pop("softmax_dtype", "float32"),
            **options,
        )
        self.pretrained_argument = pretrained
        self.spread(processes)
