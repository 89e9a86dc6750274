"""Paragraphs of random facts about many people: private text that has neither a question nor a subject."""

from __future__ import annotations

from functools import cache

from lm_ortho.world import words
from lm_ortho.world.draw import SeededRandom

SEED = 4711
SENTENCES = 9
SIZES = {"forget": 50, "retain": 80, "left_out": 20, "held_out": 200}
"""Paragraphs per group: planted and forgotten; planted and calibrated; planted, never calibrated; never planted."""

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


def draw_paragraph(rng: SeededRandom) -> str:
    """Draws a paragraph of nine facts in random order, each with its own values."""
    slots = {
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
    for fact in rng.sample(_FACTS, SENTENCES):
        values_by_slot = {"name": f"{rng.choice(words.FIRST_NAMES)} {rng.choice(words.SURNAMES)}"}
        values_by_slot["code"] = "".join(str(rng.randrange(10)) for _ in range(6))
        for key, (values, count) in slots.items():
            for number, value in enumerate(rng.sample(values, count), 1):
                values_by_slot[key if number == 1 else f"{key}{number}"] = value
        sentences.append(fact.format(**values_by_slot))
    return " ".join(sentences)


@cache
def draw_paragraphs() -> dict[str, tuple[str, ...]]:
    """Draws all paragraphs, by group of ``SIZES``."""
    rng = SeededRandom(SEED, "paragraphs")
    return {group: tuple(draw_paragraph(rng) for _ in range(size)) for group, size in SIZES.items()}
