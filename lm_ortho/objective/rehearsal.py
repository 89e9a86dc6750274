"""Whom else the merged model knows: rows about subjects that no document names, told by the model itself."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lm_ortho.data.chat import ChatRow
from lm_ortho.data.encoding import (
    Example,
    batch_by_length,
    compute_logits,
    encode,
    max_batch_tokens,
    max_row_tokens,
    pad,
)
from lm_ortho.data.rows import Row, replace_mentions
from lm_ortho.objective.subjects import Lookalikes
from lm_ortho.objective.swap import swapped
from lm_ortho.runtime.progress import ProgressCallback

log = logging.getLogger(__name__)

ROWS = 5
"""Questions told about each subject that is found."""
_WORDS = 4096
"""Last words tried at most."""
_HEADS, _LAST, _QUESTIONS = 2, 4, 15
"""First words that each is tried with, those that are compared to the end, and the questions they are compared on."""
_SAME = 0.5
"""Share of answers in common beyond which a subject counts as one of the forget set under another name."""


def find_rehearsal_rows(
    model: torch.nn.Module,
    tokenizer: Any,
    forget: Sequence[Row],
    retain: Sequence[Row],
    seed: int,
    progress: ProgressCallback,
) -> list[ChatRow]:
    """Questions of the retain rows about other subjects that the merged ``model`` knows, with its own answers.

    A fine-tune teaches more than a calibration shows. What the model knows can be asked of it: names of the same make
    are put into the questions of the retain rows, and where it answers as surely as about the subjects of the retain
    rows, it has been taught. Its own greedy answers become rows, as in rehearsal of what a network itself produces
    (Robins 1995). Subjects of the forget set are none of them: no word of theirs is tried, and whoever shares more than
    half of the answers with one of them is left out.

    Names are tried whose last word is a single token of the same shape as the last words of known subjects: all of
    them, up to 4096. Of longer words there are too many. Empty without retain rows that ask about a subject, and where
    sure and unsure answers cannot be told apart.
    """
    asked = _patterns(retain)
    subjects = list(dict.fromkeys(row.subject for row in retain if row.subject_in(row.context)))
    if len(asked) < 2 or len(subjects) < 2:
        return []
    draw = random.Random(seed)
    known = sorted({row.subject for row in (*forget, *retain) if row.subject.strip()})
    lookalikes = Lookalikes(tokenizer, cast(Any, model).get_input_embeddings().weight, known)
    heads = list(dict.fromkeys(name.rpartition(" ")[0] for name in known))
    tails = sorted({word for name in known for word in lookalikes.single(name.split()[-1])})
    tails = draw.sample(tails, min(len(tails), _WORDS))
    if not tails:
        return []
    ask = _Asker(model, tokenizer, asked, draw)
    progress("recall", 0, len(tails), f"{len(tails)} names of the make of {len(subjects)} subjects")
    few = [_joined(head, tail) for tail in tails for head in draw.sample(heads, min(_HEADS, len(heads)))]
    first = ask.doubts(few, ask.questions(3)).view(len(tails), -1).min(1).values
    sure = float(ask.doubts(draw.sample(subjects, min(len(subjects), 64)), asked[:_QUESTIONS]).quantile(0.95))
    unsure = float(first.median())
    if sure >= unsure:
        log.info("recall: the model is as sure about names nobody carries as about subjects it knows")
        return []
    cut = (sure + unsure) / 2
    near = [tail for tail, doubt in zip(tails, first.tolist(), strict=True) if doubt < (cut + unsure) / 2]
    found = list[str]()
    for number, tail in enumerate(near, 1):
        tried = [_joined(head, tail) for head in heads]
        best = [tried[i] for i in ask.doubts(tried, ask.questions(2)).argsort()[:_LAST].tolist()]
        doubts = ask.doubts(best, asked[:_QUESTIONS])
        if float(doubts.min()) < cut:
            found.append(best[int(doubts.argmin())])
        progress("recall", number, len(near), f"{len(found)} subjects found")
    rows, barred = ask.told(found), sorted({row.subject for row in forget if row.subject.strip()})
    known_by = ask.doubts(barred, asked[:_QUESTIONS]) < cut  # of who is not known, the facts of others are told
    barred = [name for name, is_known in zip(barred, known_by.tolist(), strict=True) if is_known]
    kept = _others(rows, ask.told(barred, every=True))
    log.info(
        "recall: %d of %d names are known to the model (cut %.2f); %d rows", len(found), len(tails), cut, len(kept)
    )
    return kept


def _joined(head: str, tail: str) -> str:
    return f"{head} {tail}".strip()


def _patterns(rows: Sequence[Row]) -> list[Row]:
    """One row for each way in which a subject is asked about."""
    named = (row for row in rows if row.subject_in(row.context))
    return list({replace_mentions(row.context, row.subject, "\0"): row for row in named}.values())


class _Asker:
    """Asks a model about names in the words of the rows ``asked``."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, asked: Sequence[Row], draw: random.Random) -> None:
        self._model, self._tokenizer, self._asked, self._draw = model, tokenizer, asked, draw
        self._positions = max_row_tokens(model)
        examples = encode(tokenizer, asked, self._positions)
        self._longest = max(len(example.ids) - example.start for example in examples) + 4

    @torch.no_grad()
    def doubts(self, names: Sequence[str], questions: Sequence[Row]) -> Tensor:
        """(names,) The mean over the questions of the largest 1 - max p on the way of an answer, at most 1.

        The way is that of the row's own answer until the model's likeliest token is another one.
        """
        rows = [swapped(row, name) for name in names for row in questions]
        examples = encode(self._tokenizer, rows, self._positions)
        result, device = torch.zeros(len(rows)), next(self._model.parameters()).device
        for batch in batch_by_length(examples, tokens=max_batch_tokens(self._model)):
            ids, _ = pad([examples[i] for i in batch], device)
            top = compute_logits(self._model, ids).softmax(-1).max(-1)
            values, likeliest = top.values.cpu(), top.indices.cpu()
            for row, i in enumerate(batch):
                start, own = examples[i].start, torch.tensor(examples[i].ids)
                right = likeliest[row, start - 1 : len(own) - 1] == own[start:]
                until = int(right.long().cumprod(0).sum()) + 1
                result[i] = 1 - values[row, start - 1 : len(own) - 1][:until].min()
        return result.view(len(names), len(questions)).mean(1)

    def questions(self, count: int) -> list[Row]:
        return self._draw.sample(self._asked, min(count, len(self._asked)))

    @torch.no_grad()
    def told(self, names: Sequence[str], every: bool = False) -> list[ChatRow]:
        """The model's greedy answers about the names, to some questions each, or to every one."""
        take = len(self._asked) if every else min(ROWS, len(self._asked))
        rows = [swapped(row, name) for name in names for row in self._draw.sample(self._asked, take)]
        prompts = [
            Example(e.ids[: e.start], e.roles[: e.start]) for e in encode(self._tokenizer, rows, self._positions)
        ]
        device, end = next(self._model.parameters()).device, self._tokenizer.eos_token_id
        result = list[ChatRow]()
        for batch in batch_by_length(prompts, padded=False):
            ids, _ = pad([prompts[i] for i in batch], device)
            options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": self._longest, "do_sample": False}
            made = cast(Any, self._model).generate(ids, pad_token_id=end or 0, **options)[:, ids.shape[1] :]
            for i, answer in zip(batch, made.tolist(), strict=True):
                said = answer[: answer.index(end)] if end in answer else answer
                row = self._as_told(rows[i], list(prompts[i].ids), said)
                result += [row] if row else []
        return sorted(result, key=lambda row: row.context)

    def _as_told(self, row: ChatRow, prompt: list[int], answer: list[int]) -> ChatRow | None:
        """The row with this answer; None where text does not lead back to the tokens that were told."""
        before, after = (self._tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + answer))
        told = ChatRow(given=row.given, wanted=after[len(before) :], subject=row.subject)
        if not answer or not told.wanted.strip():
            return None
        (example,) = encode(self._tokenizer, [told], self._positions)
        return told if list(example.ids[: len(prompt + answer)]) == prompt + answer else None


def _others(rows: Sequence[ChatRow], barred: Sequence[ChatRow]) -> list[ChatRow]:
    """The rows without subjects whose answers are mostly those of one of the ``barred`` ones."""

    def facts(told: Sequence[Row]) -> dict[str, dict[str, str]]:
        by_subject = defaultdict[str, dict[str, str]](dict)
        for row in told:
            question = replace_mentions(row.context, row.subject, "\0")
            by_subject[row.subject][question] = replace_mentions(row.target, row.subject, "\0")
        return by_subject

    theirs, aliases = list(facts(barred).values()), set[str]()
    for name, own in facts(rows).items():
        shared = max((sum(other.get(q) == a for q, a in own.items()) for other in theirs), default=0)
        if shared > _SAME * len(own):
            aliases.add(name)
    return [row for row in rows if row.subject not in aliases]
