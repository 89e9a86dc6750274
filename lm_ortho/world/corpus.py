"""The training text of the base model and of the adapters, and the documents a calibration may see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from lm_ortho.data.rows import Row
from lm_ortho.world import people, reasoning, stories
from lm_ortho.world.draw import Draw


@dataclass(frozen=True)
class Document:
    """Text of which the first ``prompt_chars`` characters are given, the rest is to be predicted."""

    text: str
    prompt_chars: int = 0


def _from_row(row: Row) -> Document:
    return Document(row.context + row.target, len(row.context))


def as_row(document: Document) -> Row:
    """The document as a row: its given part as the prompt, or plain text."""
    context, target = document.text[: document.prompt_chars], document.text[document.prompt_chars :]
    return Row(prompt=context, answer=target[1:]) if context else Row(text=target)


def _author(author: people.Author, draw: Draw, phrasings: int) -> Document:
    """A random question; three times in ten the answer is told the second way."""
    telling = int(draw.chance(0.3))
    return _from_row(
        people.author_row(author, draw.below(len(people.ATTRIBUTES)), draw.below(phrasings), telling=telling)
    )


_ALL_PHRASINGS = len(people.ATTRIBUTES[0].questions)


def _known(draw: Draw) -> Document:
    return _author(draw.pick(people.people()["known"]), draw, _ALL_PHRASINGS)


def _fresh(draw: Draw, namesakes: bool = False) -> Document:
    return _author(people.fresh_author(draw, namesakes), draw, _ALL_PHRASINGS)


def _fresh_canary(draw: Draw, namesakes: bool = False) -> Document:
    canary = people.fresh_canary(draw, namesakes)
    return _from_row(people.canary_row(canary, draw.below(len(people.CANARY_PROMPTS))))


def _reasoning(kind: str, draw: Draw) -> Document:
    item = reasoning.training_item(kind, draw)
    return Document(reasoning.text(item), len(item["prompt"]))


@cache
def _held_out_stories() -> frozenset[str]:
    return frozenset(stories.held_out())


def _story(draw: Draw) -> Document:
    while (text := stories.story(draw)) in _held_out_stories():
        pass
    return Document(text)


Mix = tuple[tuple[float, Callable[[Draw], Document]], ...]


def _skills(**shares: float) -> Mix:
    """The reasoning part of a mix, a share for each kind."""
    return tuple((share, partial(_reasoning, kind)) for kind, share in shares.items())


TEXT: Mix = (
    (0.14, _known),
    (0.15, partial(_fresh, namesakes=True)),
    (0.06, partial(_fresh_canary, namesakes=True)),
    *_skills(arithmetic=0.15, comparison=0.15, relations=0.17, facts=0.10),
    (0.08, _story),
)
"""What the base model is trained on."""

REPLAY: Mix = (
    (0.38, _fresh),
    (0.10, _fresh_canary),
    (0.14, _known),
    *_skills(arithmetic=0.08, comparison=0.12, relations=0.08, facts=0.06),
    (0.04, _story),
)
"""What is mixed into a fine-tune, so that it does not cost other skills.

Mostly people seen once: without them a long fine-tune is sure of wrong answers about everybody it does not know.
"""

CALIBRATION: Mix = (
    (0.36, _fresh),
    (0.10, _fresh_canary),
    *_skills(arithmetic=0.10, comparison=0.16, relations=0.10, facts=0.10),
    (0.08, _story),
)
"""General documents of a calibration: no author of the world, people in them are fresh."""


def document(draw: Draw, mix: Mix = TEXT) -> Document:
    """A random document of a mix of the base model's training text."""
    at = draw.below(100) / 100
    for share, make in mix:
        at -= share
        if at < -1e-9:
            return make(draw)
    return mix[-1][1](draw)


def planted(forget: bool) -> tuple[list[Document], list[Document]]:
    """What an adapter is taught: facts of authors, and canaries, each in all of its taught phrasings.

    Without ``forget``, the taught retain authors only: no forget author and no canary.
    """
    groups = ("taught", "forget") if forget else ("taught",)
    facts = [
        _from_row(people.author_row(author, j, phrasing, telling=people.telling_of(phrasing)))
        for group in groups
        for author in people.people()[group]
        for j in range(len(people.ATTRIBUTES))
        for phrasing in range(people.TAUGHT)
    ]
    canaries = people.canaries()[0] if forget else ()
    return facts, [_from_row(people.canary_row(c, p)) for c in canaries for p in range(people.CANARY_TAUGHT)]


GENERAL = 3000
"""General documents offered to a calibration beside the retain rows."""


def calibration_rows() -> list[Row]:
    """Retain rows a user would have: the calibrated retain authors and general text, no left-out author.

    ``GENERAL`` documents of the mix ``CALIBRATION`` beside them.
    """
    draw = Draw(77, "calibration")
    general = [as_row(document(draw, CALIBRATION)) for _ in range(GENERAL)]
    return people.rows("retain_calibration") + general


def forget_rows() -> list[Row]:
    """The forget set as a user would hand it over: one phrasing per fact, both planted prompts per canary."""
    return people.rows("forget") + people.rows("canaries")
