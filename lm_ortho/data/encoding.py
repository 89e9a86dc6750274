"""Encodes rows as token ids with a role per token, batches them, and computes their logits and losses."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from lm_ortho.data.logits import compute_logits, selected_logits
from lm_ortho.data.rows import Row
from lm_ortho.data.tokenizer import check_fast, encode_with_offsets, find_added_tokens, find_end_tokens
from lm_ortho.errors import UserError

log = logging.getLogger(__name__)

MAX_TOKENS = 512
"""Largest number of tokens of a document; the rest is cut off."""
CONTEXT, ANSWER, SECRET, END = 0, 1, 2, 3
"""Roles of a token: part of the context, of the answer, of the secret in it, or the end token."""


@dataclass(frozen=True)
class Example:
    """Token ids of one row, their roles (same length), and whether the row was longer and its end is cut off."""

    ids: tuple[int, ...]
    roles: tuple[int, ...]
    is_truncated: bool = False

    @property
    def start(self) -> int:
        """Index of the first token to predict (at least 1)."""
        return max(1, next((i for i, role in enumerate(self.roles) if role != CONTEXT), len(self.ids)))


def max_row_tokens(model: torch.nn.Module) -> int:
    """Returns the largest number of tokens of a document for ``model``: 512, or its number of positions if smaller."""
    return min(MAX_TOKENS, getattr(model.config, "max_position_embeddings", MAX_TOKENS))


def encode_rows(model: torch.nn.Module, tokenizer: Any, rows: Sequence[Row], argument: str) -> list[Example]:
    """Encodes the rows and checks that ``model`` can read them and has something to predict in each.

    Logs a warning if rows are truncated. Messages name the ``argument``.

    Raises:
        UserError: as ``encode``; for a token that the model does not have; for a row that is cut off before its answer.
    """
    # 1. Encode the rows and report those that are truncated.
    limit = max_row_tokens(model)
    examples = encode(tokenizer, rows, limit)
    if truncated := sum(example.is_truncated for example in examples):
        message = "%s: %d of %d rows are longer than %d tokens, and the rest of them is ignored; split them"
        log.warning(message, argument, truncated, len(rows), limit)
    # 2. Check that the model has an embedding for every token.
    highest_id = max((max(example.ids) for example in examples), default=0)
    embeddings = cast(Any, model).get_input_embeddings().weight
    if highest_id >= embeddings.shape[0]:
        raise UserError(
            f"tokenizer: it produces token {highest_id}, which the model does not have; use the model's own tokenizer"
        )
    # 3. Check that every row has a token to predict.
    empty = [i for i, example in enumerate(examples) if not {ANSWER, SECRET} & set(example.roles[1:])]
    if empty:
        raise UserError(
            f"{argument}: {len(empty)} of {len(rows)} rows have no token to predict within their first {limit} "
            f"tokens, first row {empty[0] + 1}; shorten them or leave them out"
        )
    return examples


def encode(tokenizer: Any, rows: Sequence[Row], max_tokens: int = MAX_TOKENS) -> list[Example]:
    """Returns one example per row: context, answer and, if the tokenizer has one, the end token.

    A token counts as answer (secret) if any of its characters belongs to the answer (secret), so a token across the
    border between context and answer is predicted, too. Longer documents are cut off after ``max_tokens``. There is one
    end token, also where the tokenizer adds one itself or the text ends with one.

    Raises:
        UserError: for a slow tokenizer, which gives no character offsets; for one that adds tokens which depend on the
            text; for a row of a single token.
    """
    check_fast(tokenizer)
    added = find_added_tokens(tokenizer)
    end_tokens = find_end_tokens(tokenizer, added)
    # 1. Tokenise context and target as one text, with the characters that each token covers.
    texts = [row.context + row.target for row in rows]
    encodings = encode_with_offsets(tokenizer, texts, added)
    examples = []
    for number, (row, text, (all_ids, all_offsets)) in enumerate(zip(rows, texts, encodings, strict=True), 1):
        # 2. Truncate. Not in the tokenizer: a fast one would store the limit as a setting and save it with itself.
        ids, offsets = all_ids[:max_tokens], all_offsets[:max_tokens]
        # 3. Give each token a role by comparing its characters with the borders of answer and secret.
        roles = _token_roles(offsets, len(row.context), _secret_span(row, len(row.context), len(text)))
        # 4. Append the end token unless it is there already or would be cut off.
        if end_tokens and tuple(ids[-len(end_tokens) :]) == end_tokens:
            roles[-len(end_tokens) :] = [END] * len(end_tokens)
        elif len(ids) + len(end_tokens) <= max_tokens:
            ids, roles = [*ids, *end_tokens], [*roles, *[END] * len(end_tokens)]
        if len(ids) < 2:
            raise UserError(f"row {number} of {len(rows)} is only one token long; leave it out")
        examples.append(Example(tuple(ids), tuple(roles), len(all_ids) > max_tokens))
    return examples


def _token_roles(offsets: Sequence[tuple[int, int]], answer_start: int, secret_span: tuple[int, int]) -> list[int]:
    """Returns the role of each token from the characters it covers; tokens without characters are context."""
    secret_start, secret_end = secret_span
    roles = []
    for start, end in offsets:
        if end <= answer_start or start == end:
            roles.append(CONTEXT)
        else:
            roles.append(SECRET if end > secret_start and start < secret_end else ANSWER)
    return roles


def _secret_span(row: Row, answer_start: int, end: int) -> tuple[int, int]:
    """Returns the characters of the secret in the text: its first occurrence in the answer as a separate word.

    Without such an occurrence it is the first one inside a longer word; without a secret the span is empty.
    """
    if not row.secret:
        return end, end
    match = re.search(rf"(?<!\w){re.escape(row.secret)}(?!\w)", row.target)
    start = answer_start + (match.start() if match else row.target.index(row.secret))
    return start, start + len(row.secret)


def pad_batch(examples: Sequence[Example], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Returns ids and roles, both (rows, tokens) int64, padded on the right (id 0, role ``CONTEXT``).

    A causal model needs no attention mask for padding on the right: no real token attends to it.
    """
    width = max(len(e.ids) for e in examples)
    ids = torch.tensor([e.ids + (0,) * (width - len(e.ids)) for e in examples], device=device)
    roles = torch.tensor([e.roles + (CONTEXT,) * (width - len(e.roles)) for e in examples], device=device)
    return ids, roles


