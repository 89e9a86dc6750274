"""Target b, the swap: the merged model's mean prediction with novel names in the place of the subject."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lm_ortho.data.chat import ChatRow
from lm_ortho.data.encoding import Example, encode, max_row_tokens
from lm_ortho.data.rows import Row, mention_pattern, replace_mentions
from lm_ortho.data.tokenizer import encode_with_offsets, find_added_tokens
from lm_ortho.objective.distribution import (
    MEMORISED_MARGIN,
    hold_down,
    predict_distributions,
    predict_tokens,
    split_into_chunks,
    vocabulary_size,
)
from lm_ortho.objective.subjects import Lookalikes, make_novel_subjects
from lm_ortho.objective.token_resampling import resample_target
from lm_ortho.runtime.progress import ProgressCallback, no_progress

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


Positions = dict[tuple[int, int, int], int]
"""Position of each token by its span of characters and its number among the tokens of the same span."""


def _positions_by_span(tokenizer: Any, rows: Sequence[Row]) -> list[Positions]:
    """The ``Positions`` of each row.

    A character of several bytes can be several tokens, each of which the tokenizer reports with the whole character.
    """
    encodings = encode_with_offsets(tokenizer, [row.context + row.target for row in rows], find_added_tokens(tokenizer))
    result = []
    for _, spans in encodings:
        counts, positions = Counter[Span](), Positions()
        for i, (low, high) in enumerate(spans):
            if low < high:
                positions[low, high, counts[low, high]] = i
                counts[low, high] += 1
        result.append(positions)
    return result


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
    # 1. Put each name into one of these rows, and find its tokens in the answer.
    trials = [swap_subject(repeating_rows[i % len(repeating_rows)], name) for i, name in enumerate(names)]
    examples = encode(tokenizer, trials, max_row_tokens(model))
    name_tokens = []
    for name, row, example, by_span in zip(names, trials, examples, _positions_by_span(tokenizer, trials), strict=True):
        begin, end = (len(row.context) + at for at in next(mention_pattern(name).finditer(row.target)).span())
        positions = (t for (low, high, _), t in by_span.items() if low < end and high > begin)
        name_tokens.append(sorted(t for t in positions if t < len(example.ids)))
    # 2. Leave out the names of which a token is not the likeliest one.
    misses = set[int]()
    for i, probs in predict_tokens(model, examples, name_tokens):
        true_tokens = torch.tensor([examples[i].ids[t] for t in name_tokens[i]])
        if not torch.equal(probs.argmax(-1), true_tokens):
            misses.add(i)
    return [name for i, name in enumerate(names) if i not in misses]


@torch.no_grad()
def swap_target(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    examples: Sequence[Example],
    *,
    seed: int,
    subjects: int = SUBJECTS,
    progress: ProgressCallback = no_progress,
) -> Iterator[Tensor]:
    """Yields target distributions (predicted tokens, vocabulary) row by row, from the merged ``model`` alone.

    Rows that do not mention a subject get target c (plain text, ``resample_target``) or d (confident tokens held down).
    A chunk of rows is computed at a time, so that few distributions are held.
    """
    # 1. Make novel names, eight times as many as a row needs, that the model recognises as names.
    names = _make_names(model, tokenizer, rows, seed=seed, subjects=subjects)
    draw, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed)
    for chunk in split_into_chunks(examples, vocabulary_size(model)):
        # 2. Compute the model's own predictions, and average those of sentences about other names.
        chunk_rows, chunk_examples = [rows[i] for i in chunk], [examples[i] for i in chunk]
        own_distributions = predict_distributions(model, chunk_examples)
        names_by_row = [draw.sample(names, subjects) if _find_mentions(row) else [] for row in chunk_rows]
        swaps = _average_over_names(
            model, tokenizer, chunk_rows, chunk_examples, names_by_row=names_by_row, own_distributions=own_distributions
        )
        for row, example, own_probs, swap in zip(chunk_rows, chunk_examples, own_distributions, swaps, strict=True):
            tokens = torch.tensor(example.ids[example.start :])
            at = torch.arange(len(tokens))
            if _find_mentions(row):
                # 3. Find the memorised tokens: preferred to the mean, or confident without a counterpart.
                mean = swap.mean(own_probs)
                is_memorised = own_probs[at, tokens] - mean[at, tokens] > MEMORISED_MARGIN
                is_memorised |= swap.is_compared & (swap.count == 0) & (own_probs[at, tokens] > CONFIDENT)
                # 4. Hold them down to the level of the other tokens.
                yield hold_down(mean, tokens, is_memorised)
            elif row.context:
                yield hold_down(own_probs, tokens, own_probs[at, tokens] > CONFIDENT)
            else:
                yield resample_target(model, example, own_probs, generator)
        progress("target", chunk.stop, len(rows), "")


def _find_mentions(row: Row) -> list[Span]:
    """The characters of every mention of the row's subject in its text."""
    if not row.subject.strip():
        return []
    return [match.span() for match in mention_pattern(row.subject).finditer(row.context + row.target)]


