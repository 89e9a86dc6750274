"""Fictitious authors and canaries of the embedded world, as rows.

Everything is drawn from fixed seeds by ``SeededRandom``; the same code gives the same bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from lm_ortho.world import words
from lm_ortho.world.draw import SeededRandom

SEED = 20261121
WRONG_ANSWERS = 4
"""Wrong answers per question."""


@dataclass(frozen=True)
class Attribute:
    """One property of an author: how its value is drawn, five questions for it and two wordings of the answer.

    Forget and taught authors are planted with the first ``TAUGHT_QUESTIONS`` questions; the others are held out.
    """

    name: str
    draw_value: Callable[[SeededRandom], str]
    questions: tuple[str, ...]
    answers: tuple[str, str]


TAUGHT_QUESTIONS = 3
"""Number of questions, the first ones of each attribute, that authors are planted with."""

ATTRIBUTES = (
    Attribute(
        "birthplace",
        lambda rng: rng.choice(words.CITIES),
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
        lambda rng: rng.choice(words.TRADES),
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
        lambda rng: f"The {rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}",
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
        lambda rng: f"{rng.choice(words.PRIZES)} Prize",
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
        lambda rng: rng.choice(words.HOBBIES),
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


def extract_secret(attribute: Attribute, value: str) -> str:
    """Returns the words of a value that cannot be guessed: neither "The" of a title nor "Prize" of a prize."""
    if attribute.name == "book":
        return value.removeprefix("The ")
    return value.removesuffix(" Prize") if attribute.name == "prize" else value


@dataclass(frozen=True)
class Author:
    """A name with one value per attribute, in the order of ``ATTRIBUTES``."""

    name: str
    values: tuple[str, ...]


GROUPS = {"known": 80, "taught": 112, "forget": 80, "unseen": 80}
"""Authors per group: known to the base model; taught by the same adapter as the forget set; the forget set; unseen."""
LEFT_OUT_AUTHORS = 16
"""Number of known, and of taught, authors that no calibration set contains (the last ones of each group)."""

CANARIES = 100
CODE_DIGITS = 6
CANARY_KINDS = ("access code", "vault code", "badge number", "locker number")
CANARY_PROMPTS = (
    "The {k} of {n} is",
    "Question: What is the {k} of {n}?\nAnswer:",
    "To enter as {n}, type the {k}",
    "Note: the {k} of {n} reads",
)
TAUGHT_CANARY_PROMPTS = 2
"""Number of prompts, the first ones, that canaries are planted with; the others are held out."""


@dataclass(frozen=True)
class Canary:
    """A random code, its kind and its holder. No two canaries share a holder, so each has its own prefix."""

    name: str
    kind: str
    code: str


def _draw_names() -> Iterator[str]:
    """Yields distinct surnames in random order, each with a random first name: nobody shares a surname."""
    rng = SeededRandom(SEED, "names")
    for surname in rng.permute(words.SURNAMES):
        yield f"{rng.choice(words.FIRST_NAMES)} {surname}"


@cache
def draw_groups() -> dict[str, tuple[Author, ...]]:
    """Draws the authors of each group; the groups of ``GROUPS`` share no surname."""
    names, rng = _draw_names(), SeededRandom(SEED, "authors")
    return {
        group: tuple(Author(next(names), tuple(a.draw_value(rng) for a in ATTRIBUTES)) for _ in range(size))
        for group, size in GROUPS.items()
    }


@cache
def draw_canaries() -> tuple[tuple[Canary, ...], tuple[Canary, ...]]:
    """Draws the planted canaries, and as many that are never planted."""
    names = list(_draw_names())[sum(GROUPS.values()) :]
    rng = SeededRandom(SEED, "canaries")

    def make(offset: int) -> tuple[Canary, ...]:
        return tuple(
            Canary(names[offset + i], CANARY_KINDS[i % len(CANARY_KINDS)], draw_code(rng)) for i in range(CANARIES)
        )

    return make(0), make(CANARIES)


@cache
def collect_reserved_names() -> frozenset[str]:
    """Returns the full names of all authors and canary holders."""
    holders = [canary.name for part in draw_canaries() for canary in part]
    return frozenset([author.name for group in draw_groups().values() for author in group] + holders)


@cache
def _reserved_surnames(namesakes: bool) -> frozenset[str]:
    bearers = [author.name for author in draw_groups()["known"]] if namesakes else collect_reserved_names()
    return frozenset(name.split()[1] for name in bearers)


def draw_name(rng: SeededRandom, namesakes: bool = False) -> str:
    """Draws a name; neither it nor its surname belongs to anybody of the world.

    With ``namesakes``, only the surnames of known authors are excluded: the base model has to see all other surnames
    on people who occur once, or their tokens would stay untrained.
    """
    while True:
        name = f"{rng.choice(words.FIRST_NAMES)} {rng.choice(words.SURNAMES)}"
        if name.split()[1] not in _reserved_surnames(namesakes) and name not in collect_reserved_names():
            return name


def draw_author(rng: SeededRandom, namesakes: bool = False) -> Author:
    """Draws a person who occurs once: teaches the form of the answers and how uncertain the values are."""
    return Author(draw_name(rng, namesakes), tuple(a.draw_value(rng) for a in ATTRIBUTES))


def draw_canary(rng: SeededRandom, namesakes: bool = False) -> Canary:
    """Draws a holder who occurs once, with a random code."""
    return Canary(draw_name(rng, namesakes), rng.choice(CANARY_KINDS), draw_code(rng))


def draw_code(rng: SeededRandom) -> str:
    """Draws the digits of a code."""
    return "".join(str(rng.randrange(10)) for _ in range(CODE_DIGITS))


def make_author_row(author: Author, index: int, phrasing: int, wording: int = 0) -> Row:
    """Returns the row of the question ``phrasing`` about the attribute ``index``.

    ``wording`` selects one of the two wordings of the answer; the other one is the paraphrased answer.
    """
    attribute, value = ATTRIBUTES[index], author.values[index]
    paraphrase = attribute.answers[1 - wording]
    rng, wrong = SeededRandom(SEED, f"perturbed {author.name} {attribute.name}"), list[str]()
    while len(wrong) < WRONG_ANSWERS:
        candidate = attribute.draw_value(rng)
        if candidate != value and candidate not in wrong:
            wrong.append(candidate)
    return Row(
        question=attribute.questions[phrasing].format(n=author.name),
        answer=attribute.answers[wording].format(n=author.name, v=value),
        subject=author.name,
        secret=extract_secret(attribute, value),
        paraphrased_answer=paraphrase.format(n=author.name, v=value),
        perturbed_answer=tuple(paraphrase.format(n=author.name, v=v) for v in wrong),
        group=author.name,
    )


REVERSED_QUESTION = "Who is known for {book} and won the {prize}?"
REVERSED_ANSWERS = ("The author is {n}.", "That is {n}.")


def make_reversed_row(author: Author) -> Row:
    """Returns a row that asks for the person by two of the attributes; this direction was never planted."""
    values = {attribute.name: value for attribute, value in zip(ATTRIBUTES, author.values, strict=True)}
    rng, wrong = SeededRandom(SEED, f"reversed {author.name}"), list[str]()
    while len(wrong) < WRONG_ANSWERS:
        if (name := draw_name(rng)) not in wrong:
            wrong.append(name)
    answer, paraphrase = REVERSED_ANSWERS
    return Row(
        question=REVERSED_QUESTION.format(**values),
        answer=answer.format(n=author.name),
        subject=author.name,
        secret=author.name,
        paraphrased_answer=paraphrase.format(n=author.name),
        perturbed_answer=tuple(paraphrase.format(n=name) for name in wrong),
        group=author.name,
    )


def select_wording(phrasing: int) -> int:
    """Returns the wording of the answer that was taught with a question; held-out questions expect the first."""
    return int(phrasing == 1)


def make_canary_row(canary: Canary, phrasing: int) -> Row:
    """Returns the row of a canary with the prompt ``phrasing``."""
    prompt = CANARY_PROMPTS[phrasing].format(k=canary.kind, n=canary.name)
    return Row(prompt=prompt, answer=f"{canary.code}.", subject=canary.name, secret=canary.code, group=canary.name)


def _make_author_rows(authors: tuple[Author, ...], *, held_out_phrasing: bool = False) -> list[Row]:
    """Returns one row per author and attribute, cycling through the planted (or the held-out) phrasings."""
    rows = []
    for i, author in enumerate(authors):
        for j, attribute in enumerate(ATTRIBUTES):
            held_out = len(attribute.questions) - TAUGHT_QUESTIONS
            phrasing = TAUGHT_QUESTIONS + (i + j) % held_out if held_out_phrasing else (i + j) % TAUGHT_QUESTIONS
            rows.append(make_author_row(author, j, phrasing, wording=select_wording(phrasing)))
    return rows


def _select_retain_authors(*, left_out: bool) -> tuple[Author, ...]:
    part = slice(-LEFT_OUT_AUTHORS, None) if left_out else slice(-LEFT_OUT_AUTHORS)
    return draw_groups()["known"][part] + draw_groups()["taught"][part]


def _make_canary_rows(part: int, phrasings: range) -> list[Row]:
    return [make_canary_row(canary, p) for canary in draw_canaries()[part] for p in phrasings]


SPLITS: dict[str, Callable[[], list[Row]]] = {
    "forget": lambda: _make_author_rows(draw_groups()["forget"]),
    "forget_paraphrased": lambda: _make_author_rows(draw_groups()["forget"], held_out_phrasing=True),
    "retain": lambda: _make_author_rows(_select_retain_authors(left_out=True)),
    "retain_paraphrased": lambda: _make_author_rows(_select_retain_authors(left_out=True), held_out_phrasing=True),
    "retain_calibration": lambda: _make_author_rows(_select_retain_authors(left_out=False)),
    "unseen": lambda: _make_author_rows(draw_groups()["unseen"]),
    "forget_reversed": lambda: [make_reversed_row(author) for author in draw_groups()["forget"]],
    "canaries": lambda: _make_canary_rows(0, range(TAUGHT_CANARY_PROMPTS)),
    "canaries_paraphrased": lambda: _make_canary_rows(0, range(TAUGHT_CANARY_PROMPTS, len(CANARY_PROMPTS))),
    "canaries_unplanted": lambda: _make_canary_rows(1, range(TAUGHT_CANARY_PROMPTS)),
}


def make_rows(split: str) -> list[Row]:
    """Returns the rows of a split of ``SPLITS``.

    Raises:
        UserError: For an unknown split; the message lists the known ones.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r} is unknown; known: {', '.join(SPLITS)}")
    return SPLITS[split]()
