"""Rows of a forget or retain set, and how they are read and turned into text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lm_ortho.config import parse_named_values
from lm_ortho.errors import UserError
from lm_ortho.hub import first_line
from lm_ortho.streams import UNNAMED, valid_memory_name

QUESTION_TEMPLATE = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Row:
    """One document: a question with its answer, a prompt with its continuation, or plain text.

    ``prompt`` is a verbatim context that takes the place of the question template; white space at its end goes to the
    answer. ``secret`` is the part of ``answer`` that nobody can guess; ``subject`` is whom it is about; ``group`` (the
    author, say) is the unit that intervals are clustered over.
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
        """What the model is given; empty for plain text. Never ends with white space: that starts the answer."""
        return self._asked.rstrip()

    @property
    def target(self) -> str:
        """What the model should continue with: the white space after the context (or a space), then the answer."""
        return (self._asked[len(self.context) :] or " ") + self.answer if self.context else self.text

    @property
    def _asked(self) -> str:
        return self.prompt or (QUESTION_TEMPLATE.format(question=self.question) if self.question else "")

    @property
    def names_subject(self) -> bool:
        """Whether the subject is known and occurs in the text, word for word."""
        return self.subject_in(self.context + self.target)

    def subject_in(self, text: str) -> bool:
        """Whether the subject is known and occurs in ``text``, word for word."""
        return bool(self.subject.strip()) and bool(mention_pattern(self.subject).search(text))

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary of every field."""
        return {**asdict(self), "perturbed_answer": list(self.perturbed_answer)}


def mention_pattern(name: str) -> re.Pattern[str]:
    """Where a text mentions ``name``: not within a longer word, as Ann in Annapolis is, in scripts that part words."""
    before, after = (edge.lower() != edge.upper() for edge in (name[:1], name[-1:]))
    return re.compile((r"(?<!\w)" if before else "") + re.escape(name) + (r"(?!\w)" if after else ""))


def replace_mentions(text: str, name: str, other: str) -> str:
    """``text`` with ``other`` at every mention of ``name``."""
    return mention_pattern(name).sub(lambda _: other, text)


_FIELDS = {field.name for field in fields(Row)}


def _row(record: Any, where: str) -> Row:
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: expected an object with question and answer (or text), found {record!r:.80}")
    known = {name: record[name] for name in _FIELDS & record.keys() if record[name] is not None}
    perturbed = known.pop("perturbed_answer", ())
    wrong_type = [name for name, value in known.items() if not isinstance(value, str)]
    if wrong_type:
        raise UserError(f"{where}: {wrong_type[0]} must be a string, found {known[wrong_type[0]]!r:.80}")
    perturbed = [perturbed] if isinstance(perturbed, str) else perturbed
    if not isinstance(perturbed, (list, tuple)) or any(not isinstance(wrong, str) for wrong in perturbed):
        raise UserError(f"{where}: perturbed_answer must be a list of strings")
    row = Row(**known, perturbed_answer=tuple(perturbed))
    has_pair = bool(row.answer.strip() and (row.question.strip() or row.prompt.strip()))
    if not has_pair and (row.context or not row.text.strip()):
        raise UserError(
            f"{where}: a row needs a non-empty question (or prompt) with answer, or text; "
            f"found keys {', '.join(map(str, record)) or 'none'}"
        )
    if row.secret and row.secret not in row.answer:
        raise UserError(f"{where}: secret {row.secret!r} does not occur in answer {row.answer!r}")
    return row


def _encodable(row: Row, where: str) -> Row:
    """The row, if a tokenizer can take it; JSON can hold what UTF-8 cannot."""
    for name, value in row.as_dict().items():
        try:
            "".join(value).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: {name} holds half of a surrogate pair, which is no text: {value!r:.80}"
            ) from None
    return row


def read_rows(spec: str | Path, argument: str = "forget") -> list[Row]:
    """The rows of a JSONL file or of ``hub:name:config:split``.

    Raises:
        UserError: names the argument, the file and the line for a missing, broken or empty source.
    """
    if str(spec).startswith("hub:"):
        return _read_hub(str(spec), argument)
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(
            f"{argument}={str(spec)!r}: no such file; expected a JSONL file or hub:name:config:split{_of_several(spec)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{argument}={str(spec)!r}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    rows = [_encodable(row, where) for row, where in _parsed(text, f"{argument}={path}")]
    if not rows:
        raise UserError(f"{argument}={str(spec)!r}: the file holds no rows")
    return rows


def _of_several(spec: str | Path) -> str:
    """What to add for a source that was meant as several memories."""
    if not re.search(r"\w:.+\+", str(spec)):
        return ""
    return "; several are name:source+name:source, each name small letters, digits and underscores, and not hub"


def parse_rows(text: str, source: str) -> list[Row]:
    """The rows of JSON lines, possibly none; errors name ``source`` and the line.

    Raises:
        UserError: for a line that is not JSON or not a row.
    """
    return [row for row, _ in _parsed(text, source)]


def _parsed(text: str, source: str) -> Iterator[tuple[Row, str]]:
    """Each row, and where it stands."""
    for number, line in enumerate(text.split("\n"), 1):  # splitlines also cuts at U+2028 and its kin
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
        yield _row(record, where), where


def read_forget_sets(spec: str | Path, argument: str = "forget") -> dict[str, list[Row]]:
    """The rows of each memory by its name: of ``name:source+name:source``, or of one source with the usual name.

    Raises:
        UserError: as ``read_rows``, and for a name that no memory can have.
    """
    named = parse_named_values(spec, argument) if isinstance(spec, str) else None
    if not named:
        return {UNNAMED: read_rows(spec, argument)}
    for name in named:
        if not valid_memory_name(name):
            raise UserError(f"{argument}: {name!r} is reserved and cannot name a memory; take another name")
    return {name: read_rows(source, f"{argument}={name}") for name, source in named.items()}


def _read_hub(spec: str, argument: str) -> list[Row]:
    parts = spec.split(":")
    if len(parts) != 4 or not all(parts[1:]):
        raise UserError(
            f"{argument}={spec!r}: expected hub:name:config:split, e.g. hub:locuslab/TOFU:forget10:train"
            f"{_of_several(spec)}"
        )
    import datasets

    try:
        table = datasets.load_dataset(parts[1], parts[2], split=parts[3])
    except Exception as error:  # the hub client raises many kinds; the user needs one line
        raise UserError(f"{argument}={spec!r}: could not be loaded from the hub ({first_line(error)})") from None
    numbered = ((record, f"{argument}={spec}, row {i}") for i, record in enumerate(table))
    return [_encodable(_row(record, where), where) for record, where in numbered]


def drop_forget_rows(forget: Iterable[Row], retain: Sequence[Row]) -> list[Row]:
    """The retain rows that are no forget rows.

    Raises:
        UserError: when none is left: nothing can be both forgotten and kept.
    """
    wanted = {(row.context, row.target) for row in forget}
    kept = [row for row in retain if (row.context, row.target) not in wanted]
    if retain and not kept:
        raise UserError("retain: all its rows are rows of forget; nothing can be both forgotten and kept")
    return kept


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes rows as JSONL, empty fields left out, by a temporary name and a rename."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            record = {name: value for name, value in row.as_dict().items() if value}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    partial.replace(path)
