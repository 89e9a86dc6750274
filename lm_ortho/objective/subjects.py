"""Names that nobody carries, to put in the place of a subject."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_NEAREST, _TRIES = 512, 8


class Lookalikes:
    """Words that differ from a given one in every token, each token replaced by one that the model holds to be alike.

    Alike are the nearest input embeddings (cosine) among tokens of the same shape: leading space or not, capital or
    not. A model has met such names as whole tokens; letters thrown together would be a form it does not know.
    """

    def __init__(self, tokenizer: Any, embeddings: Tensor, known: Sequence[str]) -> None:
        """``embeddings`` (vocabulary, hidden); no token of a ``known`` name is ever put in."""
        self._tokenizer = tokenizer
        self._unit = torch.nn.functional.normalize(embeddings.detach().float().cpu(), dim=-1)
        tokens = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), len(embeddings)))))
        self._shapes = [_shape(token) for token in tokens]
        self._barred = {i for name in known for word in name.split() for i in self._ids(word)}
        self._near: dict[int, list[int]] = {}

    def draw(self, word: str, draw: random.Random) -> str | None:
        """Another word, or None when none was found that the tokenizer reads back as it was put together."""
        ids = self._ids(word)
        for _ in range(_TRIES):
            found = [draw.choice(self._nearest(i) or [i]) for i in ids]
            text = self._tokenizer.decode(found).strip()
            if text.isalpha() and found != ids and self._ids(text) == found:
                return str(text)
        return None

    def single(self, word: str) -> list[str]:
        """All words of one token that are alike to ``word``; none if that is longer itself."""
        ids = self._ids(word)
        if len(ids) != 1:
            return []
        texts = ((i, str(self._tokenizer.decode([i]).strip())) for i in self._nearest(ids[0]))
        return [text for i, text in texts if text.isalpha() and self._ids(text) == [i]]

    def _ids(self, word: str) -> list[int]:
        return list(self._tokenizer(f" {word}", add_special_tokens=False).input_ids)

    def _nearest(self, token: int) -> list[int]:
        if token not in self._near:
            shape = self._shapes[token]
            order = (self._unit @ self._unit[token]).argsort(descending=True).tolist() if shape else []
            alike = (i for i in order if i < len(self._shapes) and self._shapes[i] == shape and i not in self._barred)
            self._near[token] = [i for i, _ in zip(alike, range(_NEAREST), strict=False)]
        return self._near[token]


def _shape(token: str | None) -> tuple[bool, bool] | None:
    """Whether a token begins a word and with a capital; None for anything but letters."""
    letters = (token or "").lstrip("\u0120\u2581 ")  # how byte-level BPE and SentencePiece write a space
    if len(letters) < 2 or not letters.isalpha():
        return None
    return letters != token, letters[0].isupper()


def novel_subjects(known: Sequence[str], count: int, seed: int, lookalikes: Lookalikes | None = None) -> list[str]:
    """``count`` names nobody carries: the words of one known name each replaced by one alike.

    Where no lookalike is found, a word crosses the first half of one known word with the second half of another.
    The first of several words is one of those at hand.
    """
    draw = random.Random(seed)
    taken = {name.casefold() for name in known} | {word.casefold() for name in known for word in name.split()[1:]}
    result: list[str] = []
    attempts = 0
    while len(result) < count:
        pattern = draw.choice(known).split()
        words = []
        for i in range(len(pattern)):
            pool = [name.split()[min(i, len(name.split()) - 1)] for name in draw.choices(known, k=2)]
            if len(pattern) > 1 and i == 0:
                words.append(pool[0])
                continue
            alike = lookalikes.draw(pool[0], draw) if lookalikes else None
            words.append(alike or pool[0][: (len(pool[0]) + 1) // 2] + pool[1][(len(pool[1]) + 1) // 2 :])
        attempts += 1
        if attempts > 50 * count:  # too few names to cross (one subject, say): their letters in another order
            words[-1] = "".join(draw.sample(words[-1], len(words[-1]))).capitalize()
        name = " ".join(words)
        fresh = name.casefold() not in taken and words[-1].casefold() not in taken
        if name and (fresh or attempts > 100 * count):
            result.append(name)
    return result
