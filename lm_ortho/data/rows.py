"""The reader of rows: every file, data set of the hub and task with rows of a user is read by the functions below."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_ortho.data.row import QUESTION_TEMPLATE, Row, mention_pattern, replace_mentions
from lm_ortho.data.row_files import (
    FIELDS,
    MAX_BYTES,
    Record,
    check_file,
    describe_keys,
    parse_json,
    read_records,
    suggest_names,
)
from lm_ortho.data.row_text import BLANK, find_invalid_character, normalise_row
from lm_ortho.dial import parse_named_values
from lm_ortho.errors import UserError
from lm_ortho.hub import first_line
from lm_ortho.streams import DEFAULT_MEMORY, is_valid_memory_name

__all__ = [
    "MAX_CHARACTERS",
    "MAX_ROWS",
    "QUESTION_TEMPLATE",
    "Row",
    "drop_forget_rows",
    "is_file",
    "mention_pattern",
    "parse_rows",
    "read_forget_sets",
    "read_rows",
    "replace_mentions",
    "write_rows",
]

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only

MAX_ROWS = 2**20
"""Largest number of rows of one source."""
MAX_CHARACTERS = 2**22
"""Largest number of characters of one row."""


# --- One row


def _make_row(record: Any, location: str) -> Row:
    """Returns the row of one record as it is written; ``location`` begins the error messages.

    Raises:
        UserError: for a record that is no object, and for fields of another type.
    """
    # 1. Take the fields of a row; other keys and nulls are ignored.
    if not isinstance(record, Mapping):
        raise UserError(
            f"{location}: expected an object with question and answer (or text), found {_describe_type(record)}"
        )
    values = {name: record[name] for name in FIELDS if record.get(name) is not None}
    wrong_answers = values.pop("perturbed_answer", ())
    # 2. Check their types.
    for name, value in values.items():
        if not isinstance(value, str):
            raise UserError(f"{location}: {name} must be a string, found {_describe_type(value)}")
    if isinstance(wrong_answers, str):
        wrong_answers = [wrong_answers]
    is_list = isinstance(wrong_answers, list | tuple)
    if not is_list or any(not isinstance(answer, str) for answer in wrong_answers):
        raise UserError(f"{location}: perturbed_answer must be a list of strings")
    row = Row(**values, perturbed_answer=tuple(wrong_answers))
    # 3. Check that the row is a question (or prompt) with an answer, or plain text.
    has_context = bool(row.question.strip(BLANK) or row.prompt.strip(BLANK))
    if not (has_context and row.answer.strip(BLANK)) and (has_context or not row.text.strip(BLANK)):
        raise UserError(
            f"{location}: a row needs a non-empty question (or prompt) with answer, or text; "
            f"found keys {describe_keys(record)}{suggest_names(record)}"
        )
    return row


def _describe_type(value: Any) -> str:
    """Returns the type of a value in the words of JSON; the value itself may be private."""
    if isinstance(value, bool):
        return "true or false"
    if value is None:
        return "null"
    if isinstance(value, float) and math.isnan(value):
        return "NaN; leave out a field that has no value"
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", Mapping: "an object"}
    return next((text for kind, text in kinds.items() if isinstance(value, kind)), type(value).__name__)


def _check_text(row: Row, location: str) -> int:
    """Checks the text of a row, and that the secret is in the answer; returns the number of characters of the row."""
    texts = row.as_texts()
    length = sum(map(len, texts.values()))
    if length > MAX_CHARACTERS:
        raise UserError(f"{location}: the row has more than {MAX_CHARACTERS} characters; split it")
    for name, text in texts.items():
        if problem := find_invalid_character(text):
            raise UserError(f"{location}: {name} holds {problem}")
    if row.secret not in row.answer:
        raise UserError(f"{location}: secret does not occur in answer; it must be a part of it, word for word")
    return length


def _make_rows(records: Iterable[Record], source: str, normalise: bool = True) -> tuple[Row, ...]:
    """Returns the rows of the records, and logs one line if text was normalised.

    Raises:
        UserError: for the first record that is not a row, with its location, and for too many rows.
    """
    rows, normalised, counts, characters = list[Row](), 0, Counter[str](), 0
    for record, location in records:
        row = _make_row(record, location)
        if normalise:
            row, changes = normalise_row(row)
            counts.update(changes)
            normalised += bool(changes)
        characters += _check_text(row, location)
        rows.append(row)
        if len(rows) > MAX_ROWS or characters > MAX_BYTES:
            raise UserError(f"{location}: more than {MAX_ROWS} rows or {MAX_BYTES} characters; use a part of them")
    if normalised:
        kinds = ", ".join(f"{kind} ({number})" for kind, number in sorted(counts.items()))
        message = "%s: white space and characters of %d of %d rows were normalised: %s; see docs/rows.md"
        log.warning(message, source, normalised, len(rows), kinds)
    return tuple(rows)


# --- Sources


def read_rows(spec: str | Path, argument: str = "forget", *, normalise: bool = True) -> list[Row]:
    """Reads the rows of a file or of ``hub:name:config:split``, a data set on the Hugging Face Hub.

    A file that has not changed is not read again: model and tasks of one evaluation share its rows. ``normalise`` is
    false for published benchmarks only, whose text is compared with that of published results.

    Raises:
        UserError: for a missing, broken or empty source; the message names the argument, the file and the line.
    """
    spec = _check_spec(spec, argument)
    if spec.startswith("hub:"):
        return _read_hub(spec, argument, normalise)
    named = f"{argument}={_shorten(repr(spec))}"
    path, status = _find_file(spec, named)
    check_file(status, named)
    source = f"{argument}={_shorten(str(path) if str(path).isprintable() else repr(str(path)))}"
    version = (status.st_mtime_ns, status.st_size, status.st_ino)
    rows = _read_file(path.absolute(), version, source, normalise)
    if not rows:
        raise UserError(f"{named}: the file holds no rows")
    return list(rows)


def _find_file(spec: str, named: str) -> tuple[Path, os.stat_result]:
    """Returns the path of a source, with ``~`` replaced, and its status; ``named`` begins the error messages."""
    try:
        path = Path(spec).expanduser()
        return path, path.stat()
    except FileNotFoundError:
        raise UserError(
            f"{named}: no such file; expected a file of rows (JSON lines, JSON, CSV, TSV or Parquet) or "
            f"hub:name:config:split{_hint_for_several_sources(spec)}"
        ) from None
    except OSError as error:
        raise UserError(f"{named}: no such file that can be read ({error.strerror})") from None
    except RuntimeError:
        raise UserError(f"{named}: no such file; ~ is followed by the name of no user of this machine") from None
    except ValueError:  # half a surrogate pair
        raise UserError(f"{named} is not the name of a file") from None


@lru_cache(maxsize=8)
def _read_file(path: Path, version: tuple[int, int, int], source: str, normalise: bool) -> tuple[Row, ...]:
    """Reads the rows of a file; ``version`` changes when the file does, and errors name ``source``."""
    return _make_rows(read_records(path, source), source, normalise)


def _check_spec(spec: Any, argument: str) -> str:
    """Returns the name of a source as text. lm-eval turns a file name such as 1 into a number."""
    if isinstance(spec, bool) or not isinstance(spec, str | Path | int | float):
        raise UserError(
            f"{argument} must be the name of a file (./true for one that is named so) or hub:name:config:split; "
            f"found {_describe_type(spec)}"
        )
    text = str(spec)
    if not text.strip() or "\0" in text:
        raise UserError(f"{argument}={_shorten(repr(text))} is not the name of a file")
    return text


def _shorten(text: str) -> str:
    """Returns at most 300 characters of a file name; its end says most."""
    return text if len(text) <= 300 else f"...{text[-297:]}"


def is_file(spec: str) -> bool:
    """Returns whether ``spec``, colons and plus signs included, is the name of an existing file."""
    try:
        return Path(spec).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def _hint_for_several_sources(spec: str) -> str:
    """Returns the end of an error message for a source that looks like a named one; else an empty string."""
    if not re.match(r"(?!hub:)[^:/\\]+:[^/\\]", spec) and not ("+" in spec and ":" in spec):
        return ""
    return (
        "; several memories are name:source+name:source, where a name has lower-case letters, digits and underscores, "
        "a letter first, and is not hub"
    )


def parse_rows(text: str, source: str) -> list[Row]:
    """Returns the rows of JSON lines, possibly none; error messages name ``source`` and the line.

    Raises:
        UserError: for a line that is not JSON or not a row.
    """
    return list(_make_rows(parse_json(text, source), source))


def read_forget_sets(spec: str | Path, argument: str = "forget") -> dict[str, list[Row]]:
    """Reads the forget set of each memory from ``name:source+name:source``; a single source gets the default name.

    An existing file with such a name is a single source.

    Raises:
        UserError: as ``read_rows``, and for a reserved name.
    """
    sources = parse_named_values(spec, argument) if isinstance(spec, str) and not is_file(spec) else None
    if not sources:
        return {DEFAULT_MEMORY: read_rows(spec, argument)}
    for name in sources:
        if not is_valid_memory_name(name):
            raise UserError(f"{argument}: {name!r} is reserved and cannot name a memory; choose another name")
    return {name: read_rows(source, f"{argument}={name}") for name, source in sources.items()}


def _read_hub(spec: str, argument: str, normalise: bool) -> list[Row]:
    named = f"{argument}={_shorten(repr(spec))}"
    parts = spec.split(":")
    if len(parts) != 4 or not all(parts[1:]):
        raise UserError(
            f"{named}: expected hub:name:config:split, e.g. hub:locuslab/TOFU:forget10:train"
            f"{_hint_for_several_sources(spec)}"
        )
    source = f"{argument}={spec}" if spec.isprintable() else named
    import datasets

    try:
        table = datasets.load_dataset(parts[1], parts[2], split=parts[3])
    except Exception as error:  # the hub client raises many kinds; the message has to be one line
        raise UserError(f"{named}: could not be loaded from the hub ({first_line(error)})") from None
    records = ((record, f"{source}, row {number}") for number, record in enumerate(table, 1))
    try:
        rows = _make_rows(records, source, normalise)
    except UserError:
        raise
    except Exception as error:  # a column of images or sound is decoded here, and may need another package
        raise UserError(f"{source}: a row cannot be read ({type(error).__name__})") from None
    if not rows:
        raise UserError(f"{source}: the data set holds no rows")
    return list(rows)


def drop_forget_rows(forget: Iterable[Row], retain: Sequence[Row]) -> list[Row]:
    """Returns the retain rows that are not forget rows, compared by context and target.

    Raises:
        UserError: if no row is left: nothing can be both forgotten and kept.
    """
    forget_texts = {(row.context, row.target) for row in forget}
    retain_rows = [row for row in retain if (row.context, row.target) not in forget_texts]
    if retain and not retain_rows:
        raise UserError("retain: all its rows are rows of forget; nothing can be both forgotten and kept")
    return retain_rows


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes rows as JSONL without empty fields, to a temporary file that is then renamed."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                record = {name: value for name, value in row.as_dict().items() if value}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
