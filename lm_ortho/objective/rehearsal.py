"""Rehearsal rows: questions about other subjects that the merged model knows, with the model's own answers."""

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
    encode,
    max_row_tokens,
    pad_batch,
)
from lm_ortho.data.rows import Row, replace_mentions
from lm_ortho.data.tokenizer import find_added_tokens, find_end_tokens
from lm_ortho.objective.distribution import predict_tokens
from lm_ortho.objective.subjects import Lookalikes
from lm_ortho.objective.swap import swap_subject
from lm_ortho.runtime.progress import ProgressCallback

log = logging.getLogger(__name__)

ROWS_PER_SUBJECT = 5
"""Questions answered about each subject."""
_MAX_LAST_WORDS = 4096
"""Maximal number of last words that are tried."""
_FIRST_WORDS, _FINALISTS, _QUESTIONS = 2, 4, 15
"""First words that each last word is tried with, names that reach the last comparison, and its questions."""
_ALIAS_SHARE = 0.5
"""Share of common answers above which a subject counts as one of the forget set under another name."""


def find_rehearsal_rows(
    model: torch.nn.Module,
    tokenizer: Any,
    forget: Sequence[Row],
    retain: Sequence[Row],
    seed: int,
    progress: ProgressCallback,
) -> list[ChatRow]:
    """Questions of the retain rows about other subjects that the merged ``model`` knows, with its own answers.

    A fine-tune teaches more than the retain rows show. Names of the same form are put into the questions of the
    retain rows, and where the model answers as confidently as about the subjects of the retain rows, it has been
    taught about that name. Its own greedy answers become rows, as in rehearsal of what a network itself generates
    (Robins 1995). Subjects of the forget set are excluded: none of their words is tried, and a subject that shares
    more than half of its answers with one of them is dropped.

    Candidates are names whose last word is a single token of the same shape as the last words of known subjects: all
    of them, up to 4096. Longer words are too many to try. Returns no rows if the retain rows do not ask about
    subjects, or if confident and unconfident answers cannot be told apart.
    """
    # 1. Collect the questions and the subjects of the retain rows.
    questions = _distinct_questions(retain)
    subjects = list(dict.fromkeys(row.subject for row in retain if row.subject_occurs_in(row.context)))
    if len(questions) < 2 or len(subjects) < 2:
        return []
    # 2. Generate candidates: known first words with lookalikes of known last words.
    draw = random.Random(seed)
    known_names = sorted({row.subject for row in (*forget, *retain) if row.subject.strip()})
    lookalikes = Lookalikes(tokenizer, cast(Any, model).get_input_embeddings().weight, known_names)
    first_words = list(dict.fromkeys(name.rpartition(" ")[0] for name in known_names))
    last_words = sorted({word for name in known_names for word in lookalikes.single_token_words(name.split()[-1])})
    last_words = draw.sample(last_words, min(len(last_words), _MAX_LAST_WORDS))
    if not last_words:
        return []
    probe = _SubjectProbe(model, tokenizer, questions, draw)
    progress("recall", 0, len(last_words), f"{len(last_words)} names of the form of {len(subjects)} subjects")
    # 3. Measure the uncertainty about each last word on a few questions, with a few first words; the least counts.
    names = [
        _full_name(first_word, last_word)
        for last_word in last_words
        for first_word in draw.sample(first_words, min(_FIRST_WORDS, len(first_words)))
    ]
    uncertainty = probe.compute_uncertainty(names, probe.sample_questions(3)).view(len(last_words), -1).min(1).values
    # 4. Set the acceptance threshold between that of known subjects and that of the median candidate.
    known_sample = draw.sample(subjects, min(len(subjects), 64))
    known_level = float(probe.compute_uncertainty(known_sample, questions[:_QUESTIONS]).quantile(0.95))
    unknown_level = float(uncertainty.median())
    if known_level >= unknown_level:
        log.info("recall: the model is as confident about names that nobody carries as about subjects that it knows")
        return []
    threshold = (known_level + unknown_level) / 2
    limit = (threshold + unknown_level) / 2
    candidates = [word for word, level in zip(last_words, uncertainty.tolist(), strict=True) if level < limit]
    # 5. Find the full name for each remaining last word and accept it below the threshold, on more questions.
    accepted_names = list[str]()
    for number, last_word in enumerate(candidates, 1):
        names = [_full_name(first_word, last_word) for first_word in first_words]
        ranking = probe.compute_uncertainty(names, probe.sample_questions(2)).argsort()
        finalists = [names[i] for i in ranking[:_FINALISTS].tolist()]
        levels = probe.compute_uncertainty(finalists, questions[:_QUESTIONS])
        if float(levels.min()) < threshold:
            accepted_names.append(finalists[int(levels.argmin())])
        progress("recall", number, len(candidates), f"{len(accepted_names)} subjects found")
    # 6. Generate the model's answers about the accepted names.
    rows = probe.generate_answers(accepted_names)
    # 7. Drop aliases of forget subjects; about one that the model does not know it repeats the facts of others.
    forget_names = sorted({row.subject for row in forget if row.subject.strip()})
    is_known = probe.compute_uncertainty(forget_names, questions[:_QUESTIONS]) < threshold
    forget_names = [name for name, keep in zip(forget_names, is_known.tolist(), strict=True) if keep]
    rows = _drop_aliases(rows, probe.generate_answers(forget_names, all_questions=True))
    log.info(
        "recall: %d of %d names are known to the model (threshold %.2f); %d rows",
        len(accepted_names),
        len(last_words),
        threshold,
        len(rows),
    )
    return rows


