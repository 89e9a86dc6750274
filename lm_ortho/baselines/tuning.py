"""Choosing among the settings of a grid on rows that the evaluation never asks about.

The embedded world is split so: *taught* authors were planted by the same fine-tune, in the same text and as often as
the forget authors. Some of those that calibration may show play the forget set, others are kept from every method to
see what it costs. Neither the evaluated forget authors nor the left-out retain authors are looked at, so nothing can be
chosen to suit them. Canaries are left out of it: all of them are evaluated.
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
from lm_ortho.data.encoding import SECRET, encode, max_row_tokens, mean_loss, token_losses
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from lm_ortho.runtime.progress import ProgressCallback, no_progress
from lm_ortho.world import people
from lm_ortho.world.draw import Draw

FORGET_BAR, RETAIN_BAR = math.log(1.3), math.log(1.03)
"""What counts as one: the bars of the verdict on secret perplexity and on retain perplexity, in nats per token."""
FORGOTTEN, KEPT_FROM = 32, 16
"""Authors that play the forget set, and of each kind of retain authors those that no method is shown."""
STRANGERS = 64


@dataclass(frozen=True)
class Tuning:
    """Material to try settings on. ``kept`` are rows that no method is shown and that should stay.

    ``ignorance`` is the loss per secret token, in nats, of a model that does not know the forget rows.
    """

    material: Material
    kept: Sequence[Row]
    ignorance: float


@dataclass(frozen=True)
class Score:
    """How far a model is from ignorance, on either side, and what it lost of ``kept``; both in nats per token."""

    forget: float
    retain: float

    @property
    def total(self) -> float:
        """In bars; 0 is a model that does not know the forget rows and lost nothing. A gain on ``kept`` counts as 0."""
        return self.forget / FORGET_BAR + max(0.0, self.retain) / RETAIN_BAR


@dataclass(frozen=True)
class Tuned:
    """The best settings of a grid, and what each gave: None where the method failed."""

    settings: Mapping[str, Any]
    tried: tuple[tuple[Mapping[str, Any], Score | None], ...]


def split_of_world(material: Material, seed: int = 0) -> Tuning:
    """The tuning split of the embedded world that ``seed`` draws; ``material`` is that of the evaluation."""
    draw = Draw(seed, "tuning")
    groups = {name: draw.shuffled(people.people()[name][: -people.LEFT_OUT]) for name in ("taught", "known")}
    forget = {author.name for author in groups["taught"][:FORGOTTEN]}
    unseen = [*groups["taught"][FORGOTTEN : FORGOTTEN + KEPT_FROM], *groups["known"][:KEPT_FROM]]
    kept = {author.name for author in unseen}
    planted = people.rows("retain_calibration")
    split = replace(
        material,
        forget=[row for row in planted if row.group in forget],
        retain=[row for row in material.retain if row.group not in forget | kept],
        reference=None,
    )
    strangers = [people.fresh_author(draw) for _ in range(STRANGERS)]
    asked = [people.author_row(a, j, (i + j) % people.TAUGHT) for i, a in enumerate(strangers) for j in range(5)]
    return Tuning(split, [row for row in planted if row.group in kept], secret_loss(material.merged, split, asked))


def split_of_rows(material: Material, share: float = 0.25, seed: int = 0) -> tuple[Tuning, Material]:
    """A tuning split of one's own rows, and the material that is left to be evaluated: no subject is forgotten in both.

    ``share`` of the forget subjects are tried on, and as large a share of the retain subjects is kept from the methods
    meanwhile. Ignorance is that of the reference, or else of the model before fine-tuning.

    Raises:
        UserError: without either model, and for a set of one subject.
    """
    ignorant = material.reference or material.base
    if ignorant is None:
        raise UserError("tuning: give reference= or base=; without either nobody knows when enough is forgotten")
    draw = random.Random(seed)
    (tried, forget), (kept, retain) = (
        _parted(rows, share, draw, name) for name, rows in (("forget", material.forget), ("retain", material.retain))
    )
    split = replace(material, forget=tried, retain=retain, reference=None)
    return Tuning(split, kept, secret_loss(ignorant, split, tried)), replace(material, forget=forget)


def _parted(rows: Sequence[Row], share: float, draw: random.Random, name: str) -> tuple[list[Row], list[Row]]:
    """Rows about ``share`` of the subjects, at least one, and all others; rows without a subject stand alone."""
    subjects = list(dict.fromkeys(_subject(row) for row in rows))
    if len(subjects) < 2:
        raise UserError(
            f"tuning: {name} is about one subject; with group or subject of each row some could be set aside"
        )
    chosen = set(draw.sample(subjects, min(len(subjects) - 1, max(1, round(share * len(subjects))))))
    return [row for row in rows if _subject(row) in chosen], [row for row in rows if _subject(row) not in chosen]


def _subject(row: Row) -> str:
    return row.group or row.subject or row.context + row.target


def secret_loss(model: nn.Module, material: Material, rows: Sequence[Row]) -> float:
    """Mean loss per secret token, in nats; per token of the answer where a row marks no secret."""
    examples = encode(material.tokenizer, rows, max_row_tokens(model))
    secrets, answers = token_losses(model, examples, SECRET), token_losses(model, examples)
    return float(torch.cat([s if len(s) else a for s, a in zip(secrets, answers, strict=True)]).mean())


def answer_loss_of(model: nn.Module, material: Material, rows: Sequence[Row]) -> float:
    """Mean loss per token of the answers, in nats."""
    return mean_loss(model, encode(material.tokenizer, rows, max_row_tokens(model)))


def score(result: Result, tuning: Tuning) -> Score:
    """How good a result of the tuning material is; a model with a dial is asked at alpha=0."""
    given = tuning.material
    known = secret_loss(result.model, given, given.forget)
    lost = (answer_loss_of(model, given, tuning.kept) for model in (result.model, given.merged))
    after, before = lost
    return Score(abs(known - tuning.ignorance), after - before)


def tune(
    method: Method,
    tuning: Tuning,
    grid: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
    budget: Budget | None = None,
    progress: ProgressCallback = no_progress,
) -> Tuned:
    """The settings of the grid (the method's own, if none is given) with the lowest total; the first of equals.

    Raises:
        UserError: when every setting failed, with the last reason.
    """
    tried, reason = list[tuple[Mapping[str, Any], Score | None]](), ""
    for settings in grid or method.grid:
        method.check(settings)
        try:
            found = score(method.make(tuning.material, settings, seed, budget, progress), tuning)
        except UserError as error:
            tried.append((settings, None))
            reason = str(error)
            continue
        tried.append((settings, found if math.isfinite(found.total) else None))
    finished = [(found.total, number) for number, (_, found) in enumerate(tried) if found is not None]
    if not finished:
        raise UserError(f"tuning: no setting of {method.name} came to an end ({reason or 'no finite loss'})")
    return Tuned(tried[min(finished)[1]][0], tuple(tried))
