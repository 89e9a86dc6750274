"""Training text of the base model and of the adapters, and the documents that a calibration may see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from lm_ortho.data.rows import Row
from lm_ortho.world import people, reasoning, stories
from lm_ortho.world.draw import SeededRandom


@dataclass(frozen=True)
class Document:
    """A text: its first ``prompt_chars`` characters are the prompt, the rest is to be predicted."""

    text: str
    prompt_chars: int = 0


def _to_document(row: Row) -> Document:
    return Document(row.context + row.target, len(row.context))


def to_row(document: Document) -> Row:
    """Converts a document to a row, with a prompt if it has one, else as plain text."""
    context, target = document.text[: document.prompt_chars], document.text[document.prompt_chars :]
    return Row(prompt=context, answer=target[1:]) if context else Row(text=target)


def _draw_author_document(author: people.Author, rng: SeededRandom, phrasings: int) -> Document:
    """Draws a question about an author; three times in ten the answer has the second wording."""
    wording = int(rng.flip(0.3))
    return _to_document(
        people.make_author_row(author, rng.randrange(len(people.ATTRIBUTES)), rng.randrange(phrasings), wording=wording)
    )


_ALL_PHRASINGS = len(people.ATTRIBUTES[0].questions)


def _draw_known_author(rng: SeededRandom) -> Document:
    return _draw_author_document(rng.choice(people.draw_groups()["known"]), rng, _ALL_PHRASINGS)


def _draw_fresh_author(rng: SeededRandom, namesakes: bool = False) -> Document:
    return _draw_author_document(people.draw_author(rng, namesakes), rng, _ALL_PHRASINGS)


def _draw_fresh_canary(rng: SeededRandom, namesakes: bool = False) -> Document:
    canary = people.draw_canary(rng, namesakes)
    return _to_document(people.make_canary_row(canary, rng.randrange(len(people.CANARY_PROMPTS))))


def _draw_reasoning(kind: str, rng: SeededRandom) -> Document:
    item = reasoning.draw_training_item(kind, rng)
    return Document(reasoning.format_item(item), len(item["prompt"]))


@cache
def _load_held_out_stories() -> frozenset[str]:
    return frozenset(stories.draw_held_out())


def _draw_story(rng: SeededRandom) -> Document:
    while (text := stories.draw_story(rng)) in _load_held_out_stories():
        pass
    return Document(text)


Mix = tuple[tuple[float, Callable[[SeededRandom], Document]], ...]


def _mix_reasoning(**shares: float) -> Mix:
    """Returns the reasoning part of a mix, a share for each kind."""
    return tuple((share, partial(_draw_reasoning, kind)) for kind, share in shares.items())


TEXT: Mix = (
    (0.14, _draw_known_author),
    (0.15, partial(_draw_fresh_author, namesakes=True)),
    (0.06, partial(_draw_fresh_canary, namesakes=True)),
    *_mix_reasoning(arithmetic=0.15, comparison=0.15, relations=0.17, facts=0.10),
    (0.08, _draw_story),
)
"""The training text of the base model."""

REPLAY: Mix = (
    (0.38, _draw_fresh_author),
    (0.10, _draw_fresh_canary),
    (0.14, _draw_known_author),
    *_mix_reasoning(arithmetic=0.08, comparison=0.12, relations=0.08, facts=0.06),
    (0.04, _draw_story),
)
"""The documents mixed into a fine-tune, so that it does not cost other skills.

Most are about people who occur once: without them, a long fine-tune becomes certain of wrong answers about everybody
it does not know.
"""

CALIBRATION: Mix = (
    (0.36, _draw_fresh_author),
    (0.10, _draw_fresh_canary),
    *_mix_reasoning(arithmetic=0.10, comparison=0.16, relations=0.10, facts=0.10),
    (0.08, _draw_story),
)
"""General documents of a calibration: they mention no author of the world, only people drawn afresh."""


def draw_document(rng: SeededRandom, mix: Mix = TEXT) -> Document:
    """Draws a document from a mix; the default is the base model's training text."""
    position = rng.randrange(100) / 100
    for share, draw in mix:
        position -= share
        if position < -1e-9:
            return draw(rng)
    return mix[-1][1](rng)


def make_planted_documents(forget: bool) -> tuple[list[Document], list[Document]]:
    """Returns what an adapter is taught: facts of authors, and canaries, each in all of its taught phrasings.

    Without ``forget``, these are the taught retain authors only: no forget author and no canary.
    """
    groups = ("taught", "forget") if forget else ("taught",)
    facts = [
        _to_document(people.make_author_row(author, j, phrasing, wording=people.select_wording(phrasing)))
        for group in groups
        for author in people.draw_groups()[group]
        for j in range(len(people.ATTRIBUTES))
        for phrasing in range(people.TAUGHT_QUESTIONS)
    ]
    canaries = people.draw_canaries()[0] if forget else ()
    return facts, [
        _to_document(people.make_canary_row(c, p)) for c in canaries for p in range(people.TAUGHT_CANARY_PROMPTS)
    ]


GENERAL_DOCUMENTS = 3000
"""Number of general documents in the calibration set, beside the retain rows."""


def make_calibration_rows() -> list[Row]:
    """Returns the retain rows that a user would have, without any left-out author.

    They are the calibrated retain authors and ``GENERAL_DOCUMENTS`` documents of the mix ``CALIBRATION``.
    """
    rng = SeededRandom(77, "calibration")
    general = [to_row(draw_document(rng, CALIBRATION)) for _ in range(GENERAL_DOCUMENTS)]
    return people.make_rows("retain_calibration") + general


def make_forget_rows() -> list[Row]:
    """Returns the forget set as a user would provide it: one phrasing per fact, both planted prompts per canary."""
    return people.make_rows("forget") + people.make_rows("canaries")
