"""Batching of lm-eval requests: how many go through the model at once, and which may share a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.models.huggingface import HFLM

from lm_ortho.runtime import device

TokenizedRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request of lm-eval: its strings, the token ids of the context, and those of the continuation."""


class BatchingMixin(HFLM):
    """``hf`` with batches as large as the memory of the logits allows, unless the user chose a batch size.

    A batch size of 1, the default of lm-eval, counts as no choice.
    """

    batch_size_per_gpu: int | str
    most_rows: int | None = None
    """Largest number of rows in a batch; None if the user chose the batch size."""

    def allow_rows(self, batch_size: int | str | None, max_batch_size: int | None) -> int:
        """Stores the requested batch size, and returns the largest number of rows in a batch."""
        max_rows = device.MAX_BATCH_ROWS if max_batch_size is None else int(max_batch_size)
        self.most_rows = max_rows if batch_size in (1, "1", None) else None
        return max_rows

    @contextmanager
    def _batches_up_to(self, longest: int) -> Iterator[None]:
        """Sets the batch size to as many rows of ``longest`` tokens as fit; the user's own batch size stays."""
        if self.most_rows is None:
            yield
            return
        previous = self.batch_size_per_gpu
        vocabulary = self.model.config.get_text_config().vocab_size
        self.batch_size_per_gpu = device.max_batch_rows(longest, vocabulary, str(self.device), self.most_rows)
        try:
            yield
        finally:
            self.batch_size_per_gpu = previous

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenizedRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Returns (log-likelihood in nats, whether greedy decoding emits the continuation) per request.

        lm-eval (0.4.13) scores requests with the same tokens in one pass. It takes the wrong positions when the same
        tokens are split into context and continuation at two places, so such requests go into separate calls.
        """
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=1)
        with self._batches_up_to(min(longest, self.max_length)):
            for numbers in _group_by_split(requests):
                group = [requests[number] for number in numbers]
                results = super()._loglikelihood_tokens(group, disable_tqdm, override_bs)
                for number, answer in zip(numbers, results, strict=True):
                    answers[number] = answer
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood in nats of each whole text."""
        with self._batches_up_to(self.max_length):
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the generated text per request."""
        contexts = sorted((request.args[0] for request in requests), key=len)[-1:]
        # Generation stores the logits of the last position only; twice the prompt length leaves enough memory.
        longest = 2 * sum(len(self.tok_encode(context)) for context in contexts)
        with self._batches_up_to(min(longest, self.max_length)):
            return super().generate_until(requests, disable_tqdm)


def _group_by_split(requests: Sequence[TokenizedRequest]) -> list[list[int]]:
    """Groups request numbers so that, within a group, equal tokens are split at the same place."""
    groups: list[list[int]] = []
    splits: list[dict[tuple[int, ...], int]] = []  # per group: context length by tokens
    for number, (_, context, continuation) in enumerate(requests):
        key = (*context, *continuation[:-1])
        matches = (i for i, lengths in enumerate(splits) if lengths.get(key, len(context)) == len(context))
        index = next(matches, None)
        if index is None:
            index = len(groups)
            groups.append([])
            splits.append({})
        splits[index][key] = len(context)
        groups[index].append(number)
    return groups