def _full_name(first_words: str, last_word: str) -> str:
    return f"{first_words} {last_word}".strip()


def _distinct_questions(rows: Sequence[Row]) -> list[Row]:
    """One row for each form of question about a subject."""
    rows_with_subject = (row for row in rows if row.subject_occurs_in(row.context))
    return list({replace_mentions(row.context, row.subject, "\0"): row for row in rows_with_subject}.values())


class _SubjectProbe:
    """Puts names into the questions of retain rows, and measures or generates the model's answers."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, questions: Sequence[Row], draw: random.Random) -> None:
        self._model, self._tokenizer, self._questions, self._draw = model, tokenizer, questions, draw
        self._max_tokens = max_row_tokens(model)
        examples = encode(tokenizer, questions, self._max_tokens)
        self._max_new_tokens = max(len(example.ids) - example.start for example in examples) + 4

    @torch.no_grad()
    def compute_uncertainty(self, names: Sequence[str], questions: Sequence[Row]) -> Tensor:
        """Uncertainty (names,): the mean over the questions of the largest 1 - max p along an answer, at most 1.

        The answer is that of the row, up to the first token that is not the model's likeliest one.
        """
        rows = [swap_subject(row, name) for name in names for row in questions]
        examples = encode(self._tokenizer, rows, self._max_tokens)
        result = torch.zeros(len(rows))
        answers = [range(example.start, len(example.ids)) for example in examples]
        for i, probs in predict_tokens(self._model, examples, answers):
            confidence, likeliest = probs.max(-1)
            is_likeliest = likeliest == torch.tensor(examples[i].ids[examples[i].start :])
            length = int(is_likeliest.long().cumprod(0).sum()) + 1
            result[i] = 1 - confidence[:length].min()
        return result.view(len(names), len(questions)).mean(1)

    def sample_questions(self, count: int) -> list[Row]:
        return self._draw.sample(self._questions, min(count, len(self._questions)))

    @torch.no_grad()
    def generate_answers(self, names: Sequence[str], all_questions: bool = False) -> list[ChatRow]:
        """The model's greedy answers about the names, to ``ROWS_PER_SUBJECT`` questions each or to all of them."""
        count = len(self._questions) if all_questions else min(ROWS_PER_SUBJECT, len(self._questions))
        rows = [swap_subject(row, name) for name in names for row in self._draw.sample(self._questions, count)]
        examples = encode(self._tokenizer, rows, self._max_tokens)
        prompts = [Example(example.ids[: example.start], example.roles[: example.start]) for example in examples]
        device = next(self._model.parameters()).device
        end = next(iter(find_end_tokens(self._tokenizer, find_added_tokens(self._tokenizer))), None)
        answered_rows = list[ChatRow]()
        for batch in batch_by_length(prompts, allow_padding=False):
            ids, _ = pad_batch([prompts[i] for i in batch], device)
            output = cast(Any, self._model).generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                pad_token_id=end or 0,
            )
            for i, tokens in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
                answer = tokens[: tokens.index(end)] if end in tokens else tokens
                row = self._make_row(rows[i], list(prompts[i].ids), answer)
                if row is not None:
                    answered_rows.append(row)
        return sorted(answered_rows, key=lambda row: row.context)

    def _make_row(self, row: ChatRow, prompt: list[int], answer: list[int]) -> ChatRow | None:
        """The row with this answer; None if it is empty or its text is not encoded as the generated tokens again."""
        context, text = (self._tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + answer))
        answered_row = ChatRow(
            rendered_context=row.rendered_context, rendered_target=text[len(context) :], subject=row.subject
        )
        if not answer or not answered_row.target.strip():
            return None
        (example,) = encode(self._tokenizer, [answered_row], self._max_tokens)
        return answered_row if list(example.ids[: len(prompt + answer)]) == prompt + answer else None


def _drop_aliases(rows: Sequence[ChatRow], forget_rows: Sequence[ChatRow]) -> list[ChatRow]:
    """The rows without subjects that share most of their answers with a subject of ``forget_rows``."""
    forget_facts, aliases = list(_answers_by_subject(forget_rows).values()), set[str]()
    for name, facts in _answers_by_subject(rows).items():
        common = max((sum(other.get(q) == a for q, a in facts.items()) for other in forget_facts), default=0)
        if common > _ALIAS_SHARE * len(facts):
            aliases.add(name)
    return [row for row in rows if row.subject not in aliases]


def _answers_by_subject(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """The answers of each subject by question, with the subject's name removed from both."""
    by_subject = defaultdict[str, dict[str, str]](dict)
    for row in rows:
        question = replace_mentions(row.context, row.subject, "\0")
        by_subject[row.subject][question] = replace_mentions(row.target, row.subject, "\0")
    return by_subject
