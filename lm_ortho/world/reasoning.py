"""Reasoning of the reference world: arithmetic, comparison and ordering, relations, closed-book facts.

The tested instances never occur in the training text. For closed-book facts the fact is taught and the tested
*phrasing of that fact* is held out (every phrasing occurs with other facts).

The forms are those that a model of a few million parameters learns in minutes: sums of digits, order of digits,
one and two hops through a family that the text is about, facts about cities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import TypedDict

from lm_ortho.data.rows import QUESTION_TEMPLATE
from lm_ortho.errors import UserError
from lm_ortho.world import words
from lm_ortho.world.draw import Draw

SEED = 4711
TESTED = 1000


class Item(TypedDict):
    """A question with its choices; ``choices[gold] == answer``."""

    prompt: str
    choices: list[str]
    gold: int
    answer: str


def _held_out(question: str, share: float) -> bool:
    """Whether an instance is kept for the test: decided by its text, so training can never meet it."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def _item(draw: Draw, question: str, answer: str, wrong: list[str], context: str = "") -> Item:
    choices = draw.shuffled([answer, *wrong])
    prompt = (f"{context} " if context else "") + QUESTION_TEMPLATE.format(question=question)
    return Item(prompt=prompt, choices=choices, gold=choices.index(answer), answer=answer)


_RELATIONS = ("mother", "teacher", "friend", "doctor", "neighbor", "sister")


def _arithmetic(draw: Draw) -> Item:
    """What two people have together; what is left after a loss. Digits, so the sums themselves are a table."""
    one, other = draw.sample(words.KIDS, 2)
    a, b = draw.below(10), draw.below(10)
    if draw.chance(0.5):
        context, question, result = (
            f"{one} has {a} and {other} has {b}.",
            f"What do {one} and {other} have?",
            a + b,
        )
    else:
        a, b = max(a, b), min(a, b)
        context, question, result = f"{one} has {a} and lost {b}.", f"What does {one} have?", a - b
    near = [n for n in range(result - 4, result + 5) if n >= 0 and n != result]
    return _item(draw, question, str(result), [str(n) for n in draw.sample(near, 3)], context)


def _comparison(draw: Draw) -> Item:
    """The largest (smallest) of four digits; four digits in ascending order."""
    digits = draw.sample(range(10), 4)
    if draw.chance(0.5):
        larger = draw.chance(0.5)
        number = max(digits) if larger else min(digits)
        a, b, c, d = digits
        question = f"Which number is {'larger' if larger else 'smaller'} than all, {a}, {b}, {c} or {d}?"
        return _item(draw, question, str(number), [str(n) for n in digits if n != number])
    listed, answer = ", ".join(map(str, digits)), ", ".join(map(str, sorted(digits)))
    wrong = list[str]()
    while len(wrong) < 3:
        candidate = ", ".join(map(str, draw.shuffled(digits)))
        if candidate not in (answer, *wrong):
            wrong.append(candidate)
    return _item(draw, f"From small to big, what is {listed}?", answer, wrong)


_RELATION_QUESTIONS = (
    "Who is {w}?",
    "What is the name of {w}?",
    "{W} is who?",
)


@cache
def family() -> dict[tuple[str, str], str]:
    """Who is the mother, teacher, ... of whom: (relation, person) to person, 192 facts of the world."""
    draw = Draw(SEED, "family")
    return {(r, kid): draw.pick([k for k in words.KIDS if k != kid]) for r in _RELATIONS for kid in words.KIDS}


def _relation_item(draw: Draw, outer: str, inner: str, kid: str, phrasing: int) -> Item:
    """``outer`` of ``inner`` of ``kid``, answered in two steps; one hop when ``inner`` is empty."""
    middle = family()[inner, kid] if inner else kid
    answer = family()[outer, middle]
    whose = f"the {inner} of {kid}" if inner else kid
    asked = f"the {outer} of {whose}"
    question = _RELATION_QUESTIONS[phrasing].format(w=asked, W=asked[0].upper() + asked[1:])
    lead = f"The {inner} of {kid} is {middle} and the" if inner else "The"
    lead += f" {outer} of {middle} is"
    others = draw.sample([k for k in words.KIDS if k not in (answer, kid, middle)], 3)
    return _item(draw, question, f"{lead} {answer}", [f"{lead} {other}" for other in others])


