"""A row of a forget or retain set: its fields, and the context and target that they make."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

QUESTION_TEMPLATE = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Row:
    """One document: a question with its answer, a prompt with its continuation, or plain text.

    ``prompt`` is a verbatim context that replaces the question template; white space at its end becomes part of the
    target. ``secret`` is the part of ``answer`` that nobody can guess. ``subject`` is the name of the person or thing
    that the row is about. ``group`` (the author, for example) is the cluster that a bootstrap resamples.
    """

    question: str = ""
    answer: str = ""
    prompt: str = ""
    text: str = ""
    subject: str = ""
    secret: str = ""
    paraphrased_answer: str = ""
    perturbed_answer: tuple[str, ...] = ()
    group: str = ""

    @property
    def context(self) -> str:
        """The text before the answer; empty for plain text. White space at its end belongs to the target."""
        return self._full_context.rstrip()

    @property
    def target(self) -> str:
        """The text to predict: the white space after the context (or a space) and the answer; or the plain text."""
        if not self.context:
            return self.text
        return (self._full_context[len(self.context) :] or " ") + self.answer

    @property
    def _full_context(self) -> str:
        return self.prompt or (QUESTION_TEMPLATE.format(question=self.question) if self.question else "")

    @property
    def mentions_subject(self) -> bool:
        """Whether the row has a subject that occurs in its own text, word for word."""
        return self.subject_occurs_in(self.context + self.target)

    def subject_occurs_in(self, text: str) -> bool:
        """Returns whether the row has a subject that occurs in ``text``, word for word."""
        return bool(self.subject.strip()) and bool(mention_pattern(self.subject).search(text))

    def as_texts(self) -> dict[str, str]:
        """Returns the text of every field that has one; wrong answers are lines of one text."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: "\n".join(value) if name == "perturbed_answer" else value for name, value in values.items() if value
        }

    def as_dict(self) -> dict[str, Any]:
        """Returns all fields as a dictionary that can be written as JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "perturbed_answer": list(self.perturbed_answer)}


def mention_pattern(name: str) -> re.Pattern[str]:
    """Returns a pattern for mentions of ``name`` in a text: separate words, so Ann is not found in Annapolis.

    An end of the name whose character has no upper and lower case may touch other characters, because scripts without
    case often put no space between words.
    """
    starts_cased, ends_cased = (edge.lower() != edge.upper() for edge in (name[:1], name[-1:]))
    return re.compile((r"(?<!\w)" if starts_cased else "") + re.escape(name) + (r"(?!\w)" if ends_cased else ""))


def replace_mentions(text: str, name: str, other: str) -> str:
    """Returns ``text`` with every mention of ``name`` replaced by ``other``."""
    return mention_pattern(name).sub(lambda _: other, text)
