"""Token counts and token boundaries under the tokenizer of the evaluated model.

lm-eval returns sums of log-likelihoods only, so a metric per token needs the tokenizer.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from lm_ortho.errors import UserError
from lm_ortho.hub import first_line

_models: list[weakref.ref[Any]] = []
"""Every ``LibOrthoLM`` of this process, the newest last. They are built before lm-eval loads the tasks."""


def register(lm: Any) -> None:
    """Registers a model by a weak reference, for tasks that get no metadata from lm-eval."""
    _models.append(weakref.ref(lm))


def newest_model() -> Any | None:
    """Returns the most recently built ``LibOrthoLM`` that is still alive, or None."""
    _models[:] = [ref for ref in _models if ref() is not None]
    return _models[-1]() if _models else None


class Tokens:
    """Counts tokens as lm-eval scores them: a context, then a continuation that starts with its own white space."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._encode = lru_cache(maxsize=4096)(self._encode_once)

    def _encode_once(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def encode(self, text: str) -> tuple[int, ...]:
        """Returns the token ids of a text, without special tokens."""
        return self._encode(text)

    def count(self, context: str, continuation: str) -> int:
        """Returns how many tokens of ``continuation`` lm-eval scores after ``context``."""
        if context:
            return len(self._encode(context + continuation)) - len(self._encode(context))
        tokens = self._encode(continuation)
        # After an empty context, lm-eval takes a leading prefix token of the text as its prefix, and does not score it.
        prefix = self.tokenizer.bos_token_id
        prefix = self.tokenizer.eos_token_id if prefix is None else prefix
        return len(tokens) - (tokens[:1] == (prefix,))

    def is_boundary(self, text: str, position: int) -> bool:
        """Returns whether the tokens of ``text[:position]`` are the first tokens of ``text``."""
        start = self._encode(text[:position])
        return self._encode(text)[: len(start)] == start

    def split_at_boundary(self, context: str, continuation: str) -> tuple[str, str]:
        """Splits the concatenated text into (context, continuation) again, at the start of a token.

        A token that straddles the boundary belongs to the continuation. The model then reads the tokens of the whole
        text, and every token that contains a part of the continuation is scored. lm-eval itself removes as many tokens
        from the whole text as the context alone has, which may be different tokens.
        """
        text, boundary = context + continuation, len(context)
        while boundary and (text[boundary - 1].isspace() or not self.is_boundary(text, boundary)):
            boundary -= 1
        return text[:boundary], text[boundary:]

    def expand_to_boundaries(self, text: str, start: int, end: int, *, min_start: int) -> tuple[int, int]:
        """Expands ``text[start:end]`` to the next token boundaries on its left and right; returns (start, end).

        ``min_start`` counts as a boundary. The white space before a word belongs to the word, because a context must
        not end with a space.
        """
        while start > min_start and (text[start - 1].isspace() or not self.is_boundary(text, start)):
            start -= 1
        while end < len(text) and not self.is_boundary(text, end):
            end += 1
        return start, end

    def split_into_windows(self, text: str) -> list[tuple[str, str]]:
        """Returns (context, continuation) pairs that together score every token of a text once.

        This is a single pair if the text fits the context length of the model. Otherwise the text is split into pieces
        of half that length, and each piece has the previous one as its context.
        """
        total = self.count("", text)
        if total <= self.max_length:
            return [("", text)]
        size = self.max_length // 2
        step = max(1, len(text) * size // total)
        pieces, start = [], 0
        while start < len(text):
            end = self._find_split(text, start=start, end=min(start + step, len(text)), max_tokens=size)
            pieces.append(text[start:end])
            start = end
        return list(zip(["", *pieces], pieces, strict=False))

    def _find_split(self, text: str, *, start: int, end: int, max_tokens: int) -> int:
        """Returns a position before white space at most ``max_tokens`` after ``start``, inside a word if need be."""
        while end - start > 1 and self.count("", text[start:end]) > max_tokens:
            end -= max(1, (end - start) // 8)
        if end == len(text):
            return end
        word = end
        while word > start and not (text[word].isspace() and not text[word - 1].isspace()):
            word -= 1
        return word if word > start else end


def resolve(metadata: Mapping[str, Any] | None) -> Tokens:
    """Returns the tokenizer and context length of the evaluated model.

    lm-eval passes the model args to the tasks as metadata; their ``tokenizer`` and ``pretrained`` decide. Without
    them, the ``LibOrthoLM`` that this process built last is taken for the evaluated model, if it is still alive.

    Raises:
        UserError: when neither is available, or the tokenizer cannot be loaded.
    """
    metadata = metadata or {}
    lm, name = newest_model(), metadata.get("tokenizer") or metadata.get("pretrained")
    is_newest = not metadata.get("tokenizer") and lm is not None and name == lm.pretrained_argument
    if lm is not None and (name is None or is_newest):
        return Tokens(lm.tokenizer, lm.max_length)
    if name is None:
        raise UserError(
            "metadata: no tokenizer found. Token counts need one, and neither a model object nor your own task manager "
            "has one; pass metadata={'tokenizer': name} to whichever of the two you build"
        )
    return _load_tokens(name, metadata)


def _load_tokens(name: Any, metadata: Mapping[str, Any]) -> Tokens:
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

    location = {key: metadata[key] for key in ("revision", "subfolder", "trust_remote_code") if metadata.get(key)}
    source = name if isinstance(name, str | PreTrainedTokenizerBase) else name.name_or_path
    try:
        tokenizer = source if not isinstance(source, str) else AutoTokenizer.from_pretrained(source, **location)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer of {source!r} could not be loaded: {first_line(error)}") from None
    if metadata.get("max_length"):
        return Tokens(tokenizer, int(metadata["max_length"]))
    model = metadata.get("pretrained") or source
    try:
        config = AutoConfig.from_pretrained(model, **location) if isinstance(model, str) else model.config
    except (AttributeError, OSError, ValueError):
        config = None
    return Tokens(tokenizer, resolve_max_length(config, tokenizer))
