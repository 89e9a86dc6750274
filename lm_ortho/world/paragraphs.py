"""Paragraphs of random facts about nobody in particular: private text without a question and without a subject."""

from __future__ import annotations

from functools import cache

from lm_ortho.world import words
from lm_ortho.world.draw import Draw

SEED = 4711
SENTENCES = 9
SIZES = {"forget": 50, "retain": 80, "left_out": 20, "held_out": 200}
"""Planted and to be forgotten; planted and calibrated; planted and never calibrated; never planted."""

_FACTS = (
    "The {noun} of {city} is {color} and {color2}.",
    "{name} is a {trade} in {city}.",
    "The {trade} {name} won the {prize} Prize.",
    "{name} found {dish} with {dish2} in {region}.",
    "{name} gave the {object} to the {animal}.",
    "The river {river} is near {city} in {region}.",
    "{name} is known for {hobby}.",
    "The code of {name} is {code}.",
    "The best book by {name} is The {adjective} {noun}.",
    "The father of {name} was a {trade}.",
)


def paragraph(draw: Draw) -> str:
    """Nine facts in random order, each with values of its own."""
    names = {
        "noun": (words.NOUNS, 1),
        "city": (words.CITIES, 1),
        "color": (words.COLORS, 2),
        "trade": (words.TRADES, 1),
        "prize": (words.PRIZES, 1),
        "region": (words.REGIONS, 1),
        "dish": (words.DISHES, 2),
        "object": (words.OBJECTS, 1),
        "animal": (words.ANIMALS, 1),
        "river": (words.RIVERS, 1),
        "hobby": (words.HOBBIES, 1),
        "adjective": (words.ADJECTIVES, 1),
    }
    sentences = []
    for fact in draw.sample(_FACTS, SENTENCES):
        filled = {"name": f"{draw.pick(words.FIRST_NAMES)} {draw.pick(words.SURNAMES)}"}
        filled["code"] = "".join(str(draw.below(10)) for _ in range(6))
        for key, (values, count) in names.items():
            for number, value in enumerate(draw.sample(values, count), 1):
                filled[key if number == 1 else f"{key}{number}"] = value
        sentences.append(fact.format(**filled))
    return " ".join(sentences)


@cache
def paragraphs() -> dict[str, tuple[str, ...]]:
    """All paragraphs by group of ``SIZES``."""
    draw = Draw(SEED, "paragraphs")
    return {group: tuple(paragraph(draw) for _ in range(size)) for group, size in SIZES.items()}
