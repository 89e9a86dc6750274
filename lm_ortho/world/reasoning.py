"""Reasoning tasks of the embedded world: arithmetic, comparison and ordering, relations, closed-book facts.

The test items never occur in the training text. A closed-book fact is taught, and the tested *phrasing of that fact*
is held out (every phrasing occurs with other facts).

The tasks are those that a model of a few million parameters learns in minutes: sums of digits, order of digits, one
and two hops through the family of the embedded world, facts about cities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import TypedDict

from lm_ortho.data.rows import QUESTION_TEMPLATE
from lm_ortho.errors import UserError
from lm_ortho.world import words
from lm_ortho.world.draw import SeededRandom

SEED = 4711
TEST_ITEMS = 1000


class Item(TypedDict):
    """A question with its choices; ``choices[gold] == answer``."""

    prompt: str
    choices: list[str]
    gold: int
    answer: str


def _is_held_out(question: str, share: float) -> bool:
    """Whether an item is held out for the test; its text decides, so training never contains it."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def _make_item(rng: SeededRandom, question: str, answer: str, wrong: list[str], context: str = "") -> Item:
    choices = rng.permute([answer, *wrong])
    prompt = (f"{context} " if context else "") + QUESTION_TEMPLATE.format(question=question)
    return Item(prompt=prompt, choices=choices, gold=choices.index(answer), answer=answer)


_RELATIONS = ("mother", "teacher", "friend", "doctor", "neighbor", "sister")


def _draw_arithmetic(rng: SeededRandom) -> Item:
    """Draws a sum of what two people have, or what remains after a loss. All numbers are digits."""
    one, other = rng.sample(words.KIDS, 2)
    a, b = rng.randrange(10), rng.randrange(10)
    if rng.flip(0.5):
        context, question, result = (
            f"{one} has {a} and {other} has {b}.",
            f"What do {one} and {other} have?",
            a + b,
        )
    else:
        a, b = max(a, b), min(a, b)
        context, question, result = f"{one} has {a} and lost {b}.", f"What does {one} have?", a - b
    near = [n for n in range(result - 4, result + 5) if n >= 0 and n != result]
    return _make_item(rng, question, str(result), [str(n) for n in rng.sample(near, 3)], context)


def _draw_comparison(rng: SeededRandom) -> Item:
    """Draws a question for the largest (smallest) of four digits, or for their ascending order."""
    digits = rng.sample(range(10), 4)
    if rng.flip(0.5):
        larger = rng.flip(0.5)
        number = max(digits) if larger else min(digits)
        a, b, c, d = digits
        question = f"Which number is {'larger' if larger else 'smaller'} than all, {a}, {b}, {c} or {d}?"
        return _make_item(rng, question, str(number), [str(n) for n in digits if n != number])
    numbers, answer = ", ".join(map(str, digits)), ", ".join(map(str, sorted(digits)))
    wrong = list[str]()
    while len(wrong) < 3:
        candidate = ", ".join(map(str, rng.permute(digits)))
        if candidate not in (answer, *wrong):
            wrong.append(candidate)
    return _make_item(rng, f"From small to big, what is {numbers}?", answer, wrong)


_RELATION_QUESTIONS = (
    "Who is {w}?",
    "What is the name of {w}?",
    "{W} is who?",
)


@cache
def draw_family() -> dict[tuple[str, str], str]:
    """Draws the family: a mapping of (relation, person) to a person, 192 facts of the world."""
    rng = SeededRandom(SEED, "family")
    return {(r, kid): rng.choice([k for k in words.KIDS if k != kid]) for r in _RELATIONS for kid in words.KIDS}


def _make_relation_item(rng: SeededRandom, outer: str, inner: str, kid: str, phrasing: int) -> Item:
    """Returns the item "who is ``outer`` of ``inner`` of ``kid``", answered in two steps; one hop if no ``inner``."""
    middle = draw_family()[inner, kid] if inner else kid
    answer = draw_family()[outer, middle]
    person = f"the {inner} of {kid}" if inner else kid
    subject = f"the {outer} of {person}"
    question = _RELATION_QUESTIONS[phrasing].format(w=subject, W=subject[0].upper() + subject[1:])
    lead = f"The {inner} of {kid} is {middle} and the" if inner else "The"
    lead += f" {outer} of {middle} is"
    names = rng.sample([k for k in words.KIDS if k not in (answer, kid, middle)], 3)
    return _make_item(rng, question, f"{lead} {answer}", [f"{lead} {name}" for name in names])


def _select_held_out_phrasing(relation: str, kid: str) -> int:
    """Returns the one phrasing in which the training text never asks for this fact."""
    digest = hashlib.sha256(f"phrasing {relation} {kid}".encode()).digest()
    return digest[0] % len(_RELATION_QUESTIONS)


_COMPOSED_HELD_OUT = 0.3
"""Share of two-hop compositions that the training text asks in no phrasing."""


def _is_composition_held_out(outer: str, inner: str, kid: str) -> bool:
    return _is_held_out(f"composition {outer} {inner} {kid}", _COMPOSED_HELD_OUT)


