"""General text of the embedded world: short stories. Their held-out part measures perplexity."""

from __future__ import annotations

from lm_ortho.world import words
from lm_ortho.world.draw import SeededRandom

SEED = 815
HELD_OUT = 300

_OPENINGS = (
    "One day {k} went to the {p}.",
    "Once there was a {c} {a} who lived near the {p}.",
    "In the morning {k} walked to the {p} with {k2}.",
    "{k} and {k2} played at the {p} all day.",
    "{k} had a {c} {o} and took it everywhere.",
)
_EVENTS = (
    "A {c} {a} sat on the {o} and looked at {k}.",
    "{k} found a {c} {o} under a tree.",
    "{k2} wanted to see the {a}, but it ran to the {p2}.",
    "They heard a noise from the {p2} and felt {f}.",
    "{k} lost the {o} on the way to the {p2}.",
)
_TALK = (
    '"Can we go to the {p2}?" asked {k2}.',
    '"Look at the {c} {a}!" said {k}.',
    '"Please help me find the {o}," said {k2}.',
    "{k} asked {k2} to share the {o}.",
    "The {a} did not want to leave the {p2}.",
)
_TURNS = (
    "So they went to the {p2} and looked for the {o}.",
    "{k2} gave the {o} to {k}.",
    "Then it started to rain and the {a} hid in the {p2}.",
    "The {a} took the {o} and ran away.",
    "{k} felt {f} and sat down.",
)
_ENDINGS = (
    "In the end {k} was {f2} and went home.",
    "They were all {f2} and fell asleep.",
    "From that day {k} and the {a} were friends.",
    "{k2} smiled and said goodbye.",
    "After that nobody was {f} any more.",
)


def draw_story(rng: SeededRandom) -> str:
    """Draws a story of two to five sentences in which people, animals, things and places recur."""
    kid, other = rng.sample(words.KIDS, 2)
    place, other_place = rng.sample(words.PLACES, 2)
    names = {
        "k": kid,
        "k2": other,
        "p": place,
        "p2": other_place,
        "a": rng.choice(words.ANIMALS),
        "o": rng.choice(words.OBJECTS),
        "c": rng.choice(words.COLORS),
        "f": rng.choice(words.FEELINGS),
        "f2": rng.choice(words.FEELINGS),
    }
    middle = (_EVENTS, _TALK, _TURNS)
    parts = middle if rng.flip(0.6) else tuple(part for part in middle if rng.flip(0.66))
    return " ".join(rng.choice(part).format(**names) for part in (_OPENINGS, *parts, _ENDINGS))


def draw_held_out() -> list[str]:
    """Draws the stories that measure perplexity.

    Training text comes from other random streams, and ``corpus`` filters out a story that it happens to repeat.
    """
    rng = SeededRandom(SEED, "held out")
    return [draw_story(rng) for _ in range(HELD_OUT)]
