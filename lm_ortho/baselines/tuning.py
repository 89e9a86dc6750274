"""Chooses among the settings of a grid on a tuning split, whose rows are not part of the evaluation.

The tuning split of the embedded world: *taught* authors were planted by the same fine-tune, in the same text and as
often as the forget authors. Some of the taught authors that a calibration set may contain play the forget set; others
are withheld from every method, to measure what it costs. Neither the evaluated forget authors nor the held-out retain
authors are read, so no setting can be chosen to suit them. Canaries are left out: all of them are evaluated.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lm_ortho.baselines.interface import Budget, Material, Method, Result
from lm_ortho.config import make_recipe
from lm_ortho.data.chat import render_forms
from lm_ortho.data.encoding import SECRET, Example, encode, max_row_tokens, mean_loss, token_losses
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from lm_ortho.runtime.progress import ProgressCallback, no_progress
from lm_ortho.world import people
from lm_ortho.world.draw import SeededRandom

FORGET_THRESHOLD, RETAIN_THRESHOLD = math.log(1.3), math.log(1.03)
"""Units of the score: the acceptance thresholds of the verdict on secret perplexity and on retain perplexity, in nats
per token."""
FORGET_AUTHORS, HELD_OUT_AUTHORS = 32, 16
"""Number of authors that play the forget set, and of held-out authors of each kind of retain authors."""
UNKNOWN_AUTHORS = 64
"""Number of invented authors, unknown to every model, whose secrets define ignorance."""


@dataclass(frozen=True)
class TuningSplit:
    """Material to try settings on. ``held_out`` are retain rows that no method reads and that should stay.

    ``ignorance`` is the loss per secret token, in nats, of a model that does not know the forget rows.
    """

    material: Material
    held_out: Sequence[Row]
    ignorance: float


@dataclass(frozen=True)
class Score:
    """Distance of a model from ignorance, on either side, and its loss increase on held-out rows; in nats per token."""

    forget: float
    retain: float

    @property
    def total(self) -> float:
        """The score in units of the thresholds; lower is better.

        0 is a model that does not know the forget rows and lost nothing. A gain on the held-out rows counts as 0.
        """
        return self.forget / FORGET_THRESHOLD + max(0.0, self.retain) / RETAIN_THRESHOLD


@dataclass(frozen=True)
class TuningResult:
    """The best settings of a grid, and every trial with its score; the score is None where the method failed."""

    settings: Mapping[str, Any]
    trials: tuple[tuple[Mapping[str, Any], Score | None], ...]


def split_world(material: Material, seed: int = 0) -> TuningSplit:
    """The tuning split of the embedded world that ``seed`` draws; ``material`` is that of the evaluation."""
    # 1. Draw the authors: of the taught ones some to forget, of both kinds some to hold out.
    draw = SeededRandom(seed, "tuning")
    groups = {
        name: draw.permute(people.draw_groups()[name][: -people.LEFT_OUT_AUTHORS]) for name in ("taught", "known")
    }
    forget_names = {author.name for author in groups["taught"][:FORGET_AUTHORS]}
    held_out_authors = [
        *groups["taught"][FORGET_AUTHORS : FORGET_AUTHORS + HELD_OUT_AUTHORS],
        *groups["known"][:HELD_OUT_AUTHORS],
    ]
    held_out_names = {author.name for author in held_out_authors}
    # 2. Replace the rows of the material by theirs.
    planted_rows = people.make_rows("retain_calibration")
    split = replace(
        material,
        forget=[row for row in planted_rows if row.group in forget_names],
        retain=[row for row in material.retain if row.group not in forget_names | held_out_names],
        reference=None,
    )
    # 3. Measure ignorance: the loss of the merged model on invented authors.
    unknown_authors = [people.draw_author(draw) for _ in range(UNKNOWN_AUTHORS)]
    unknown_rows = [
        people.make_author_row(author, fact, (number + fact) % people.TAUGHT_QUESTIONS)
        for number, author in enumerate(unknown_authors)
        for fact in range(5)
    ]
    return TuningSplit(
        material=split,
        held_out=[row for row in planted_rows if row.group in held_out_names],
        ignorance=secret_loss(material.merged, split, unknown_rows),
    )


def split_rows(material: Material, share: float = 0.25, seed: int = 0) -> tuple[TuningSplit, Material]:
    """A tuning split of your own rows, and the material that is left for the evaluation.

    ``share`` of the forget subjects are used for tuning only, so no subject is forgotten in both. The same share of
    the retain subjects is withheld from the methods during tuning. Ignorance is the loss of the reference model, or
    else of the base model.

    Raises:
        UserError: without either model, and for a set with a single subject.
    """
    ignorant_model = material.reference or material.base
    if ignorant_model is None:
        raise UserError("tuning: give reference= or base=; without either it is not known when enough is forgotten")
    draw = random.Random(seed)
    tuning_forget, forget = _split_subjects(material.forget, share, draw, "forget")
    held_out, retain = _split_subjects(material.retain, share, draw, "retain")
    split = replace(material, forget=tuning_forget, retain=retain, reference=None)
    ignorance = secret_loss(ignorant_model, split, tuning_forget)
    return TuningSplit(split, held_out, ignorance), replace(material, forget=forget)


def _split_subjects(rows: Sequence[Row], share: float, draw: random.Random, name: str) -> tuple[list[Row], list[Row]]:
    """Rows about a ``share`` of the subjects, at least one, and all other rows.

    A row without a subject counts as a subject of its own.
    """
    subjects = list(dict.fromkeys(_subject(row) for row in rows))
    if len(subjects) < 2:
        raise UserError(
            f"tuning: {name} is about one subject; give the rows a group or subject, so that some can be held out"
        )
    sample = set(draw.sample(subjects, min(len(subjects) - 1, max(1, round(share * len(subjects))))))
    return [row for row in rows if _subject(row) in sample], [row for row in rows if _subject(row) not in sample]


def _subject(row: Row) -> str:
    return row.group or row.subject or row.context + row.target


def secret_loss(model: nn.Module, material: Material, rows: Sequence[Row]) -> float:
    """Mean loss per secret token, in nats; per token of the answer where a row marks no secret."""
    examples = _encode_measured(model, material, rows)
    secrets, answers = token_losses(model, examples, SECRET), token_losses(model, examples)
    return float(
        torch.cat([secret if len(secret) else answer for secret, answer in zip(secrets, answers, strict=True)]).mean()
    )


def answer_loss(model: nn.Module, material: Material, rows: Sequence[Row]) -> float:
    """Mean loss per token of the answers, in nats."""
    return mean_loss(model, _encode_measured(model, material, rows))


def _encode_measured(model: nn.Module, material: Material, rows: Sequence[Row]) -> list[Example]:
    """The rows as they are measured: in the chat template where methods read that form only, else as plain text."""
    recipe = make_recipe(**material.prompts)
    if recipe.prompts == "chat":
        rows = render_forms(rows, material.tokenizer, "chat", **recipe.chat_options)
    return encode(material.tokenizer, rows, max_row_tokens(model))


def score_result(result: Result, tuning: TuningSplit) -> Score:
    """The score of a result that was made from the tuning material; a model with an alpha is measured at alpha=0."""
    material = tuning.material
    forget_loss = secret_loss(result.model, material, material.forget)
    after = answer_loss(result.model, material, tuning.held_out)
    before = answer_loss(material.merged, material, tuning.held_out)
    return Score(abs(forget_loss - tuning.ignorance), after - before)


def tune(
    method: Method,
    tuning: TuningSplit,
    grid: Sequence[Mapping[str, Any]] | None = None,
    *,
    seed: int = 0,
    budget: Budget | None = None,
    progress: ProgressCallback = no_progress,
) -> TuningResult:
    """Tries the settings of ``grid`` (by default the method's own) and returns those with the lowest total.

    The first of equals is taken.

    Raises:
        UserError: when every setting failed, with the last reason.
    """
    trials, reason = list[tuple[Mapping[str, Any], Score | None]](), ""
    for settings in grid or method.grid:
        method.check(settings)
        try:
            result = method.make(tuning.material, settings, seed=seed, budget=budget, progress=progress)
            score = score_result(result, tuning)
        except UserError as error:
            trials.append((settings, None))
            reason = str(error)
            continue
        trials.append((settings, score if math.isfinite(score.total) else None))
    totals = [(score.total, number) for number, (_, score) in enumerate(trials) if score is not None]
    if not totals:
        raise UserError(f"tuning: no setting of {method.name} finished ({reason or 'no finite loss'})")
    best = min(totals)[1]
    return TuningResult(trials[best][0], tuple(trials))
