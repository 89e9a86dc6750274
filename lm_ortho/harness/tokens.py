"""Token counts and token boundaries under the tokenizer of the evaluated model.

lm-eval returns sums of log-likelihoods only, so a metric per token needs the tokenizer.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from lm_ortho.data.tokenizer import check_prefix_token, describe, describe_vocabulary, find_added_tokens
from lm_ortho.errors import UserError
from lm_ortho.finetune import load_tokenizer
from lm_ortho.finetune.loading import expand_path

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
    """Counts tokens as lm-eval scores them: a context, then a continuation that starts with its own white space.

    ``prefix_token_id`` is the token that lm-eval puts before the first token of a text; None stands for the
    beginning-of-sequence token of the tokenizer, or its end token.
    """

    def __init__(self, tokenizer: Any, max_length: int, prefix_token_id: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.prefix_token_id = default_prefix_token(tokenizer) if prefix_token_id is None else prefix_token_id
        self._encode = lru_cache(maxsize=4096)(self._encode_once)

    def _encode_once(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def describe(self) -> dict[str, Any]:
        """Returns what decides how texts are split, as JSON: the tokenizer and the limits of the model."""
        return {
            "tokenizer": describe_vocabulary(self.tokenizer),
            "special": [self.tokenizer.bos_token, self.tokenizer.eos_token, self.prefix_token_id],
            "max_length": self.max_length,
        }

    def encode(self, text: str) -> tuple[int, ...]:
        """Returns the token ids of a text, without special tokens."""
        return self._encode(text)

    def count(self, context: str, continuation: str) -> int:
        """Returns how many tokens of ``continuation`` lm-eval scores after ``context``."""
        if context:
            return len(self._encode(context + continuation)) - len(self._encode(context))
        tokens = self._encode(continuation)
        # After an empty context, lm-eval takes a leading prefix token of the text as its prefix, and does not score it.
        return len(tokens) - (tokens[:1] == (self.prefix_token_id,))

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


def default_prefix_token(tokenizer: Any) -> int | None:
    """Returns the beginning-of-sequence token of a tokenizer, else its end token, else None."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def resolve(metadata: Mapping[str, Any] | None) -> Tokens:
    """Returns the tokenizer and context length of the evaluated model.

    lm-eval passes the model args to the tasks as metadata. If a ``LibOrthoLM`` or ``BaselineLM`` of this process was
    built with the same ``pretrained`` and ``tokenizer``, or if there are no model args, the newest one is taken for the
    evaluated model. Otherwise the tokenizer is loaded by the name in the metadata.

    Raises:
        UserError: when there is no tokenizer, when it cannot be loaded, and when another model type would score the
            wrong tokens with it.
    """
    metadata = metadata or {}
    lm, pretrained, tokenizer = newest_model(), _name(metadata.get("pretrained")), _name(metadata.get("tokenizer"))
    if lm is not None and (pretrained, tokenizer) in _possible_arguments(lm):
        return Tokens(lm.tokenizer, lm.max_length, lm.prefix_token_id)
    if pretrained is None and tokenizer is None:
        raise UserError(
            "metadata: no tokenizer found. Token counts need one, and neither a model object nor your own task manager "
            "has one; pass metadata={'tokenizer': name} to whichever of the two you build"
        )
    tokens = _load_tokens(tokenizer or pretrained, {**metadata, "pretrained": pretrained})
    if pretrained is not None and not _is_server(metadata):
        check_prefix_token(tokens.tokenizer, tokens.prefix_token_id)
    _check_text_end(tokens.tokenizer, metadata)
    return tokens


def _possible_arguments(lm: Any) -> set[tuple[Any, Any]]:
    """Returns the pairs of ``pretrained`` and ``tokenizer`` in the metadata that mean a registered model.

    Whoever evaluates a model object may name its ``pretrained`` alone.
    """
    pretrained, tokenizer = _name(lm.pretrained_argument), _name(getattr(lm, "tokenizer_argument", None))
    return {(None, None), (pretrained, None), (pretrained, tokenizer)}


def _name(value: Any) -> Any:
    """Returns the name of a model or tokenizer as text where lm-eval parsed it as a whole number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _is_server(metadata: Mapping[str, Any]) -> bool:
    """Returns whether the model args are those of a model behind a server, which encodes texts by itself."""
    return bool(metadata.get("base_url") or metadata.get("model"))


def _check_text_end(tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    """Raises ``UserError`` where lm-eval's ``hf`` or ``vllm`` would score the wrong tokens of an answer.

    Both encode a context and the whole text one by one, each with what the tokenizer adds at its end, and take as the
    answer what is left after as many tokens as the context has. Models behind a server add nothing.
    """
    if _is_server(metadata) or not metadata.get("pretrained") or metadata.get("add_bos_token") is False:
        return
    suffix = find_added_tokens(tokenizer).suffix
    if suffix:
        text = "".join(str(token) for token in tokenizer.convert_ids_to_tokens(list(suffix)))
        raise UserError(
            f"tokenizer={describe(tokenizer)} adds {text!r} after every text, also after a question that its answer "
            "follows, and this model type would score the wrong tokens; use --model libortho, or save the tokenizer "
            "without it (add_eos_token=False) and pass that directory as tokenizer="
        )


def _load_tokens(name: Any, metadata: Mapping[str, Any]) -> Tokens:
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig, PreTrainedTokenizerBase

    location = {key: metadata[key] for key in ("revision", "subfolder", "trust_remote_code") if metadata.get(key)}
    source = name if isinstance(name, str | PreTrainedTokenizerBase) else name.name_or_path
    tokenizer = load_tokenizer(source, **location) if isinstance(source, str) else source
    prefix = metadata.get("prefix_token_id")
    if metadata.get("max_length"):
        return Tokens(tokenizer, int(metadata["max_length"]), prefix)
    model = metadata.get("pretrained") or source
    try:
        config = AutoConfig.from_pretrained(expand_path(model), **location) if isinstance(model, str) else model.config
    except (AttributeError, OSError, ValueError):
        config = None
    return Tokens(tokenizer, resolve_max_length(config, tokenizer), prefix)
