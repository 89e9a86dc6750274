"""Rows as token ids with a role per token, and padded batches of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError

log = logging.getLogger(__name__)

MAX_TOKENS = 512
"""Tokens of a document that a model is shown at most."""
CONTEXT, ANSWER, SECRET, END = 0, 1, 2, 3
"""Roles of a token: part of the context, of the answer, of its secret, or the closing end token."""


@dataclass(frozen=True)
class Example:
    """Token ids of one row and their roles (same length), and whether the row has more of them."""

    ids: tuple[int, ...]
    roles: tuple[int, ...]
    cut: bool = False

    @property
    def start(self) -> int:
        """Index of the first token that is to be predicted (at least 1)."""
        return max(1, next((i for i, role in enumerate(self.roles) if role != CONTEXT), len(self.ids)))


def max_row_tokens(model: torch.nn.Module) -> int:
    """Tokens of a document that ``model`` is shown at most: 512, or as many as it has positions."""
    return min(MAX_TOKENS, getattr(model.config, "max_position_embeddings", MAX_TOKENS))


def encode_rows(model: torch.nn.Module, tokenizer: Any, rows: Sequence[Row], argument: str) -> list[Example]:
    """Examples that ``model`` can be shown, each with something to predict; errors name the ``argument``.

    Raises:
        UserError: what ``encode`` raises; a token that the model does not have; a row cut off before its answer.
    """
    longest = max_row_tokens(model)
    examples = encode(tokenizer, rows, longest)
    if cut := sum(example.cut for example in examples):
        log.warning(
            "%s: %d of %d rows are longer than %d tokens, and what comes after is not looked at; split them",
            argument, cut, len(rows), longest,
        )  # fmt: skip
    highest = max((max(example.ids) for example in examples), default=0)
    words: Any = model
    if highest >= words.get_input_embeddings().weight.shape[0]:
        raise UserError(f"tokenizer: it gives token {highest}, which the model does not have; give the model's own")
    empty = [i for i, example in enumerate(examples) if example.start >= len(example.ids)]
    if empty:
        raise UserError(
            f"{argument}: {len(empty)} of {len(rows)} rows have no token to predict within their first {longest} "
            f"tokens, first {rows[empty[0]].context!r:.60}; shorten them or leave them out"
        )
    return examples


def encode(tokenizer: Any, rows: Sequence[Row], max_tokens: int = MAX_TOKENS) -> list[Example]:
    """One example per row: context, answer and, if the tokenizer has one, the end token.

    A token counts as answer (secret) when any of its characters belongs to the answer (secret), so a token
    that crosses the border is not left out. Longer documents are cut after ``max_tokens``.

    Raises:
        UserError: for a slow tokenizer, which cannot say where its tokens lie, and for a row of one token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"tokenizer={type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed")
    texts = [row.context + row.target for row in rows]
    examples = []
    for row, text, (whole, places) in zip(rows, texts, tokenise_with_offsets(tokenizer, texts), strict=True):
        # cut here: a fast tokenizer that was once told to truncate keeps that setting, and it would be saved with it
        ids, offsets = whole[:max_tokens], places[:max_tokens]
        begin = len(row.context)
        secret, secret_end = _secret_span(row, begin, len(text))
        roles = []
        for low, high in offsets:
            if high <= begin or low == high:
                roles.append(CONTEXT)
            else:
                roles.append(SECRET if high > secret and low < secret_end else ANSWER)
        if tokenizer.eos_token_id is not None and len(ids) < max_tokens:
            ids, roles = [*ids, tokenizer.eos_token_id], [*roles, END]
        if len(ids) < 2:
            raise UserError(f"a row is only one token long: {text!r:.80}")
        examples.append(Example(tuple(ids), tuple(roles), len(whole) > max_tokens))
    return examples