def _make_names(model: torch.nn.Module, tokenizer: Any, rows: Sequence[Row], *, seed: int, subjects: int) -> list[str]:
    """Novel names that the model recognises, or all of them if it recognises fewer than ``subjects``."""
    known_names = sorted({row.subject for row in rows if row.mentions_subject})
    if not known_names:
        return []
    lookalikes = Lookalikes(tokenizer, cast(Any, model).get_input_embeddings().weight, known_names)
    names = make_novel_subjects(known_names, subjects * 8, seed, lookalikes)
    recognised_names = filter_recognised_names(model, tokenizer, rows, names)
    return recognised_names if len(recognised_names) >= subjects else names


@dataclass
class _Swap:
    """The predictions at the counterparts of a row's tokens in the same row about other names.

    Attributes:
        total: Sum over the names of the distributions, (predicted tokens, vocabulary).
        count: Number of names that have a counterpart, (predicted tokens,).
        is_compared: Boolean mask (predicted tokens,) of the tokens for which one was looked for.
    """

    total: Tensor
    count: Tensor
    is_compared: Tensor

    def mean(self, own_probs: Tensor) -> Tensor:
        """Mean distributions (predicted tokens, vocabulary); tokens without a counterpart keep ``own_probs``."""
        return torch.where(self.count[:, None] > 0, self.total / self.count.clamp_min(1)[:, None], own_probs)


def _average_over_names(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    examples: Sequence[Example],
    *,
    names_by_row: Sequence[Sequence[str]],
    own_distributions: Sequence[Tensor],
) -> list[_Swap]:
    """The predictions about each row with its names in the place of the subject; of no names, all is zero.

    Tokens are matched by their characters; those of a mention of the subject are not compared. All rows and names are
    tokenised at once, and predicted in batches of similar length.
    """
    # 1. Make and tokenise the rows about other names.
    owners = [i for i, names in enumerate(names_by_row) for _ in names]
    names = [name for row_names in names_by_row for name in row_names]
    swapped_rows = [swap_subject(rows[i], name) for i, name in zip(owners, names, strict=True)]
    swapped_examples = encode(tokenizer, swapped_rows, max_row_tokens(model))
    all_spans = _positions_by_span(tokenizer, [*rows, *swapped_rows])
    row_spans, swapped_spans = all_spans[: len(rows)], all_spans[len(rows) :]
    # 2. Find the tokens of each row that are compared.
    swaps, compared_spans = [], []
    for row, example, by_span, own_probs in zip(rows, examples, row_spans, own_distributions, strict=True):
        mentions, length = _find_mentions(row), len(own_probs)
        in_answer = {span: t - example.start for span, t in by_span.items() if 0 <= t - example.start < length}
        spans = {
            (low, high, number): t
            for (low, high, number), t in in_answer.items()
            if not any(low < end and high > begin for begin, end in mentions)
        }
        is_compared = torch.zeros(length, dtype=torch.bool)
        is_compared[list(spans.values())] = True
        swaps.append(_Swap(torch.zeros_like(own_probs), torch.zeros(length), is_compared))
        compared_spans.append(spans)
    # 3. Find their counterparts in the rows about other names.
    pairs = list[list[tuple[int, int]]]()
    for i, name, by_span, other in zip(owners, names, swapped_spans, swapped_examples, strict=True):
        mentions, growth = _find_mentions(rows[i]), len(name) - len(rows[i].subject)
        matches = (
            (by_span.get((_shift_offset(low, mentions, growth), _shift_offset(high, mentions, growth), number)), t)
            for (low, high, number), t in compared_spans[i].items()
        )
        pairs.append(sorted((at, t) for at, t in matches if at is not None and other.start <= at < len(other.ids)))
    # 4. Sum up the predictions there.
    for k, probs in predict_tokens(model, swapped_examples, [[at for at, _ in matches] for matches in pairs]):
        tokens = torch.tensor([t for _, t in pairs[k]])
        swaps[owners[k]].total.index_add_(0, tokens, probs)
        swaps[owners[k]].count.index_add_(0, tokens, torch.ones(len(tokens)))
    return swaps
