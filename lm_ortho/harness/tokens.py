"""Token counts and token borders, by the tokenizer of the model that is being measured.

lm-eval returns sums of log-likelihoods only, so whoever wants a value per token has to know the tokenizer.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from lm_ortho.errors import UserError
from lm_ortho.hub import first_line

_live: list[weakref.ref[Any]] = []
"""Every ``LibOrthoLM`` of this process, the newest last; they come before lm-eval loads the tasks."""


def register(lm: Any) -> None:
    """Remembers a model (weakly), for tasks that lm-eval hands no metadata."""
    _live.append(weakref.ref(lm))


def newest_model() -> Any | None:
    """The ``LibOrthoLM`` built last among those still alive."""
    _live[:] = [ref for ref in _live if ref() is not None]
    return _live[-1]() if _live else None


class Tokens:
    """Counts as ``lm_eval`` scores: a context, then a continuation that starts with its own white space."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._encode = lru_cache(maxsize=4096)(self._encode_once)

    def _encode_once(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of a text, without special ones."""
        return self._encode(text)

    def count(self, context: str, continuation: str) -> int:
        """How many tokens of ``continuation`` lm-eval scores after ``context``."""
        if context:
            return len(self._encode(context + continuation)) - len(self._encode(context))
        tokens = self._encode(continuation)
        # After an empty context lm-eval takes a document that starts with the prefix token as its own prefix.
        prefix = self.tokenizer.bos_token_id
        prefix = self.tokenizer.eos_token_id if prefix is None else prefix
        return len(tokens) - (tokens[:1] == (prefix,))

    def is_border(self, text: str, position: int) -> bool:
        """Whether the tokens of ``text[:position]`` are the first tokens of ``text``."""
        start = self._encode(text[:position])
        return self._encode(text)[: len(start)] == start

    def cut(self, context: str, continuation: str) -> tuple[str, str]:
        """The same text in two parts again, cut where a token starts.

        A token that reaches over the border belongs to the continuation: the model is asked with the tokens it would
        have read the whole text in, and pays for all of them that say something of the continuation. lm-eval itself
        takes as many tokens off the whole text as the context alone has, which need not be the same ones.
        """
        whole, border = context + continuation, len(context)
        while border and (whole[border - 1].isspace() or not self.is_border(whole, border)):
            border -= 1
        return whole[:border], whole[border:]

    def span(self, text: str, start: int, end: int, least: int) -> tuple[int, int]:
        """The token borders around ``text[start:end]``: the next one to the left, the next one to the right.

        ``least`` is a position that counts as a border. The white space before a word goes with the word,
        because a context must not end with a space.
        """
        while start > least and (text[start - 1].isspace() or not self.is_border(text, start)):
            start -= 1
        while end < len(text) and not self.is_border(text, end):
            end += 1
        return start, end

    def windows(self, text: str) -> list[tuple[str, str]]:
        """(context, continuation) pairs that score every token of a text once.

        One pair where the text fits the model; else pieces of half the length, each after the one before.
        """
        total = self.count("", text)
        if total <= self.max_length:
            return [("", text)]
        size = self.max_length // 2
        step = max(1, len(text) * size // total)
        pieces, start = [], 0
        while start < len(text):
            end = self._cut(text, start, min(start + step, len(text)), size)
            pieces.append(text[start:end])
            start = end
        return list(zip(["", *pieces], pieces, strict=False))

    def _cut(self, text: str, start: int, end: int, size: int) -> int:
        """A place before white space, at most ``size`` tokens on; inside a word if it must be."""
        while end - start > 1 and self.count("", text[start:end]) > size:
            end -= max(1, (end - start) // 8)
        if end == len(text):
            return end
        word = end
        while word > start and not (text[word].isspace() and not text[word - 1].isspace()):
            word -= 1
        return word if word > start else end


def resolve(metadata: Mapping[str, Any] | None) -> Tokens:
    """The tokenizer and context length of the model under test.

    lm-eval hands tasks the model args as metadata: ``tokenizer`` and ``pretrained`` of them decide. Without
    them the ``LibOrthoLM`` that this process built last, if it is still there, is taken for the one under test.

    Raises:
        UserError: when neither is there, or the tokenizer cannot be loaded.
    """
    given = metadata or {}
    lm, name = newest_model(), given.get("tokenizer") or given.get("pretrained")
    same = not given.get("tokenizer") and lm is not None and name == lm.pretrained_argument
    if lm is not None and (name is None or same):
        return Tokens(lm.tokenizer, lm.max_length)
    if name is None:
        raise UserError(
            "metadata: which tokenizer? Token counts need it, and a model object, or a task manager of your "
            "own, brings none; pass metadata={'tokenizer': name} to whichever of the two you build"
        )
    return _load(name, given)


def _load(name: Any, given: Mapping[str, Any]) -> Tokens:
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

    where = {key: given[key] for key in ("revision", "subfolder", "trust_remote_code") if given.get(key)}
    source = name if isinstance(name, str | PreTrainedTokenizerBase) else name.name_or_path
    try:
        tokenizer = source if not isinstance(source, str) else AutoTokenizer.from_pretrained(source, **where)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer of {source!r} could not be loaded: {first_line(error)}") from None
    if given.get("max_length"):
        return Tokens(tokenizer, int(given["max_length"]))
    model = given.get("pretrained") or source
    try:
        config = AutoConfig.from_pretrained(model, **where) if isinstance(model, str) else model.config
    except (AttributeError, OSError, ValueError):
        config = None
    return Tokens(tokenizer, resolve_max_length(config, tokenizer))
