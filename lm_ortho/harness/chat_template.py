"""What decides how a chat is rendered, in a form that can be compared and hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

_PROBES = (
    [{"role": "user", "content": "Who?"}],
    [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Ada."},
        {"role": "user", "content": "Where?"},
    ],
)
"""Chats that are rendered: options of the model, and dates, change them without changing the template."""


def describe_chat_template(apply: Callable[..., str]) -> dict[str, Any]:
    """Returns the template, its options and two rendered chats of the model whose ``apply_chat_template`` this is."""
    lm = getattr(apply, "__self__", None)
    tokenizer = getattr(lm, "tokenizer", None)
    return {
        "template": getattr(tokenizer, "chat_template", None),
        "options": getattr(lm, "chat_template_args", None),
        "chats": [_render(apply, chat) for chat in _PROBES],
    }


def _render(apply: Callable[..., str], chat: list[dict[str, str]]) -> str:
    """Returns the rendered chat, or the kind of error for a template that refuses it."""
    try:
        return str(apply([dict(message) for message in chat], add_generation_prompt=True))
    except Exception as error:  # templates raise errors of their own
        return f"refused: {type(error).__name__}"


def hash_json(content: Any) -> str:
    """Returns the SHA-256 of content that JSON can hold; anything else counts by its text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
