"""How many requests go through a model at once, and which of them may."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.models.huggingface import HFLM

from lm_ortho.runtime import device

Scored = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request of lm-eval: its strings, the tokens of the context and of the continuation."""


class BatchingMixin(HFLM):
    """``hf`` in batches of as many requests as the logits allow, unless the user chose a batch size.

    lm-eval's default of one row at a time is taken for no choice.
    """

    batch_size_per_gpu: int | str
    most_rows: int | None = None
    """Rows at once at most; None where the batch size is the user's."""

    def allow_rows(self, batch_size: int | str | None, max_batch_size: int | None) -> int:
        """Takes note of what the user asked for; the most rows that a batch may have."""
        most = device.BATCH_ROWS if max_batch_size is None else int(max_batch_size)
        self.most_rows = most if batch_size in (1, "1", None) else None
        return most

    @contextmanager
    def _rows_for(self, longest: int) -> Iterator[None]:
        """Batches of as many requests as fit; nothing where the user chose a batch size."""
        if self.most_rows is None:  # the user chose
            yield
            return
        before = self.batch_size_per_gpu
        vocabulary = self.model.config.get_text_config().vocab_size
        self.batch_size_per_gpu = device.batch_rows(longest, vocabulary, str(self.device), self.most_rows)
        try:
            yield
        finally:
            self.batch_size_per_gpu = before

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding emits it) per request.

        lm-eval (0.4.13) scores requests with the same tokens in one pass, and takes the wrong positions when
        the same tokens are split into context and continuation at two places; those go into separate calls.
        """
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=1)
        with self._rows_for(min(longest, self.max_length)):
            for numbers in _split_alike(requests):
                part = [requests[number] for number in numbers]
                scored = super()._loglikelihood_tokens(part, disable_tqdm, override_bs)
                for number, answer in zip(numbers, scored, strict=True):
                    answers[number] = answer
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text."""
        with self._rows_for(self.max_length):
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The generated text per request."""
        contexts = sorted((request.args[0] for request in requests), key=len)[-1:]
        # Only the logits of the last position are kept in generation; twice the prompt leaves room.
        longest = 2 * sum(len(self.tok_encode(context)) for context in contexts)
        with self._rows_for(min(longest, self.max_length)):
            return super().generate_until(requests, disable_tqdm)


def _split_alike(requests: Sequence[Scored]) -> list[list[int]]:
    """Request numbers in groups; in a group, equal tokens are split at an equal place."""
    groups: list[list[int]] = []
    splits: list[dict[tuple[int, ...], int]] = []
    for number, (_, context, continuation) in enumerate(requests):
        key = (*context, *continuation[:-1])
        at = next((i for i, known in enumerate(splits) if known.get(key, len(context)) == len(context)), None)
        if at is None:
            at = len(groups)
            groups.append([])
            splits.append({})
        splits[at][key] = len(context)
        groups[at].append(number)
    return groups
