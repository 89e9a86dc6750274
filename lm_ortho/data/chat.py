"""Rows in the chat template of a tokenizer: the question as the user's message, the answer as the assistant's."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from types import FrameType
from typing import Any

from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from lm_ortho.hub import first_line

log = logging.getLogger(__name__)

FORMS = ("auto", "plain", "chat", "both")
MAX_SECONDS = 10.0
"""Processor time of a chat template for one row; templates of published models take less than a millisecond."""
MAX_CHARACTERS = 100_000
"""Characters of a rendered row; a document is cut after 512 tokens, so longer ones have no room for an answer."""


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


def render_forms(
    rows: Sequence[Row],
    tokenizer: Any,
    form: str,
    *,
    system_instruction: str = "",
    chat_template_args: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Returns the rows in the requested form: ``plain``, ``chat`` (in the chat template), ``both`` or ``auto``.

    ``auto`` is ``both`` if the tokenizer has a chat template, else ``plain``. The reason for ``both``: an answer that
    was forgotten in one form only can still be extracted in the other. Rows without a question (plain text, verbatim
    prompts) have one form. The other arguments are those of ``render_turn``.

    Raises:
        UserError: for an unknown form, for ``chat`` or ``both`` without a template, for a template that fails, and for
            a system instruction that no chat would show.
    """
    if form not in FORMS:
        raise UserError(f"prompts={form!r} is unknown; known: {', '.join(FORMS)}")
    has_template = has_chat_template(tokenizer)
    if form in ("chat", "both") and not has_template:
        raise UserError(f"prompts={form!r}: the tokenizer has no chat template; use prompts=plain")
    if form == "plain" or not has_template:
        if system_instruction:
            reason = "prompts=plain makes no chat" if has_template else "the tokenizer has no chat template"
            raise UserError(f"system_instruction: {reason}; leave it out")
        return list(rows)
    render = partial(
        render_turn,
        tokenizer=tokenizer,
        system_instruction=system_instruction,
        chat_template_args=chat_template_args,
    )
    turns = [render(row) if row.question and not row.prompt else row for row in rows]
    if form == "chat":
        return turns
    return [*rows, *(turn for turn, row in zip(turns, rows, strict=True) if turn is not row)]


def render_turn(
    row: Row,
    tokenizer: Any,
    *,
    system_instruction: str = "",
    chat_template_args: Mapping[str, Any] | None = None,
) -> ChatRow:
    """Returns the row as a chat: the question as the only user message, then the answer in the assistant's turn.

    ``system_instruction`` is the message of the system before the question, if there is one, and
    ``chat_template_args`` are variables of the template (``date_string``, ``enable_thinking``): the same as
    ``--system_instruction`` and the model arg ``chat_template_args`` of lm-eval. A template comes with the model and is
    code: transformers runs it in the sandbox of Jinja, without access to Python.

    Raises:
        UserError: if the chat template fails, does not end, or gives text without the question or the system
            instruction, or text that is not valid or far too long.
    """
    options = dict(chat_template_args or {})
    question = [{"role": "user", "content": row.question}]
    system = [{"role": "system", "content": system_instruction}] if system_instruction else []
    try:
        context = _render(tokenizer, [*system, *question], options)
    except Exception as error:  # jinja2 and the template's own raise_exception have no common base
        if system and _renders(tokenizer, question, options):
            raise UserError(
                f"system_instruction: the chat template of the tokenizer refuses a system message "
                f"({first_line(error)}); leave it out"
            ) from None
        raise UserError(
            f"prompts: the chat template of the tokenizer fails ({first_line(error)}); use prompts=plain"
        ) from None
    _check_context(context, row.question)
    if system and not _contains(context, system_instruction):
        raise UserError("system_instruction: the chat template of the tokenizer leaves it out; leave it out as well")
    row_fields = {field.name: getattr(row, field.name) for field in fields(Row)}
    return ChatRow(**row_fields, rendered_context=context, rendered_target=row.answer)


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> str:
    _refuse_powers(tokenizer.get_chat_template(options.get("chat_template")))
    with _processor_time_limit(MAX_SECONDS):
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))


def _renders(tokenizer: Any, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> bool:
    try:
        return bool(_render(tokenizer, messages, options))
    except Exception:  # whatever a template raises
        return False


def _check_context(context: str, question: str) -> None:
    """Raises ``UserError`` for a rendered row that cannot be a prompt; compares without case and white space."""
    problem = ""
    if len(context) > MAX_CHARACTERS:
        problem = f"makes {len(context)} characters of one question, more than {MAX_CHARACTERS}"
    elif any("\ud800" <= character <= "\udfff" for character in context):
        problem = "makes half of a surrogate pair, which is not valid text"
    elif not _contains(context, question):
        problem = "leaves out or changes the question"
    if problem:
        raise UserError(f"prompts: the chat template of the tokenizer {problem}; use prompts=plain")


def _contains(context: str, message: str) -> bool:
    """Returns whether a rendered chat has the message, without regard to case and white space."""
    forms = (message, json.dumps(message, ensure_ascii=False)[1:-1])  # some templates write messages as JSON
    return any(_simplify(form) in _simplify(context) for form in forms)


def _simplify(text: str) -> str:
    return " ".join(text.split()).casefold()


@contextmanager
def _processor_time_limit(seconds: float) -> Iterator[None]:
    """Raises ``TimeoutError`` inside a template that needs more processor time; Jinja limits single loops only.

    A trace function checks the time at each line of the compiled template, in any thread and on every platform. It
    costs 60 microseconds per row. A single operation, such as the repetition of a long text, is not interrupted.
    """
    end = time.thread_time() + seconds

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != "<template>":  # as Jinja names the code that it compiles from a string
            return None
        if time.thread_time() > end:
            raise TimeoutError(f"it does not end within {seconds:g} seconds")
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)


@lru_cache(maxsize=8)
def _refuse_powers(template: str) -> None:
    """Raises ``ValueError`` for ``a ** b``, a single operation that may take for ever; ``f(**names)`` is allowed."""
    from jinja2 import Environment

    previous = ""
    for _, kind, text in Environment().lex(template):
        if kind == "operator" and text == "**" and previous not in ("(", ","):
            raise ValueError("it computes a power, which may never end")
        if kind != "whitespace":
            previous = text