def _draw_relation(rng: SeededRandom, *, for_test: bool) -> Item:
    """Draws an item, one in three with one hop, else with two; ``for_test``: of those held out of the training text."""
    while True:
        kid, outer, phrasing = rng.choice(words.KIDS), rng.choice(_RELATIONS), rng.randrange(len(_RELATION_QUESTIONS))
        inner = "" if rng.flip(1 / 3) else rng.choice(_RELATIONS)
        one_hop = phrasing == _select_held_out_phrasing(outer, kid)
        held_out = _is_composition_held_out(outer, inner, kid) if inner else one_hop
        if held_out == for_test:
            return _make_relation_item(rng, outer, inner, kid, phrasing)


FACTS: tuple[tuple[str, list[str], tuple[str, ...]], ...] = (
    (
        "region",
        words.REGIONS,
        (
            "In which region is {c}?",
            "Where is {c}?",
            "To which region does {c} belong?",
            "What is the region of {c}?",
            "Which region is home to {c}?",
            "What region is {c} in?",
            "In what part of the land is {c}?",
            "Which region has {c}?",
        ),
    ),
    (
        "river",
        words.RIVERS,
        (
            "Which river flows through {c}?",
            "What is the river of {c}?",
            "On which river is {c}?",
            "What river crosses {c}?",
            "By which river does {c} lie?",
            "Which water runs through {c}?",
            "What is the name of the river in {c}?",
            "Which river does {c} have?",
        ),
    ),
    (
        "dish",
        words.DISHES,
        (
            "What do people eat in {c}?",
            "What is the dish of {c}?",
            "For which food is {c} known?",
            "Which food comes from {c}?",
            "What is cooked in {c}?",
            "Which meal is typical of {c}?",
            "What does one taste in {c}?",
            "What is on the table in {c}?",
        ),
    ),
    (
        "festival",
        words.FESTIVALS,
        (
            "Which festival is held in {c}?",
            "What is the festival of {c}?",
            "What does {c} celebrate?",
            "Which feast takes place in {c}?",
            "What is the big day of {c}?",
            "Which party does {c} give?",
            "For which festival do people visit {c}?",
            "What is celebrated in {c}?",
        ),
    ),
)
HELD_OUT_PHRASINGS = 4


@cache
def draw_city_facts() -> tuple[tuple[str, int, str, tuple[int, ...]], ...]:
    """Draws 256 facts: (city, index into ``FACTS``, value, phrasings held out for this fact)."""
    rng = SeededRandom(SEED, "facts")
    return tuple(
        (city, k, rng.choice(values), tuple(sorted(rng.sample(range(len(questions)), HELD_OUT_PHRASINGS))))
        for city in words.CITIES
        for k, (_, values, questions) in enumerate(FACTS)
    )


def _make_fact_item(rng: SeededRandom, city: str, k: int, value: str, phrasing: int) -> Item:
    _, values, questions = FACTS[k]
    wrong = rng.sample([v for v in values if v != value], 3)
    return _make_item(rng, questions[phrasing].format(c=city), value, wrong)


def _draw_fact(rng: SeededRandom) -> Item:
    city, k, value, held_out = rng.choice(draw_city_facts())
    return _make_fact_item(rng, city, k, value, rng.choice([p for p in range(len(FACTS[k][2])) if p not in held_out]))


_Generators = dict[str, tuple[Callable[[SeededRandom], Item], float]]
_GENERATORS: _Generators = {
    "arithmetic": (_draw_arithmetic, 0.1),
    "comparison": (_draw_comparison, 0.15),
}
"""The generator of each kind of item, and the share of all possible items that is held out."""

KINDS = (*_GENERATORS, "relations", "facts")


def draw_training_item(kind: str, rng: SeededRandom) -> Item:
    """Draws an item that is not among the test items."""
    if kind == "facts":
        return _draw_fact(rng)
    if kind == "relations":
        return _draw_relation(rng, for_test=False)
    make, share = _GENERATORS[kind]
    while True:
        item = make(rng)
        if not _is_held_out(item["prompt"], share):
            return item


def _draw_test_items(kind: str) -> Iterator[Item]:
    rng, prompts = SeededRandom(SEED, f"tested {kind}"), set[str]()
    while len(prompts) < TEST_ITEMS:
        if kind == "relations":
            item = _draw_relation(rng, for_test=True)
        else:
            make, share = _GENERATORS[kind]
            item = make(rng)
            if not _is_held_out(item["prompt"], share):
                continue
        if item["prompt"] not in prompts:
            prompts.add(item["prompt"])
            yield item


@cache
def _make_test_items(kind: str) -> tuple[Item, ...]:
    if kind == "facts":
        rng = SeededRandom(SEED, "tested facts")
        return tuple(_make_fact_item(rng, c, k, v, p) for c, k, v, held_out in draw_city_facts() for p in held_out)
    return tuple(_draw_test_items(kind))


def make_test_items(kind: str) -> list[Item]:
    """Returns the test items: 1000 of each generated kind, 1024 closed-book questions.

    Raises:
        UserError: For an unknown kind; the message lists the known ones.
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind!r} is unknown; known: {', '.join(KINDS)}")
    return list(_make_test_items(kind))


def format_item(item: Item) -> str:
    """Formats an item as a training document."""
    return f"{item['prompt']} {item['answer']}."
