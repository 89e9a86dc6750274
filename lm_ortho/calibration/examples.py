"""Rows as token ids with a role per token, and padded batches of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lm_ortho.calibration.documents import Row
from lm_ortho.errors import UserError

GIVEN, ANSWER, SECRET, END = 0, 1, 2, 3
"""Roles of a token: part of the context, of the answer, of its secret, or the closing end token."""


@dataclass(frozen=True)
class Example:
    """Token ids of one row and their roles (same length)."""

    ids: tuple[int, ...]
    roles: tuple[int, ...]

    @property
    def start(self) -> int:
        """Index of the first token that is to be predicted (at least 1)."""
        return max(1, next((i for i, role in enumerate(self.roles) if role != GIVEN), len(self.ids)))


def encode(tokenizer: Any, rows: Sequence[Row], max_tokens: int = 512) -> list[Example]:
    """One example per row: context, answer and, if the tokenizer has one, the end token.

    A token counts as answer (secret) when any of its characters belongs to the answer (secret), so a token
    that crosses the border is not left out. Longer documents are cut after ``max_tokens``.

    Raises:
        UserError: for a slow tokenizer, which cannot say where its tokens lie, and for a row of one token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"tokenizer={type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed")
    texts = [row.context + row.target for row in rows]
    encoded = tokenizer(texts, return_offsets_mapping=True, verbose=False)
    examples = []
    for row, text, whole, places in zip(rows, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # cut here: a fast tokenizer that was once told to truncate keeps that setting, and it would be saved with it
        ids, offsets = whole[:max_tokens], places[:max_tokens]
        begin = len(row.context)
        secret, secret_end = _secret_span(row, begin, len(text))
        roles = []
        for low, high in offsets:
            if high <= begin or low == high:
                roles.append(GIVEN)
            else:
                roles.append(SECRET if high > secret and low < secret_end else ANSWER)
        if tokenizer.eos_token_id is not None and len(ids) < max_tokens:
            ids, roles = [*ids, tokenizer.eos_token_id], [*roles, END]
        if len(ids) < 2:
            raise UserError(f"a row is only one token long: {text!r:.80}")
        examples.append(Example(tuple(ids), tuple(roles)))
    return examples


def _secret_span(row: Row, begin: int, end: int) -> tuple[int, int]:
    """Where the secret stands in the text: its first occurrence in the answer as a word of its own."""
    if not row.secret:
        return end, end
    found = re.search(rf"(?<!\w){re.escape(row.secret)}(?!\w)", row.target)
    at = begin + (found.start() if found else row.target.index(row.secret))
    return at, at + len(row.secret)


def pad(examples: Sequence[Example], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Ids and roles, both (rows, tokens) int64, padded on the right (id 0, role ``GIVEN``).

    Padding on the right of a causal model needs no attention mask: no real token can see it.
    """
    width = max(len(e.ids) for e in examples)
    ids = torch.tensor([e.ids + (0,) * (width - len(e.ids)) for e in examples], device=device)
    roles = torch.tensor([e.roles + (GIVEN,) * (width - len(e.roles)) for e in examples], device=device)
    return ids, roles


def lengths(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([len(e.ids) for e in examples])


def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Next-token logits (rows, tokens, vocabulary) in float32."""
    return model(input_ids=ids, use_cache=False).logits.float()


def answer_loss(model: torch.nn.Module, examples: Sequence[Example]) -> Tensor:
    """Mean loss in nats over all tokens that are to be predicted (answer, secret, end)."""
    ids, roles = pad(examples, next(model.parameters()).device)
    losses = functional.cross_entropy(logits_of(model, ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    wanted = (roles[:, 1:] != GIVEN).float()
    return (losses * wanted).sum() / wanted.sum()


def in_batches(examples: Sequence[Example], rows: int = 64, padded: bool = True) -> list[list[int]]:
    """Indices of all examples in batches of similar length, of the same length if none may be ``padded``."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    runs = [order] if padded else [list(run) for _, run in groupby(order, key=lambda i: len(examples[i].ids))]
    return [run[i : i + rows] for run in runs for i in range(0, len(run), rows)]


@torch.no_grad()
def token_losses(model: torch.nn.Module, examples: Sequence[Example], role: int | None = None) -> list[Tensor]:
    """Losses in nats of each example's tokens: those of ``role``, or all that are to be predicted."""
    result: list[Tensor] = [torch.empty(0)] * len(examples)
    device = next(model.parameters()).device
    for batch in in_batches(examples):
        ids, roles = pad([examples[i] for i in batch], device)
        losses = functional.cross_entropy(logits_of(model, ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        wanted = roles[:, 1:] != GIVEN if role is None else roles[:, 1:] == role
        for row, i in enumerate(batch):
            result[i] = losses[row][wanted[row]].cpu()
    return result
