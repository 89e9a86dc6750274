"""Rows of a forget or retain set: their fields, their text, reading and writing them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_ortho.dial import parse_named_values
from lm_ortho.errors import UserError
from lm_ortho.hub import first_line
from lm_ortho.streams import DEFAULT_MEMORY, is_valid_memory_name

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

    def as_dict(self) -> dict[str, Any]:
        """Returns all fields as a dictionary that can be written as JSON."""
        return {**asdict(self), "perturbed_answer": list(self.perturbed_answer)}


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


_FIELDS = {field.name for field in fields(Row)}


def _parse_record(record: Any, location: str) -> Row:
    """Returns the row of one JSON object; ``location`` begins the error messages."""
    # 1. Take the fields of a row; other keys and nulls are ignored.
    if not isinstance(record, Mapping):
        raise UserError(f"{location}: expected an object with question and answer (or text), found {record!r:.80}")
    values = {name: record[name] for name in _FIELDS & record.keys() if record[name] is not None}
    perturbed_answers = values.pop("perturbed_answer", ())
    # 2. Check their types.
    wrong_type = [name for name, value in values.items() if not isinstance(value, str)]
    if wrong_type:
        raise UserError(f"{location}: {wrong_type[0]} must be a string, found {values[wrong_type[0]]!r:.80}")
    if isinstance(perturbed_answers, str):
        perturbed_answers = [perturbed_answers]
    is_list = isinstance(perturbed_answers, (list, tuple))
    if not is_list or any(not isinstance(answer, str) for answer in perturbed_answers):
        raise UserError(f"{location}: perturbed_answer must be a list of strings")
    row = Row(**values, perturbed_answer=tuple(perturbed_answers))
    # 3. Check that the row is a question (or prompt) with an answer, or plain text.
    has_pair = bool(row.answer.strip() and (row.question.strip() or row.prompt.strip()))
    if not has_pair and (row.context or not row.text.strip()):
        raise UserError(
            f"{location}: a row needs a non-empty question (or prompt) with answer, or text; "
            f"found keys {', '.join(map(str, record)) or 'none'}"
        )
    if row.secret and row.secret not in row.answer:
        raise UserError(f"{location}: secret {row.secret!r} does not occur in answer {row.answer!r}")
    return row


def _require_valid_text(row: Row, location: str) -> Row:
    """Returns the row, or raises a ``UserError`` for half surrogates: JSON can hold them, tokenizers cannot."""
    for name, value in row.as_dict().items():
        try:
            "".join(value).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{location}: {name} holds half of a surrogate pair, which is not valid text: {value!r:.80}"
            ) from None
    return row


def read_rows(spec: str | Path, argument: str = "forget") -> list[Row]:
    """Reads the rows of a JSONL file or of ``hub:name:config:split``, a data set on the Hugging Face Hub.

    A file that has not changed is not read again: model and tasks of one evaluation share its rows.

    Raises:
        UserError: for a missing, broken or empty source; the message names the argument, the file and the line.
    """
    if str(spec).startswith("hub:"):
        return _read_hub(str(spec), argument)
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(
            f"{argument}={str(spec)!r}: no such file; expected a JSONL file or hub:name:config:split"
            f"{_hint_for_several_sources(spec)}"
        )
    status = path.stat()
    rows = _read_file(path.absolute(), (status.st_mtime_ns, status.st_size, status.st_ino), f"{argument}={path}")
    if not rows:
        raise UserError(f"{argument}={str(spec)!r}: the file holds no rows")
    return list(rows)


@lru_cache(maxsize=8)
def _read_file(path: Path, version: tuple[int, int, int], source: str) -> tuple[Row, ...]:
    """Reads the rows of a file; ``version`` changes when the file does, and errors name ``source``."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    return tuple(_require_valid_text(row, location) for row, location in _iterate_rows(text, source))


def _hint_for_several_sources(spec: str | Path) -> str:
    """Returns the end of an error message for a source that looks like several memories; else an empty string."""
    if not re.search(r"\w:.+\+", str(spec)):
        return ""
    return (
        "; several memories are name:source+name:source, where a name has lower-case letters, digits and underscores "
        "and is not hub"
    )


def parse_rows(text: str, source: str) -> list[Row]:
    """Returns the rows of JSON lines, possibly none; error messages name ``source`` and the line.

    Raises:
        UserError: for a line that is not JSON or not a row.
    """
    return [row for row, _ in _iterate_rows(text, source)]


def _iterate_rows(text: str, source: str) -> Iterator[tuple[Row, str]]:
    """Yields each row with its location, which is the source and the line number."""
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at U+2028 and similar characters
        if not line.strip():
            continue
        location = f"{source}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{location}: not valid JSON ({error.msg} at column {error.colno})") from None
        yield _parse_record(record, location), location


def read_forget_sets(spec: str | Path, argument: str = "forget") -> dict[str, list[Row]]:
    """Reads the forget set of each memory from ``name:source+name:source``; a single source gets the default name.

    Raises:
        UserError: as ``read_rows``, and for a reserved name.
    """
    sources = parse_named_values(spec, argument) if isinstance(spec, str) else None
    if not sources:
        return {DEFAULT_MEMORY: read_rows(spec, argument)}
    for name in sources:
        if not is_valid_memory_name(name):
            raise UserError(f"{argument}: {name!r} is reserved and cannot name a memory; choose another name")
    return {name: read_rows(source, f"{argument}={name}") for name, source in sources.items()}


def _read_hub(spec: str, argument: str) -> list[Row]:
    parts = spec.split(":")
    if len(parts) != 4 or not all(parts[1:]):
        raise UserError(
            f"{argument}={spec!r}: expected hub:name:config:split, e.g. hub:locuslab/TOFU:forget10:train"
            f"{_hint_for_several_sources(spec)}"
        )
    import datasets

    try:
        table = datasets.load_dataset(parts[1], parts[2], split=parts[3])
    except Exception as error:  # the hub client raises many kinds; the message has to be one line
        raise UserError(f"{argument}={spec!r}: could not be loaded from the hub ({first_line(error)})") from None
    rows = []
    for number, record in enumerate(table):
        location = f"{argument}={spec}, row {number}"
        rows.append(_require_valid_text(_parse_record(record, location), location))
    return rows


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
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            record = {name: value for name, value in row.as_dict().items() if value}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    partial.replace(path)