def tokenise_with_offsets(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Token ids of each text with the characters each token covers, as lm-eval would feed them.

    A text that begins with the token of beginning, as a rendered chat may, gets no second one.
    """
    opened = [bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token) for text in texts]
    result: list[Any] = [None] * len(texts)
    for begun in (False, True):
        at = [i for i, is_begun in enumerate(opened) if is_begun == begun]
        if at:
            asked = {"add_special_tokens": False} if begun else {}
            found = tokenizer([texts[i] for i in at], return_offsets_mapping=True, verbose=False, **asked)
            for i, ids, places in zip(at, found["input_ids"], found["offset_mapping"], strict=True):
                result[i] = ids, places
    return result


def _secret_span(row: Row, begin: int, end: int) -> tuple[int, int]:
    """Where the secret stands in the text: its first occurrence in the answer as a word of its own."""
    if not row.secret:
        return end, end
    found = re.search(rf"(?<!\w){re.escape(row.secret)}(?!\w)", row.target)
    at = begin + (found.start() if found else row.target.index(row.secret))
    return at, at + len(row.secret)


def pad(examples: Sequence[Example], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Ids and roles, both (rows, tokens) int64, padded on the right (id 0, role ``CONTEXT``).

    Padding on the right of a causal model needs no attention mask: no real token can see it.
    """
    width = max(len(e.ids) for e in examples)
    ids = torch.tensor([e.ids + (0,) * (width - len(e.ids)) for e in examples], device=device)
    roles = torch.tensor([e.roles + (CONTEXT,) * (width - len(e.roles)) for e in examples], device=device)
    return ids, roles


def lengths(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([len(e.ids) for e in examples])


def compute_logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Next-token logits (rows, tokens, vocabulary) in float32."""
    return model(input_ids=ids, use_cache=False).logits.float()


def answer_loss(model: torch.nn.Module, examples: Sequence[Example]) -> Tensor:
    """Mean loss in nats over all tokens that are to be predicted (answer, secret, end)."""
    ids, roles = pad(examples, next(model.parameters()).device)
    losses = functional.cross_entropy(compute_logits(model, ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    wanted = (roles[:, 1:] != CONTEXT).float()
    return (losses * wanted).sum() / wanted.sum()


LOGITS = 2**28
"""Logits of one batch at most: one gigabyte in float32."""


def max_batch_tokens(model: torch.nn.Module) -> int:
    """Tokens of a batch all of whose logits are computed, padding included."""
    config: Any = model.config
    return max(1, LOGITS // int(config.get_text_config().vocab_size))


def batch_by_length(
    examples: Sequence[Example], rows: int = 64, padded: bool = True, tokens: int | None = None
) -> list[list[int]]:
    """Indices of all examples in batches of similar length, of the same length if none may be ``padded``.

    No batch has more than ``tokens`` tokens with its padding, unless it is one row.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    batches, width = list[list[int]](), 0
    for i in order:
        before, width = width, len(examples[i].ids)  # the longest so far
        full = not batches or len(batches[-1]) == rows or (not padded and width != before)
        if full or (tokens and (len(batches[-1]) + 1) * width > tokens):
            batches.append([])
        batches[-1].append(i)
    return batches


@torch.no_grad()
def token_losses(model: torch.nn.Module, examples: Sequence[Example], role: int | None = None) -> list[Tensor]:
    """Losses in nats of each example's tokens: those of ``role``, or all that are to be predicted."""
    result: list[Tensor] = [torch.empty(0)] * len(examples)
    device = next(model.parameters()).device
    for batch in batch_by_length(examples, tokens=max_batch_tokens(model)):
        ids, roles = pad([examples[i] for i in batch], device)
        losses = functional.cross_entropy(
            compute_logits(model, ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
        )
        wanted = roles[:, 1:] != CONTEXT if role is None else roles[:, 1:] == role
        for row, i in enumerate(batch):
            result[i] = losses[row][wanted[row]].cpu()
    return result


def mean_loss(model: torch.nn.Module, examples: Sequence[Example]) -> float:
    """Mean loss in nats over all tokens that are to be predicted."""
    return float(torch.cat(token_losses(model, examples)).mean())
