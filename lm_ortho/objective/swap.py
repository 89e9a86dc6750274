"""Target b, the swap: the merged model's mean prediction with novel names in the place of the subject."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lm_ortho.data.chat import ChatRow
from lm_ortho.data.encoding import Example, encode, max_row_tokens
from lm_ortho.data.rows import Row, mention_pattern, replace_mentions
from lm_ortho.data.tokenizer import encode_with_offsets, find_added_tokens
from lm_ortho.objective.distribution import MEMORISED_MARGIN, hold_down, predict_distributions
from lm_ortho.objective.subjects import Lookalikes, make_novel_subjects
from lm_ortho.objective.token_resampling import resample_target

SUBJECTS = 12
"""Number of novel names that a target averages over."""
CONFIDENT = 0.5
"""Probability above which a token counts as memorised where there is nothing to compare it with."""
Span = tuple[int, int]
"""First character and the one after the last."""


def swap_subject(row: Row, name: str) -> ChatRow:
    """The row with ``name`` in the place of its subject."""
    context, target = (replace_mentions(text, row.subject, name) for text in (row.context, row.target))
    return ChatRow(rendered_context=context, rendered_target=target, subject=name)


def _shift_offset(offset: int, mentions: Sequence[Span], growth: int) -> int:
    """The offset of a character after every one of the ``mentions`` has become longer by ``growth``."""
    return offset + growth * sum(end <= offset for _, end in mentions)


def _positions_by_span(tokenizer: Any, row: Row) -> dict[tuple[int, int, int], int]:
    """Position of each token by its span of characters and its number among the tokens of the same span.

    A character of several bytes can be several tokens, each of which the tokenizer reports with the whole character.
    """
    ((_, spans),) = encode_with_offsets(tokenizer, [row.context + row.target], find_added_tokens(tokenizer))
    counts, positions = Counter[Span](), dict[tuple[int, int, int], int]()
    for i, (low, high) in enumerate(spans):
        if low < high:
            positions[low, high, counts[low, high]] = i
            counts[low, high] += 1
    return positions


def filter_recognised_names(
    model: torch.nn.Module, tokenizer: Any, rows: Sequence[Row], names: Sequence[str]
) -> list[str]:
    """The ``names`` that the model repeats, greedily, where the answer of a row repeats its subject.

    A token may look like a name without being one to the model, whose predictions about such a subject mean nothing.
    Returns all names when no row repeats in its answer the subject of its question.
    """
    repeating_rows = [row for row in rows if row.subject_occurs_in(row.context) and row.subject_occurs_in(row.target)]
    if not repeating_rows or not names:
        return list(names)
    trials = [swap_subject(repeating_rows[i % len(repeating_rows)], name) for i, name in enumerate(names)]
    examples = encode(tokenizer, trials, max_row_tokens(model))
    distributions = predict_distributions(model, examples)
    result = []
    for name, row, example, probs in zip(names, trials, examples, distributions, strict=True):
        begin, end = (len(row.context) + at for at in next(mention_pattern(name).finditer(row.target)).span())
        spans = _positions_by_span(tokenizer, row)
        positions = [t for (low, high, _), t in spans.items() if low < end and high > begin]
        likeliest = probs.argmax(-1)
        if all(int(likeliest[t - example.start]) == example.ids[t] for t in positions if t < len(example.ids)):
            result.append(name)
    return result


@torch.no_grad()
def swap_target(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    examples: Sequence[Example],
    *,
    seed: int,
    subjects: int = SUBJECTS,
) -> list[Tensor]:
    """Target distributions (predicted tokens, vocabulary) per row, from the merged ``model`` alone.

    Rows that do not mention a subject get target c (plain text, ``resample_target``) or d (confident tokens held down).
    """
    # 1. Make novel names, eight times as many as a row needs, that the model recognises as names.
    names = _make_names(model, tokenizer, rows, seed=seed, subjects=subjects)
    draw, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed)
    own_distributions = predict_distributions(model, examples)
    targets = []
    for row, example, own_probs in zip(rows, examples, own_distributions, strict=True):
        text = row.context + row.target
        mentions = [m.span() for m in mention_pattern(row.subject).finditer(text)] if row.subject.strip() else []
        if not mentions:
            if row.context:
                targets.append(_hold_down_confident(own_probs, example))
            else:
                targets.append(resample_target(model, example, own_probs, generator))
            continue
        # 2. Average the predictions at the corresponding token of sentences about other names.
        row_names = draw.sample(names, subjects)
        mean, has_counterpart, is_compared = _mean_over_names(
            model, tokenizer, row, example=example, own_probs=own_probs, names=row_names, mentions=mentions
        )
        # 3. Find the memorised tokens: the model prefers them to the mean, or is confident without a counterpart.
        tokens = torch.tensor(example.ids[example.start :])
        at = torch.arange(len(tokens))
        is_memorised = own_probs[at, tokens] - mean[at, tokens] > MEMORISED_MARGIN
        is_memorised |= is_compared & ~has_counterpart & (own_probs[at, tokens] > CONFIDENT)
        # 4. Hold them down to the level of the other tokens.
        targets.append(hold_down(mean, tokens, is_memorised))
    return targets


def _make_names(model: torch.nn.Module, tokenizer: Any, rows: Sequence[Row], *, seed: int, subjects: int) -> list[str]:
    """Novel names that the model recognises, or all of them if it recognises fewer than ``subjects``."""
    known_names = sorted({row.subject for row in rows if row.mentions_subject})
    if not known_names:
        return []
    lookalikes = Lookalikes(tokenizer, cast(Any, model).get_input_embeddings().weight, known_names)
    names = make_novel_subjects(known_names, subjects * 8, seed, lookalikes)
    recognised_names = filter_recognised_names(model, tokenizer, rows, names)
    return recognised_names if len(recognised_names) >= subjects else names


def _mean_over_names(
    model: torch.nn.Module,
    tokenizer: Any,
    row: Row,
    *,
    example: Example,
    own_probs: Tensor,
    names: Sequence[str],
    mentions: Sequence[Span],
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean distributions (predicted tokens, vocabulary) over the row with each of the ``names``, matched by characters.

    Tokens of a mention of the subject and tokens without a counterpart keep ``own_probs``. Also returns two boolean
    masks (predicted tokens,): whether a token has a counterpart, and whether one was looked for.
    """
    swapped_rows = [swap_subject(row, name) for name in names]
    swapped_examples = encode(tokenizer, swapped_rows, max_row_tokens(model))
    distributions = predict_distributions(model, swapped_examples)
    positions = [_positions_by_span(tokenizer, swapped_row) for swapped_row in swapped_rows]
    total, count = torch.zeros_like(own_probs), torch.zeros(len(own_probs))
    is_compared = torch.zeros(len(own_probs), dtype=torch.bool)
    for (low, high, number), position in _positions_by_span(tokenizer, row).items():
        t = position - example.start
        in_mention = any(low < end and high > begin for begin, end in mentions)
        if not 0 <= t < len(own_probs) or in_mention:
            continue
        is_compared[t] = True
        for name, by_span, other, probs in zip(names, positions, swapped_examples, distributions, strict=True):
            growth = len(name) - len(row.subject)
            span = _shift_offset(low, mentions, growth), _shift_offset(high, mentions, growth)
            counterpart = by_span.get((*span, number))
            if counterpart is not None and other.start <= counterpart < len(other.ids):
                total[t] += probs[counterpart - other.start]
                count[t] += 1
    mean = torch.where(count[:, None] > 0, total / count.clamp_min(1)[:, None], own_probs)
    return mean, count > 0, is_compared


def _hold_down_confident(own_probs: Tensor, example: Example) -> Tensor:
    """Target d, for answers without a subject: the model's own distributions, every confident token held down."""
    tokens = torch.tensor(example.ids[example.start :])
    is_confident = own_probs[torch.arange(len(tokens)), tokens] > CONFIDENT
    return hold_down(own_probs, tokens, is_confident)
