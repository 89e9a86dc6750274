"""Novel subjects: names that nobody carries, to replace a subject of the forget set."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_NEIGHBOURS, _ATTEMPTS = 512, 8


class Lookalikes:
    """Draws words whose tokens are the nearest input embeddings (cosine) of the tokens of a known word.

    Neighbours have the same shape: leading space or not, capital or not. A model has met such names as whole tokens;
    random letters would be a form that it does not know.
    """

    def __init__(self, tokenizer: Any, embeddings: Tensor, known_names: Sequence[str]) -> None:
        """``embeddings`` are (vocabulary, hidden); tokens of ``known_names`` are never drawn."""
        self._tokenizer = tokenizer
        self._unit = torch.nn.functional.normalize(embeddings.detach().float().cpu(), dim=-1)
        tokens = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), len(embeddings)))))
        self._shapes = [_shape(token) for token in tokens]
        self._excluded_ids = {i for name in known_names for word in name.split() for i in self._ids(word)}
        self._neighbours: dict[int, list[int]] = {}

    def draw(self, word: str, draw: random.Random) -> str | None:
        """Another word, or None if no attempt gave one that the tokenizer splits into the drawn tokens again."""
        ids = self._ids(word)
        for _ in range(_ATTEMPTS):
            new_ids = [draw.choice(self._nearest(i) or [i]) for i in ids]
            text = self._tokenizer.decode(new_ids).strip()
            if text.isalpha() and new_ids != ids and self._ids(text) == new_ids:
                return str(text)
        return None

    def single_token_words(self, word: str) -> list[str]:
        """All lookalikes of a word of one token; empty for a longer word."""
        ids = self._ids(word)
        if len(ids) != 1:
            return []
        texts = ((i, str(self._tokenizer.decode([i]).strip())) for i in self._nearest(ids[0]))
        return [text for i, text in texts if text.isalpha() and self._ids(text) == [i]]

    def _ids(self, word: str) -> list[int]:
        return list(self._tokenizer(f" {word}", add_special_tokens=False).input_ids)

    def _nearest(self, token: int) -> list[int]:
        if token not in self._neighbours:
            shape = self._shapes[token]
            order = (self._unit @ self._unit[token]).argsort(descending=True).tolist() if shape else []
            candidates = (i for i in order if i < len(self._shapes) and self._shapes[i] == shape)
            neighbours = (i for i in candidates if i not in self._excluded_ids)
            self._neighbours[token] = [i for i, _ in zip(neighbours, range(_NEIGHBOURS), strict=False)]
        return self._neighbours[token]


def _shape(token: str | None) -> tuple[bool, bool] | None:
    """Whether a token begins a word and whether it has a capital; None for tokens that are not only letters."""
    letters = (token or "").lstrip("\u0120\u2581 ")  # how byte-level BPE and SentencePiece write a space
    if len(letters) < 2 or not letters.isalpha():
        return None
    return letters != token, letters[0].isupper()


def make_novel_subjects(
    known_names: Sequence[str], count: int, seed: int, lookalikes: Lookalikes | None = None
) -> list[str]:
    """``count`` names that nobody carries: each word of a known name replaced by a lookalike.

    Where no lookalike exists, the first half of one known word is joined to the second half of another. The first of
    several words is a known first word.
    """
    draw = random.Random(seed)
    used_names = {name.casefold() for name in known_names}
    used_names |= {word.casefold() for name in known_names for word in name.split()[1:]}
    names: list[str] = []
    attempts = 0
    while len(names) < count:
        words = _draw_words(known_names, draw, lookalikes)
        attempts += 1
        if attempts > 50 * count:  # too few names to recombine (one subject, say): shuffle their letters
            words[-1] = "".join(draw.sample(words[-1], len(words[-1]))).capitalize()
        name = " ".join(words)
        is_new = name.casefold() not in used_names and words[-1].casefold() not in used_names
        if name and (is_new or attempts > 100 * count):
            names.append(name)
    return names


def _draw_words(known_names: Sequence[str], draw: random.Random, lookalikes: Lookalikes | None) -> list[str]:
    """The words of one new name, as many as a known name has."""
    length = len(draw.choice(known_names).split())
    words = []
    for i in range(length):
        one, other = (name.split()[min(i, len(name.split()) - 1)] for name in draw.choices(known_names, k=2))
        if length > 1 and i == 0:
            words.append(one)
            continue
        lookalike = lookalikes.draw(one, draw) if lookalikes else None
        words.append(lookalike or one[: (len(one) + 1) // 2] + other[(len(other) + 1) // 2 :])
    return words
