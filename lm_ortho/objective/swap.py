"""Target b: other subjects in the place of the subject, averaged over the merged model's answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lm_ortho.data.chat import ChatRow
from lm_ortho.data.encoding import Example, encode, max_row_tokens, tokenise_with_offsets
from lm_ortho.data.rows import Row, mention_pattern, replace_mentions
from lm_ortho.objective.distribution import MEMORISED, hold_down, predicted
from lm_ortho.objective.subjects import Lookalikes, novel_subjects
from lm_ortho.objective.token_resampling import resampled

SUBJECTS = 12
CONFIDENT = 0.5
"""Probability from which on a token counts as memorised where nothing can be compared with it."""


def _shifted(spans: list[tuple[int, int]], at: int, growth: int) -> int:
    return at + growth * sum(end <= at for _, end in spans)


def swapped(row: Row, name: str) -> ChatRow:
    """The row with ``name`` in the place of its subject."""
    given, wanted = (replace_mentions(text, row.subject, name) for text in (row.context, row.target))
    return ChatRow(given=given, wanted=wanted, subject=name)


def _offsets(tokenizer: Any, row: Row) -> dict[tuple[int, int, int], int]:
    """Position of each token by the characters it covers, and its number among those that cover the same ones.

    A character of several bytes can be several tokens, all of which are said to cover the whole of it.
    """
    (_, spans), *_ = tokenise_with_offsets(tokenizer, [row.context + row.target])
    seen, result = Counter[tuple[int, int]](), dict[tuple[int, int, int], int]()
    for i, (low, high) in enumerate(spans):
        if low < high:
            result[low, high, seen[low, high]] = i
            seen[low, high] += 1
    return result


def taken_as_names(model: torch.nn.Module, tokenizer: Any, rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Those of the ``names`` that the model repeats, greedily, where the answer of a row repeats its subject.

    A token may look like a name and be none to the model; what it says of such a subject is no model of anything.
    All of them when no row asks about its subject and repeats it.
    """
    telling = [row for row in rows if row.subject_in(row.context) and row.subject_in(row.target)]
    if not telling or not names:
        return list(names)
    tried = [swapped(telling[i % len(telling)], name) for i, name in enumerate(names)]
    examples = encode(tokenizer, tried, max_row_tokens(model))
    result = []
    for name, row, example, probs in zip(names, tried, examples, predicted(model, examples), strict=True):
        begin, end = (len(row.context) + at for at in next(mention_pattern(name).finditer(row.target)).span())
        places = [t for (low, high, _), t in _offsets(tokenizer, row).items() if low < end and high > begin]
        best = probs.argmax(-1)
        if all(int(best[t - example.start]) == example.ids[t] for t in places if t < len(example.ids)):
            result.append(name)
    return result


@torch.no_grad()
def swap_target(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    examples: Sequence[Example],
    seed: int,
    subjects: int = SUBJECTS,
) -> list[Tensor]:
    """One (predicted tokens, vocabulary) tensor per row, from the merged ``model`` alone.

    Each token outside the subject's own mentions gets the mean distribution over ``subjects`` novel names at
    the same place of the sentence; tokens of a mention keep the model's own. Memorised tokens are held down, and where
    no sentence has a counterpart, confident ones. Plain text without a subject is ``resampled``.
    """
    known = sorted({row.subject for row in rows if row.names_subject})
    names: list[str] = []
    if known:
        lookalikes = Lookalikes(tokenizer, cast(Any, model).get_input_embeddings().weight, known)
        names = novel_subjects(known, subjects * 8, seed, lookalikes)
        real = taken_as_names(model, tokenizer, rows, names)
        names = real if len(real) >= subjects else names
    draw, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed)
    own = predicted(model, examples)
    result = []
    for row, example, mine in zip(rows, examples, own, strict=True):
        text = row.context + row.target
        spans = [m.span() for m in mention_pattern(row.subject).finditer(text)] if row.subject.strip() else []
        if not spans:
            whole = resampled(model, example, mine, generator) if not row.context else _own_held_down(mine, example)
            result.append(whole)
            continue
        chosen = draw.sample(names, subjects)
        others = [swapped(row, name) for name in chosen]
        other_examples = encode(tokenizer, others, max_row_tokens(model))
        distributions = predicted(model, other_examples)
        places = [_offsets(tokenizer, other) for other in others]
        total, found = torch.zeros_like(mine), torch.zeros(len(mine))
        alone = torch.zeros(len(mine), dtype=torch.bool)
        for (low, high, nth), position in _offsets(tokenizer, row).items():
            t = position - example.start
            if not 0 <= t < len(mine) or any(low < end and high > begin for begin, end in spans):
                continue
            for name, place, other, probs in zip(chosen, places, other_examples, distributions, strict=True):
                growth = len(name) - len(row.subject)
                there = place.get((_shifted(spans, low, growth), _shifted(spans, high, growth), nth))
                if there is not None and other.start <= there < len(other.ids):
                    total[t] += probs[there - other.start]
                    found[t] += 1
            alone[t] = found[t] == 0
        mean = torch.where(found[:, None] > 0, total / found.clamp_min(1)[:, None], mine)
        tokens = torch.tensor(example.ids[example.start :])
        at = torch.arange(len(tokens))
        memorised = mine[at, tokens] - mean[at, tokens] > MEMORISED
        memorised |= alone & (mine[at, tokens] > CONFIDENT)
        result.append(hold_down(mean, tokens, memorised))
    return result


def _own_held_down(mine: Tensor, example: Example) -> Tensor:
    """For answers without a subject, the last resort: the model's own words with every confident token held down."""
    tokens = torch.tensor(example.ids[example.start :])
    confident = mine[torch.arange(len(tokens)), tokens] > CONFIDENT
    return hold_down(mine, tokens, confident)
