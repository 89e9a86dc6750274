"""The one place that asks what a tokenizer adds to a text, and that turns texts into token ids.

A tokenizer may add tokens of its own at either end of a text: a beginning-of-sequence token, an end token
(``LlamaTokenizer(add_eos_token=True)``), a separator or the code of a language. What it adds at the end belongs to a
complete text only. A prompt must not have it, and a text that is split into context and continuation must have it at
most once, after the continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_ortho.errors import UserError

_PROBES = ("a", "Question: Who was it?\nAnswer: It was 7.")
"""Texts whose encodings show what the tokenizer adds; two, because what it adds must not depend on the text."""


@dataclass(frozen=True)
class AddedTokens:
    """Token ids that a tokenizer adds before (``prefix``) and after (``suffix``) every text.

    ``starts`` are the ids that a text may begin with already, as a rendered chat does; such a text gets no prefix.
    """

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()

    def add_prefix(self, ids: Sequence[int], *starts: int | None) -> list[int]:
        """Returns ``ids`` after the prefix, unless they begin with one of ``self.starts`` or of ``starts``."""
        has_prefix = bool(ids) and ids[0] in (*self.starts, *starts)
        return list(ids) if has_prefix else [*self.prefix, *ids]


def find_added_tokens(tokenizer: Any) -> AddedTokens:
    """Returns what the tokenizer adds to a text, measured on two texts.

    Raises:
        UserError: if it adds other tokens to one text than to the other, or changes the tokens of the text itself; if
            it has no vocabulary.
    """
    if not tokenizer.encode(_PROBES[-1], add_special_tokens=False):
        raise UserError(
            f"tokenizer={describe(tokenizer)} makes no token of a text, so it has no vocabulary; complete its files "
            "(tokenizer.json or tokenizer.model)"
        )
    measurements = {_compare_encodings(tokenizer, text) for text in _PROBES}
    if len(measurements) != 1 or None in measurements:
        raise UserError(
            f"tokenizer={describe(tokenizer)}: the tokens that it adds to a text depend on the text, so prompts and "
            "answers cannot be told apart; use a tokenizer that adds the same ones to every text, or none"
        )
    ((prefix, suffix),) = filter(None, measurements)
    starts = (prefix[:1] if prefix else ()) + (() if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,))
    return AddedTokens(prefix, suffix, starts)


def _compare_encodings(tokenizer: Any, text: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns (prefix, suffix) of one text; None if its own tokens are not in its encoding."""
    body = tokenizer.encode(text, add_special_tokens=False)
    ids = tokenizer.encode(text)
    for start in range(len(ids) - len(body) + 1):
        if ids[start : start + len(body)] == body:
            return tuple(ids[:start]), tuple(ids[start + len(body) :])
    return None


def find_end_tokens(tokenizer: Any, added: AddedTokens) -> tuple[int, ...]:
    """Returns the ids that close a complete text: what the tokenizer adds itself, else its end token, else nothing."""
    if added.suffix:
        return added.suffix
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def encode_prompt(tokenizer: Any, text: str, added: AddedTokens, *starts: int | None) -> list[int]:
    """Returns the ids of a text that something may follow: with the prefix, without the suffix of the tokenizer.

    ``starts`` as in ``AddedTokens.add_prefix``.
    """
    return added.add_prefix(tokenizer.encode(text, add_special_tokens=False), *starts)


def check_fast(tokenizer: Any) -> None:
    """Raises ``UserError`` for a slow tokenizer, which gives no character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"tokenizer={describe(tokenizer)} gives no character offsets; a fast tokenizer is needed")


def encode_with_offsets(
    tokenizer: Any, texts: Sequence[str], added: AddedTokens
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Returns the ids of each text as ``encode_prompt`` does, and the characters that each token covers.

    The tokenizer is a fast one.
    """
    if not texts:
        return []
    encoding = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    result = []
    for body, offsets in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        ids = added.add_prefix(body)
        result.append((ids, [(0, 0)] * (len(ids) - len(body)) + [tuple(pair) for pair in offsets]))
    return result


def check_prefix_token(tokenizer: Any, prefix_token_id: Any) -> None:
    """Raises ``UserError`` without a token that can stand before the first token of a text, and for an unknown id."""
    if prefix_token_id is None:
        raise UserError(
            f"tokenizer={describe(tokenizer)} has neither a beginning-of-sequence nor an end token, and the first "
            "token of a text needs one before it; pass prefix_token_id=ID with a token id that the model was trained "
            "to read there, or set bos_token in tokenizer_config.json"
        )
    if type(prefix_token_id) is not int or not 0 <= prefix_token_id < count_ids(tokenizer):
        raise UserError(
            f"prefix_token_id={prefix_token_id!r:.80}: expected the id of a token, 0 to {count_ids(tokenizer) - 1}"
        )


def count_ids(tokenizer: Any) -> int:
    """Returns the highest token id plus one: a vocabulary may have holes, so it can be more than the tokens."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def describe_vocabulary(tokenizer: Any) -> Any:
    """Returns all that decides the tokens of a text, as JSON: the settings of a fast tokenizer, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend else sorted(tokenizer.get_vocab().items())


def describe(tokenizer: Any) -> str:
    """Returns the name or path of a tokenizer for messages, or the name of its class."""
    return repr(str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__))
