"""Rows as a chat model is asked: the question as a message of the user, in the template of the tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from lm_ortho.hub import first_line

log = logging.getLogger(__name__)

FORMS = ("auto", "plain", "chat", "both")


@dataclass(frozen=True)
class ChatRow(Row):
    """A row whose context and target are what the model is given, character by character."""

    given: str = ""
    wanted: str = ""

    @property
    def context(self) -> str:
        """The rendered messages up to where the model answers."""
        return self.given

    @property
    def target(self) -> str:
        """The answer, as it follows."""
        return self.wanted


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer says how a chat is written."""
    return bool(getattr(tokenizer, "chat_template", None))


def render_forms(rows: Sequence[Row], tokenizer: Any, form: str) -> list[Row]:
    """The rows as ``form`` asks for them: plain, in the chat template, or both; auto is both where there is one.

    Both, because what was only forgotten in one form may still be told in the other. Rows without a question (text,
    a verbatim prompt) have one form.

    Raises:
        UserError: for an unknown form, for ``chat`` without a template, and for a template that fails.
    """
    if form not in FORMS:
        raise UserError(f"prompts={form!r} is unknown; known: {', '.join(FORMS)}")
    there = has_chat_template(tokenizer)
    if form in ("chat", "both") and not there:
        raise UserError(f"prompts={form!r}: the tokenizer has no chat template; use prompts=plain")
    if form == "plain" or not there:
        return list(rows)
    turns = [as_turn(row, tokenizer) if row.question and not row.prompt else row for row in rows]
    if form == "chat":
        return turns
    return [*rows, *(turn for turn, row in zip(turns, rows, strict=True) if turn is not row)]


def as_turn(row: Row, tokenizer: Any) -> ChatRow:
    """The question as the one message of a chat, and the answer after the opening of the assistant's turn."""
    messages = [{"role": "user", "content": row.question}]
    try:
        given = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # jinja2 and the template's own raise_exception have no common base
        raise UserError(
            f"prompts: the chat template of the tokenizer fails ({first_line(error)}); use prompts=plain"
        ) from None
    return ChatRow(**{field.name: getattr(row, field.name) for field in fields(Row)}, given=given, wanted=row.answer)
