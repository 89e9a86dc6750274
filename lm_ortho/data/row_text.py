"""Normalises the text of rows: stray white space and other encodings of the same character change what is measured.

A model that was taught " Ada." finds "  Ada.", " Ada.\\n" or a decomposed accent unlikely, so a set that it remembers
would look forgotten. docs/rows.md lists for users what is changed and what is not.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import Any

from lm_ortho.data.row import Row

INVISIBLE = "\ufeff\u200b\u2060"
"""Characters without width that are no white space: byte-order mark, zero-width space, word joiner."""
BLANK = "".join(filter(str.isspace, map(chr, range(0x3001)))) + INVISIBLE
"""Everything that is removed at the ends of a text; U+3000 is the last white space of Unicode."""
LINE_END = re.compile("\r\n?|[\x85\u2028\u2029]")
"""The line ends of the Unicode Standard, section 5.8, other than the line feed itself."""
_IDEOGRAPHIC_SPACE = "\u3000"
_OTHER_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
"""Spaces (category Zs) other than the usual and the ideographic one: no-break, thin, of fixed width."""
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
"""Control characters other than tab, line ends and form feeds."""
MAX_MARKS = 30
"""Largest number of combining characters in a row: the Stream-Safe Text Format of Unicode, UAX #15, section 13."""
_STRIPPED_FIELDS = ("question", "answer", "subject", "secret", "paraphrased_answer", "group")


def normalise_row(row: Row) -> tuple[Row, set[str]]:
    """Returns the row with normalised text, and what was changed in it (nothing for most rows).

    A second call changes nothing. White space at the end of a prompt stays, because it becomes part of the target.
    """
    changes = set[str]()
    # 1. The same encoding of line ends, accents and spaces in all fields.
    values = {
        name: _normalise_characters(value, changes)
        if isinstance(value, str)
        else tuple(_normalise_characters(text, changes) for text in value)
        for name, value in row.as_dict().items()
    }
    # 2. White space at the ends, where it has no meaning.
    stripped = _strip_fields(values)
    if stripped != values:
        changes.add("white space at the ends")
    return (Row(**stripped) if changes else row), changes


def find_invalid_character(text: str) -> str:
    """Returns why ``text`` is not valid, with the code of the character at fault; an empty string for valid text.

    JSON can hold half a surrogate pair, but a tokenizer cannot encode it. A control character in a text is a trace of
    a broken conversion, and a terminal that shows it may obey it.
    """
    if text.isascii() and text.isprintable():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair (U+{ord(text[error.start]):04X}), which is not valid text"
    match = _CONTROL.search(text)
    if match:
        return f"the control character U+{ord(match[0]):04X}; remove it"
    return f"more than {MAX_MARKS} accents on one letter" if _long_run_of_marks().search(text) else ""


@cache
def _long_run_of_marks() -> re.Pattern[str]:
    """Returns a pattern for more combining characters in a row than ``MAX_MARKS``."""
    marks = "".join(filter(unicodedata.combining, map(chr, range(0x20000))))  # none is above
    return re.compile(f"[{marks}]{{{MAX_MARKS + 1}}}")


def _normalise_characters(text: str, changes: set[str]) -> str:
    """Returns ``text`` with line feeds, composed characters (NFC) and usual spaces; adds the kinds of its changes."""
    if text.isascii() and "\r" not in text:
        return text
    # 1. Line ends of Windows, of old Macs and of web pages become line feeds.
    lines = LINE_END.sub("\n", text)
    # 2. A letter and its accent become one character. (The time of long runs of accents grows with their square.)
    composed = lines if _long_run_of_marks().search(lines) else unicodedata.normalize("NFC", lines)
    # 3. No-break and typographic spaces become spaces; the ideographic one stays in text of its scripts.
    spaced = _OTHER_SPACE.sub(" ", composed)
    if _IDEOGRAPHIC_SPACE in spaced and not _has_wide_letters(spaced):
        spaced = spaced.replace(_IDEOGRAPHIC_SPACE, " ")
    steps = {"line ends": (text, lines), "Unicode form": (lines, composed), "other kinds of space": (composed, spaced)}
    changes.update(name for name, (before, after) in steps.items() if before != after)
    return spaced


def _has_wide_letters(text: str) -> bool:
    """Returns whether a character is as wide as Chinese, Japanese and Korean ones are."""
    return any(unicodedata.east_asian_width(char) in "WF" for char in text if char != _IDEOGRAPHIC_SPACE)


def _strip_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields without white space at their ends, except where it is layout."""
    fields = {name: values[name].strip(BLANK) for name in _STRIPPED_FIELDS}
    # Empty wrong answers are missing values.
    wrong_answers = tuple(filter(None, (answer.strip(BLANK) for answer in values["perturbed_answer"])))
    # An indented answer below a prompt: the white space between them is layout, and belongs to the prompt.
    prompt = values["prompt"]
    if prompt.strip(BLANK) and fields["answer"]:
        lead, tail = _leading_blank(values["answer"]), _leading_blank(prompt[::-1])
        prompt += lead if "\n" in lead + tail else ""
    stripped = {"text": _strip_text(values["text"]), "prompt": _strip_invisible(prompt)}
    return {**values, **fields, **stripped, "perturbed_answer": wrong_answers}


def _strip_text(text: str) -> str:
    """Returns plain text without white space at its ends; indentation stays where other lines are indented, too."""
    body = text.strip(BLANK)
    if not any(line[:1] in (" ", "\t") for line in body.split("\n")[1:]):
        return body
    indentation = _leading_blank(text).rpartition("\n")[2]
    return _strip_invisible(indentation + body)


def _strip_invisible(text: str) -> str:
    """Returns ``text`` without the invisible characters among the white space at its ends."""
    body = text.strip(BLANK)
    if not body:
        return ""
    start = len(_leading_blank(text))
    ends = text[:start], text[start + len(body) :]
    lead, tail = ("".join(char for char in end if char not in INVISIBLE) for end in ends)
    return lead + body + tail


def _leading_blank(text: str) -> str:
    return text[: len(text) - len(text.lstrip(BLANK))]
