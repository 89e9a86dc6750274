"""Measures whether a model knows rows: greedy extraction of their secrets or answers, and the loss of these tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lm_ortho.data.encoding import (
    ANSWER,
    SECRET,
    Example,
    batch_by_length,
    max_batch_tokens,
    pad_batch,
)
from lm_ortho.data.logits import compute_logits, selected_logits
from lm_ortho.runtime.progress import track

MAX_ROWS = 32
"""Number of rows that are measured: enough to tell none from an eighth, in a few forward passes."""
EXTRACTED_RUN = 16
"""Number of successive greedy tokens that count as extraction of a longer answer or text."""
EXTRACTION_EVIDENCE = 1 / 8
"""Share of extracted rows that is evidence of knowledge by itself."""
SECRET_LOSS, ANSWER_LOSS = 2.0, 3.0
"""Nats per token above which a model guesses. One that knows nothing has 2.3 at random digits and more at names; whole
answers and texts have many tokens that anyone can guess."""
GAIN_EVIDENCE, CLEAR_GAIN = 0.1, 0.5
"""Shares of the base model's loss by which the model must be below it: the first to have learned anything at all, the
second where its loss alone would say that it guesses."""


@dataclass(frozen=True)
class Knowledge:
    """What a model knows of some rows, of which ``secrets`` have a secret.

    ``extracted`` rows have their whole secret (or answer), or 16 successive tokens of it, as greedy predictions after
    the true tokens before. ``loss`` is the mean over rows of the nats per token of secret or answer.
    """

    rows: int
    extracted: int
    loss: float
    secrets: int

    def __str__(self) -> str:
        return f"{self.extracted} of {self.rows} extracted, {self.loss:.2f} nats per token"

    @property
    def extracted_share(self) -> float:
        """Share of the rows that are extracted."""
        return self.extracted / self.rows

    def has_evidence(self, base: Knowledge | None = None) -> bool:
        """Returns whether anything says that the model knows rows; ``base`` is what its base model knows of them.

        It is false only where no sign of knowledge is left: hardly a row is extracted, and either the loss is that of
        guessing, or the base model has the same loss.
        """
        if self.extracted_share >= EXTRACTION_EVIDENCE:
            return True
        if base is not None and self.loss <= (1 - CLEAR_GAIN) * base.loss:
            return True
        share = self.secrets / self.rows
        if self.loss > share * SECRET_LOSS + (1 - share) * ANSWER_LOSS:
            return False
        return base is None or self.loss <= (1 - GAIN_EVIDENCE) * base.loss


def spread(count: int, most: int = MAX_ROWS) -> list[int]:
    """Indices of up to ``most`` of ``count`` rows, at equal distances."""
    return [i * count // most for i in range(most)] if count > most else list(range(count))


@torch.no_grad()
def measure_knowledge(model: nn.Module, rows: Sequence[Sequence[Example]]) -> Knowledge:
    """Measures what ``model`` knows of ``rows``, each of which is given in one or more forms (plain, chat).

    A row counts as extracted if it is in any form, and has the lowest loss of its forms: a model need not know it in a
    form that it was not trained on.
    """
    forms = [form for row in rows for form in row]
    losses, extracted = [0.0] * len(forms), [False] * len(forms)
    device = next(model.parameters()).device
    with selected_logits(model):
        # Losses and greedy tokens need copies of the logits, so a batch has a fifth of the tokens of other passes.
        batches = batch_by_length(forms, rows=16, tokens=max_batch_tokens(model) // 5 + 1)
        for batch in track(batches, "knowledge"):
            ids, roles = pad_batch([forms[i] for i in batch], device)
            measured_roles = torch.tensor([SECRET if _has_secret(forms[i]) else ANSWER for i in batch], device=device)
            mask = roles[:, 1:] == measured_roles[:, None]
            logits, expected = compute_logits(model, ids, functional.pad(mask, (0, 1))), ids[:, 1:][mask]
            counts = mask.sum(1).tolist()
            token_losses = functional.cross_entropy(logits, expected, reduction="none").split(counts)
            is_greedy = (logits.argmax(-1) == expected).split(counts)
            for place, i in enumerate(batch):
                losses[i], extracted[i] = float(token_losses[place].mean()), _is_extracted(is_greedy[place])
    starts = [sum(len(row) for row in rows[:i]) for i in range(len(rows))]
    spans = [range(start, start + len(row)) for start, row in zip(starts, rows, strict=True)]
    return Knowledge(
        rows=len(rows),
        extracted=sum(any(extracted[i] for i in span) for span in spans),
        loss=sum(min(losses[i] for i in span) for span in spans) / len(rows),
        secrets=sum(_has_secret(row[0]) for row in rows),
    )


def _has_secret(example: Example) -> bool:
    return SECRET in example.roles[1:]


def _is_extracted(greedy: Tensor) -> bool:
    """Whether all tokens are greedy, or 16 successive ones."""
    run = longest = 0
    for is_greedy in greedy.tolist():
        run = run + 1 if is_greedy else 0
        longest = max(longest, run)
    return len(greedy) > 0 and longest >= min(EXTRACTED_RUN, len(greedy))
