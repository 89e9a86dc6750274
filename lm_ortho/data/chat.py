"""Rows in the chat template of a tokenizer: the question as the user's message, the answer as the assistant's."""

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
    """A row whose context and target are final text, used as they are."""

    rendered_context: str = ""
    rendered_target: str = ""

    @property
    def context(self) -> str:
        """The rendered messages up to where the answer starts."""
        return self.rendered_context

    @property
    def target(self) -> str:
        """The answer, with the white space before it if there is any."""
        return self.rendered_target


def has_chat_template(tokenizer: Any) -> bool:
    """Returns whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render_forms(rows: Sequence[Row], tokenizer: Any, form: str) -> list[Row]:
    """Returns the rows in the requested form: ``plain``, ``chat`` (in the chat template), ``both`` or ``auto``.

    ``auto`` is ``both`` if the tokenizer has a chat template, else ``plain``. The reason for ``both``: an answer that
    was forgotten in one form only can still be extracted in the other. Rows without a question (plain text, verbatim
    prompts) have one form.

    Raises:
        UserError: for an unknown form, for ``chat`` or ``both`` without a template, and for a template that fails.
    """
    if form not in FORMS:
        raise UserError(f"prompts={form!r} is unknown; known: {', '.join(FORMS)}")
    has_template = has_chat_template(tokenizer)
    if form in ("chat", "both") and not has_template:
        raise UserError(f"prompts={form!r}: the tokenizer has no chat template; use prompts=plain")
    if form == "plain" or not has_template:
        return list(rows)
    turns = [render_turn(row, tokenizer) if row.question and not row.prompt else row for row in rows]
    if form == "chat":
        return turns
    return [*rows, *(turn for turn, row in zip(turns, rows, strict=True) if turn is not row)]


def render_turn(row: Row, tokenizer: Any) -> ChatRow:
    """Returns the row as a chat: the question as the only user message, then the answer in the assistant's turn.

    Raises:
        UserError: if the chat template fails.
    """
    messages = [{"role": "user", "content": row.question}]
    try:
        context = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # jinja2 and the template's own raise_exception have no common base
        raise UserError(
            f"prompts: the chat template of the tokenizer fails ({first_line(error)}); use prompts=plain"
        ) from None
    row_fields = {field.name: getattr(row, field.name) for field in fields(Row)}
    return ChatRow(**row_fields, rendered_context=context, rendered_target=row.answer)