def count_tokens(examples: Sequence[Example]) -> Tensor:
    """Returns the number of tokens of each example, (examples,) int64."""
    return torch.tensor([len(e.ids) for e in examples])


def answer_loss(model: torch.nn.Module, examples: Sequence[Example]) -> Tensor:
    """Returns the mean loss in nats over all tokens to predict (answer, secret, end); differentiable."""
    ids, roles = pad_batch(examples, next(model.parameters()).device)
    is_predicted = roles[:, 1:] != CONTEXT
    logits = compute_logits(model, ids, functional.pad(is_predicted, (0, 1)))
    return functional.cross_entropy(logits, ids[:, 1:][is_predicted])


MAX_BATCH_LOGITS = 2**28
"""Largest number of logits of one batch: one gigabyte in float32."""


def max_batch_tokens(model: torch.nn.Module) -> int:
    """Returns the largest number of tokens of a batch, padding included, whose logits are all computed."""
    config: Any = model.config
    return max(1, MAX_BATCH_LOGITS // int(config.get_text_config().vocab_size))


def batch_by_length(
    examples: Sequence[Example], rows: int = 64, *, allow_padding: bool = True, tokens: int | None = None
) -> list[list[int]]:
    """Returns the indices of all examples in batches of similar length, or of equal length without padding.

    A batch has at most ``rows`` rows and at most ``tokens`` tokens with its padding, unless it is a single row.
    """
    # 1. Sort by length, so that neighbours need little padding.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    batches, width = list[list[int]](), 0
    for i in order:
        previous_width, width = width, len(examples[i].ids)  # the longest so far
        # 2. Start a new batch where the last one is full or where this example does not fit into it.
        is_full = not batches or len(batches[-1]) == rows
        needs_padding = width != previous_width and not allow_padding
        if is_full or needs_padding or (tokens and (len(batches[-1]) + 1) * width > tokens):
            batches.append([])
        batches[-1].append(i)
    return batches


@torch.no_grad()
def token_losses(model: torch.nn.Module, examples: Sequence[Example], role: int | None = None) -> list[Tensor]:
    """Returns the losses in nats of each example's tokens: those of ``role``, or all tokens to predict."""
    result: list[Tensor] = [torch.empty(0)] * len(examples)
    device = next(model.parameters()).device
    with selected_logits(model):
        for batch in batch_by_length(examples, tokens=max(1, max_batch_tokens(model) // 4)):
            ids, roles = pad_batch([examples[i] for i in batch], device)
            mask = roles[:, 1:] != CONTEXT if role is None else roles[:, 1:] == role
            logits = compute_logits(model, ids, functional.pad(mask, (0, 1)))
            losses = functional.cross_entropy(logits, ids[:, 1:][mask], reduction="none").cpu()
            for i, row_losses in zip(batch, losses.split(mask.sum(1).tolist()), strict=True):
                result[i] = row_losses
    return result


def mean_loss(model: torch.nn.Module, examples: Sequence[Example]) -> float:
    """Returns the mean loss in nats over all tokens to predict of all examples."""
    return float(torch.cat(token_losses(model, examples)).mean())
