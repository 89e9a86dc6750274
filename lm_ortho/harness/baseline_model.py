"""The lm-eval model class for baselines, which have no alpha: ``hf`` with the extensions of ``LibOrthoLM``."""

from __future__ import annotations

from typing import Any

from lm_ortho.harness import distributed
from lm_ortho.harness.batching import BatchingMixin
from lm_ortho.harness.text_encoding import TextEncodingMixin
from lm_ortho.runtime.device import MAX_BATCH_ROWS, choose_device


class BaselineLM(distributed.DistributedMixin, TextEncodingMixin, BatchingMixin):
    """``hf`` with the same device, FP32 softmax, text encoding, batching and processes as ``LibOrthoLM``.

    Its numbers can therefore be compared with those of ``LibOrthoLM``.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = MAX_BATCH_ROWS,
        **options: Any,
    ) -> None:
        """Takes the model args of ``hf``; with a batch size of 1, batches are as large as the logits allow."""
        max_rows = self.allow_rows(batch_size, max_batch_size)
        selected_device = choose_device(device).choice
        accelerator = distributed.make_accelerator(selected_device)
        super().__init__(
            pretrained,
            device=selected_device,
            batch_size=batch_size,
            max_batch_size=max_rows,
            softmax_dtype=options.pop("softmax_dtype", "float32"),
            **options,
        )
        self.pretrained_argument, self.tokenizer_argument = pretrained, options.get("tokenizer")
        self.spread(accelerator)
