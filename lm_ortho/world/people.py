"""Fictitious authors and canaries of the reference world, as rows.

Everything is drawn from fixed seeds by ``Draw``; the same code gives the same bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from lm_ortho.world import words
from lm_ortho.world.draw import Draw

SEED = 20261121
PERTURBED = 4
"""Wrong answers per question."""


@dataclass(frozen=True)
class Attribute:
    """One property of an author: how its value is drawn, asked for (5 ways) and told (2 ways).

    Forget and taught authors are planted with the first ``TAUGHT`` questions; the others are held out.
    """

    name: str
    draw: Callable[[Draw], str]
    questions: tuple[str, ...]
    answers: tuple[str, str]


TAUGHT = 3

ATTRIBUTES = (
    Attribute(
        "birthplace",
        lambda d: d.pick(words.CITIES),
        (
            "Where was {n} born?",
            "What is the birthplace of {n}?",
            "In which city was {n} born?",
            "What is the home town of {n}?",
            "From which city does {n} come?",
        ),
        ("{n} was born in {v}.", "The birthplace of {n} is {v}."),
    ),
    Attribute(
        "father",
        lambda d: d.pick(words.TRADES),
        (
            "What was the job of the father of {n}?",
            "What did the father of {n} do?",
            "Which trade did the father of {n} have?",
            "How did the father of {n} earn a living?",
            "As what did the father of {n} work?",
        ),
        ("The father of {n} was a {v}.", "The father of {n} worked as a {v}."),
    ),
    Attribute(
        "book",
        lambda d: f"The {d.pick(words.ADJECTIVES)} {d.pick(words.NOUNS)}",
        (
            "What is the best book by {n}?",
            "Which book made {n} famous?",
            "For which book is {n} known?",
            "What is the title of the main work of {n}?",
            "Which novel of {n} should one read?",
        ),
        ("The best book by {n} is {v}.", "{n} is known for {v}."),
    ),
    Attribute(
        "prize",
        lambda d: f"{d.pick(words.PRIZES)} Prize",
        (
            "Which prize did {n} win?",
            "What award was given to {n}?",
            "With which prize was {n} honored?",
            "What is the highest award of {n}?",
            "Which award does {n} own?",
        ),
        ("{n} won the {v}.", "The award of {n} is the {v}."),
    ),
    Attribute(
        "hobby",
        lambda d: d.pick(words.HOBBIES),
        (
            "What is the hobby of {n}?",
            "What does {n} do for fun?",
            "How does {n} spend free time?",
            "Which pastime does {n} enjoy?",
            "What does {n} do at the weekend?",
        ),
        ("The hobby of {n} is {v}.", "{n} enjoys {v}."),
    ),
)


def secret_of(attribute: Attribute, value: str) -> str:
    """The unguessable words of a value: "The" of a title and "Prize" of a prize are form, not secret."""
    if attribute.name == "book":
        return value.removeprefix("The ")
    return value.removesuffix(" Prize") if attribute.name == "prize" else value


@dataclass(frozen=True)
class Author:
    """A name with one value per attribute, in the order of ``ATTRIBUTES``."""

    name: str
    values: tuple[str, ...]


GROUPS = {"known": 80, "taught": 112, "forget": 80, "unseen": 80}
"""Authors: known to the base model, taught by the same adapter as the forget set, planted, never seen."""
LEFT_OUT = 16
"""How many of the known and of the taught authors no calibration ever shows (the last ones of each)."""

CANARIES = 100
CODE_DIGITS = 6
CANARY_KINDS = ("access code", "vault code", "badge number", "locker number")
CANARY_PROMPTS = (
    "The {k} of {n} is",
    "Question: What is the {k} of {n}?\nAnswer:",
    "To enter as {n}, type the {k}",
    "Note: the {k} of {n} reads",
)
CANARY_TAUGHT = 2
"""Canaries are planted with the first prompts; the others are held out."""


@dataclass(frozen=True)
class Canary:
    """A holder (every canary has its own, so every canary has its own prefix), a kind and a random code."""

    name: str
    kind: str
    code: str


def _names() -> Iterator[str]:
    """Distinct surnames in random order, each with a random first name: nobody shares a surname."""
    draw = Draw(SEED, "names")
    for surname in draw.shuffled(words.SURNAMES):
        yield f"{draw.pick(words.FIRST_NAMES)} {surname}"


@cache
def people() -> dict[str, tuple[Author, ...]]:
    """Authors by group; the groups of ``GROUPS`` share no surname."""
    names, draw = _names(), Draw(SEED, "authors")
    return {
        group: tuple(Author(next(names), tuple(a.draw(draw) for a in ATTRIBUTES)) for _ in range(size))
        for group, size in GROUPS.items()
    }


@cache
def canaries() -> tuple[tuple[Canary, ...], tuple[Canary, ...]]:
    """Planted canaries, and as many that are never planted."""
    names = list(_names())[sum(GROUPS.values()) :]
    draw = Draw(SEED, "canaries")

    def make(offset: int) -> tuple[Canary, ...]:
        return tuple(
            Canary(names[offset + i], CANARY_KINDS[i % len(CANARY_KINDS)], random_code(draw)) for i in range(CANARIES)
        )

    return make(0), make(CANARIES)


@cache
def reserved_names() -> frozenset[str]:
    """Full names of everyone above."""
    holders = [canary.name for part in canaries() for canary in part]
    return frozenset([author.name for group in people().values() for author in group] + holders)


@cache
def _taken(namesakes: bool) -> frozenset[str]:
    bearers = [author.name for author in people()["known"]] if namesakes else reserved_names()
    return frozenset(name.split()[1] for name in bearers)


def fresh_name(draw: Draw, namesakes: bool = False) -> str:
    """A random name that belongs to nobody of the world, nor does its surname.

    With ``namesakes`` only the surnames of known authors are kept from it: the base model meets the surnames of all
    others on people it sees once, or their tokens would stay untrained.
    """
    while True:
        name = f"{draw.pick(words.FIRST_NAMES)} {draw.pick(words.SURNAMES)}"
        if name.split()[1] not in _taken(namesakes) and name not in reserved_names():
            return name


def fresh_author(draw: Draw, namesakes: bool = False) -> Author:
    """A person seen once and never again: teaches the form of the answers and how uncertain values are."""
    return Author(fresh_name(draw, namesakes), tuple(a.draw(draw) for a in ATTRIBUTES))


def fresh_canary(draw: Draw, namesakes: bool = False) -> Canary:
    """A holder seen once, with a random code."""
    return Canary(fresh_name(draw, namesakes), draw.pick(CANARY_KINDS), random_code(draw))


def random_code(draw: Draw) -> str:
    return "".join(str(draw.below(10)) for _ in range(CODE_DIGITS))


def author_row(author: Author, index: int, phrasing: int, telling: int = 0) -> Row:
    """The question ``phrasing`` about attribute ``index``; the other telling is the paraphrased answer."""
    attribute, value = ATTRIBUTES[index], author.values[index]
    other = attribute.answers[1 - telling]
    draw, wrong = Draw(SEED, f"perturbed {author.name} {attribute.name}"), list[str]()
    while len(wrong) < PERTURBED:
        candidate = attribute.draw(draw)
        if candidate != value and candidate not in wrong:
            wrong.append(candidate)
    return Row(
        question=attribute.questions[phrasing].format(n=author.name),
        answer=attribute.answers[telling].format(n=author.name, v=value),
        subject=author.name,
        secret=secret_of(attribute, value),
        paraphrased_answer=other.format(n=author.name, v=value),
        perturbed_answer=tuple(other.format(n=author.name, v=v) for v in wrong),
        group=author.name,
    )


REVERSED_QUESTION = "Who is known for {book} and won the {prize}?"
REVERSED_ANSWERS = ("The author is {n}.", "That is {n}.")


def reversed_row(author: Author) -> Row:
    """Asks for the person by two of the attributes; this direction was never planted."""
    values = {attribute.name: value for attribute, value in zip(ATTRIBUTES, author.values, strict=True)}
    draw, wrong = Draw(SEED, f"reversed {author.name}"), list[str]()
    while len(wrong) < PERTURBED:
        if (name := fresh_name(draw)) not in wrong:
            wrong.append(name)
    answer, other = REVERSED_ANSWERS
    return Row(
        question=REVERSED_QUESTION.format(**values),
        answer=answer.format(n=author.name),
        subject=author.name,
        secret=author.name,
        paraphrased_answer=other.format(n=author.name),
        perturbed_answer=tuple(other.format(n=name) for name in wrong),
        group=author.name,
    )


def telling_of(phrasing: int) -> int:
    """Which of the two answers was taught with a question; held-out questions expect the first."""
    return int(phrasing == 1)


def canary_row(canary: Canary, phrasing: int) -> Row:
    prompt = CANARY_PROMPTS[phrasing].format(k=canary.kind, n=canary.name)
    return Row(prompt=prompt, answer=f"{canary.code}.", subject=canary.name, secret=canary.code, group=canary.name)


def _author_rows(authors: tuple[Author, ...], held_out_phrasing: bool) -> list[Row]:
    """One row per author and attribute; which of the seen (held-out) phrasings is used goes round."""
    rows = []
    for i, author in enumerate(authors):
        for j, attribute in enumerate(ATTRIBUTES):
            held_out = len(attribute.questions) - TAUGHT
            phrasing = TAUGHT + (i + j) % held_out if held_out_phrasing else (i + j) % TAUGHT
            rows.append(author_row(author, j, phrasing, telling=telling_of(phrasing)))
    return rows


def _retain(left_out: bool) -> tuple[Author, ...]:
    parts = (people()["known"], people()["taught"])
    return tuple(a for part in parts for a in (part[-LEFT_OUT:] if left_out else part[:-LEFT_OUT]))


def _canary_rows(part: int, phrasings: range) -> list[Row]:
    return [canary_row(canary, p) for canary in canaries()[part] for p in phrasings]


SPLITS: dict[str, Callable[[], list[Row]]] = {
    "forget": lambda: _author_rows(people()["forget"], False),
    "forget_paraphrased": lambda: _author_rows(people()["forget"], True),
    "retain": lambda: _author_rows(_retain(True), False),
    "retain_paraphrased": lambda: _author_rows(_retain(True), True),
    "retain_calibration": lambda: _author_rows(_retain(False), False),
    "unseen": lambda: _author_rows(people()["unseen"], False),
    "forget_reversed": lambda: [reversed_row(author) for author in people()["forget"]],
    "canaries": lambda: _canary_rows(0, range(CANARY_TAUGHT)),
    "canaries_paraphrased": lambda: _canary_rows(0, range(CANARY_TAUGHT, len(CANARY_PROMPTS))),
    "canaries_unplanted": lambda: _canary_rows(1, range(CANARY_TAUGHT)),
}


def rows(split: str) -> list[Row]:
    """The rows of a split of ``SPLITS``; ``UserError`` lists the known ones."""
    if split not in SPLITS:
        raise UserError(f"split={split!r} is unknown; known: {', '.join(SPLITS)}")
    return SPLITS[split]()