def _held_out_phrasing(relation: str, kid: str) -> int:
    """The one phrasing in which this fact is never asked in the training text."""
    digest = hashlib.sha256(f"phrasing {relation} {kid}".encode()).digest()
    return digest[0] % len(_RELATION_QUESTIONS)


_COMPOSED_HELD_OUT = 0.3
"""Share of two-hop compositions that the training text never asks in any phrasing."""


def _composition_held_out(outer: str, inner: str, kid: str) -> bool:
    return _held_out(f"composition {outer} {inner} {kid}", _COMPOSED_HELD_OUT)


def _relation(draw: Draw, tested: bool) -> Item:
    """One hop in three, two hops otherwise; ``tested`` ones are those the training text leaves out."""
    while True:
        kid, outer, phrasing = draw.pick(words.KIDS), draw.pick(_RELATIONS), draw.below(len(_RELATION_QUESTIONS))
        inner = "" if draw.chance(1 / 3) else draw.pick(_RELATIONS)
        one_hop = phrasing == _held_out_phrasing(outer, kid)
        held_out = _composition_held_out(outer, inner, kid) if inner else one_hop
        if held_out == tested:
            return _relation_item(draw, outer, inner, kid, phrasing)


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
def city_facts() -> tuple[tuple[str, int, str, tuple[int, ...]], ...]:
    """(city, index into ``FACTS``, value, phrasings held out for this fact), 256 of them."""
    draw = Draw(SEED, "facts")
    return tuple(
        (city, k, draw.pick(values), tuple(sorted(draw.sample(range(len(questions)), HELD_OUT_PHRASINGS))))
        for city in words.CITIES
        for k, (_, values, questions) in enumerate(FACTS)
    )


def _fact_item(draw: Draw, city: str, k: int, value: str, phrasing: int) -> Item:
    _, values, questions = FACTS[k]
    wrong = draw.sample([v for v in values if v != value], 3)
    return _item(draw, questions[phrasing].format(c=city), value, wrong)


def _fact(draw: Draw) -> Item:
    city, k, value, held_out = draw.pick(city_facts())
    return _fact_item(draw, city, k, value, draw.pick([p for p in range(len(FACTS[k][2])) if p not in held_out]))


_Kinds = dict[str, tuple[Callable[[Draw], Item], float]]
_DRAWN: _Kinds = {
    "arithmetic": (_arithmetic, 0.1),
    "comparison": (_comparison, 0.15),
}
"""How instances of a kind are drawn, and which share of all possible ones is held out."""

KINDS = (*_DRAWN, "relations", "facts")


def training_item(kind: str, draw: Draw) -> Item:
    """A random instance that is not among the tested ones."""
    if kind == "facts":
        return _fact(draw)
    if kind == "relations":
        return _relation(draw, tested=False)
    make, share = _DRAWN[kind]
    while True:
        item = make(draw)
        if not _held_out(item["prompt"], share):
            return item


def _tested(kind: str) -> Iterator[Item]:
    draw, seen = Draw(SEED, f"tested {kind}"), set[str]()
    while len(seen) < TESTED:
        if kind == "relations":
            item = _relation(draw, tested=True)
        else:
            make, share = _DRAWN[kind]
            item = make(draw)
            if not _held_out(item["prompt"], share):
                continue
        if item["prompt"] not in seen:
            seen.add(item["prompt"])
            yield item


@cache
def _items(kind: str) -> tuple[Item, ...]:
    if kind == "facts":
        draw = Draw(SEED, "tested facts")
        return tuple(_fact_item(draw, c, k, v, p) for c, k, v, held_out in city_facts() for p in held_out)
    return tuple(_tested(kind))


def items(kind: str) -> list[Item]:
    """The tested instances: 1000 of each drawn kind, 1024 closed-book questions."""
    if kind not in KINDS:
        raise UserError(f"kind={kind!r} is unknown; known: {', '.join(KINDS)}")
    return list(_items(kind))


def text(item: Item) -> str:
    """The instance as a training document."""
    return f"{item['prompt']} {item['answer']}."
