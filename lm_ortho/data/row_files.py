"""Files of rows: recognises JSON lines, JSON, CSV, TSV and Parquet, also inside gzip, and says what other files are.

Records come out as plain Python values, with a location for error messages; ``rows`` turns them into rows. A message
never quotes a value, because rows are private. Nothing in a file is executed. docs/rows.md describes the formats.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_ortho.data.row import Row
from lm_ortho.data.row_text import INVISIBLE
from lm_ortho.errors import UserError, printable

MAX_BYTES = 2**27
"""Largest size of a file of rows, also after decompression: 128 MiB."""
FIELDS = tuple(Row.__dataclass_fields__)
Record = tuple[Any, str]
"""A value that should be a row, and its location: the source and the line or row number, from 1."""

_MIB = 2**20
_FILE_KINDS = {
    stat.S_ISDIR: "a directory; name a file in it",
    stat.S_ISFIFO: "a pipe; write its rows into a file first",
    stat.S_ISCHR: "a device; write its rows into a file first",
    stat.S_ISBLK: "a device; write its rows into a file first",
    stat.S_ISSOCK: "a socket; write its rows into a file first",
}
_BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_UNPACK = "; unpack it, or compress it with gzip"
_AS_ROWS = "; save its rows as JSON lines or CSV"
_SIGNATURES = {
    b"\x1f\x8b": "a gzip file inside a gzip file; unpack it",
    b"(\xb5/\xfd": f"compressed with zstandard{_UNPACK}",
    b"BZh": f"compressed with bzip2{_UNPACK}",
    b"\xfd7zXZ": f"compressed with xz{_UNPACK}",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"PK\x05\x06": "an empty zip archive",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xd0\xcf\x11\xe0": "an old Office file (.xls, .doc); save it as CSV (UTF-8)",
    b"%PDF": f"a PDF{_AS_ROWS}",
    b"SQLite format 3": f"an SQLite database{_AS_ROWS}",
    b"ARROW1": "an Arrow file; write it with Dataset.to_json or Dataset.to_parquet",
    b"\x89HDF": f"an HDF5 file{_AS_ROWS}",
    b"\x93NUMPY": f"a NumPy file{_AS_ROWS}",
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself; run `git lfs pull`",
}
_OFFICE_PARTS = {
    b"xl/workbook": "an Excel workbook; save its sheet as CSV (UTF-8)",
    b"opendocument.spreadsheet": "a LibreOffice spreadsheet; save its sheet as CSV (UTF-8)",
    b"word/document": f"a Word document{_AS_ROWS}",
}
_PARQUET = b"PAR1"
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_MARKUP = re.compile(r"<(!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)
_LINE = re.compile("\r\n?|\n")  # these cannot stand inside a JSON string; other line ends of Unicode can
_JSON_BLANK = " \t\r\n" + INVISIBLE  # a byte-order mark stands also where one file was appended to another
_JSON_VALUE = re.compile(f"[^{_JSON_BLANK}]")
_DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}
_PUBLIC_KEYS = {
    *FIELDS,
    *"answers completion context conversations id input instruction messages output response".split(),
}
"""Keys that a message may quote, in any case: fields of a row, and those of other usual formats."""


def check_file(status: os.stat_result, named: str) -> None:
    """Raises ``UserError`` unless the status is that of a file of permitted size. Opening a pipe would block.

    ``named`` begins the messages: the argument and its value.
    """
    kind = next((text for is_kind, text in _FILE_KINDS.items() if is_kind(status.st_mode)), "")
    if kind:
        raise UserError(f"{named} is {kind}")
    if status.st_size > MAX_BYTES:
        raise UserError(f"{named} has {status.st_size // _MIB} MiB; {_LIMIT}")


_LIMIT = f"a file of rows may have {MAX_BYTES // _MIB} MiB, also after decompression"


def read_records(path: Path, source: str) -> Iterator[Record]:
    """Yields the records of a file; its ending decides between tables and JSON, its content about the rest.

    Raises:
        UserError: for a file that cannot be read or is of another kind; the message begins with ``source``.
    """
    # 1. Read the bytes, at most as many as permitted.
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or type(error).__name__})") from None
    # 2. Decompress gzip, whatever the file is called.
    ending = path.suffix.lower()
    if data.startswith(b"\x1f\x8b"):
        data = _decompress(data, source)
        ending = Path(path.stem).suffix.lower() if ending == ".gz" else ending
    if len(data) > MAX_BYTES:
        raise UserError(f"{source}: {_LIMIT}; this one has more")
    # 3. Read the format.
    if data.startswith(_PARQUET):
        yield from _read_parquet(data, source)
        return
    text = _decode(data, source)
    if ending in _DELIMITERS:
        yield from parse_table(text, source, _DELIMITERS[ending])
    else:
        yield from parse_json(text, source)


def _decompress(data: bytes, source: str) -> bytes:
    """Returns the content of a gzip file, at most one byte more than permitted."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error):
        raise UserError(f"{source}: a damaged gzip file; its end is missing or its checksum is wrong") from None


def _decode(data: bytes, source: str) -> str:
    """Returns the text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark.

    Raises:
        UserError: for a file that is no text, with its kind where it is known.
    """
    if not data:
        raise UserError(f"{source}: the file holds no rows, it is empty")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    kind = _recognise(data)
    if kind:
        raise UserError(f"{source}: this is {kind}")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise UserError(
            f"{source}: not {name} text ({error.reason} at byte {error.start}); save it as text in UTF-8"
        ) from None
    if "\0" in text:
        raise UserError(
            f"{source}: not a text, or one in UTF-16 without a byte-order mark (it holds zero bytes); save it in UTF-8"
        )
    if _MARKUP.match(text.lstrip(_JSON_BLANK)):
        raise UserError(f"{source}: this is a page in HTML or XML (a download that failed?){_AS_ROWS}")
    return text


def _recognise(data: bytes) -> str:
    """Returns the kind of a file that no reader of rows understands; an empty string where it is not known."""
    if data.startswith(b"PK\x03\x04"):
        office = next((kind for part, kind in _OFFICE_PARTS.items() if part in data), "")
        if office:
            return office
    if _PICKLE.match(data):
        return f"a pickle, which is never loaded because it can run code{_AS_ROWS}"
    return next((kind for signature, kind in _SIGNATURES.items() if data.startswith(signature)), "")


# --- JSON


class _DuplicateKeyError(Exception):
    """An object has a key twice, so that one of its values would be lost."""


def _find_duplicates(names: Iterable[str]) -> set[str]:
    return {name for name, number in Counter(names).items() if number > 1}


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise _DuplicateKeyError(describe_keys(_find_duplicates(key for key, _ in pairs)))
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_make_object)


def parse_json(text: str, source: str) -> Iterator[Record]:
    """Yields the records of JSON lines, of a JSON array, or of JSON objects over several lines.

    An object that holds no field of a row but one list of objects, such as ``{"data": [...]}``, stands for that list.

    Raises:
        UserError: for invalid JSON, with its line.
    """
    lines = ((number, line.strip(_JSON_BLANK)) for number, line in enumerate(_LINE.split(text), 1))
    numbered = [(number, line) for number, line in lines if line]
    if _is_one_document(numbered):
        yield from _parse_document("\n".join(_LINE.split(text)), source)
        return
    for number, line in numbered:
        location = f"{source}, line {number}"
        yield _decode_line(line, location), location


def _is_one_document(lines: list[tuple[int, str]]) -> bool:
    """Returns whether the text is JSON over several lines, or a single value that may hold several rows."""
    if not lines:
        return False
    if lines[0][1].startswith("[") or len(lines) == 1:
        return True
    # A first line that is not complete: the lines of one object, or JSON lines with a mistake in the first of them.
    return not _is_object(lines[0][1]) and not any(_is_object(line) for _, line in lines[1:])


def _is_object(line: str) -> bool:
    if not (line.startswith("{") and line.endswith("}")):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _decode_line(line: str, location: str) -> Any:
    value, end = _decode_value(line, 0, location)
    rest = line[end:].strip(_JSON_BLANK)
    if rest:
        hint = "; a row ends with its line, without a comma" if rest == "," else ""
        raise UserError(f"{location}: not valid JSON (more text after the row, at column {end + 1}){hint}")
    return value


def _parse_document(text: str, source: str) -> Iterator[Record]:
    """Yields the records of JSON values that follow one another, each over any number of lines."""
    position, number = 0, 1
    has_lines = "\n" in text.strip(_JSON_BLANK)  # else the line is known
    while True:
        # 1. The start of the next value, and its line.
        match = _JSON_VALUE.search(text, position)
        if match is None:
            return
        start = match.start()
        number += text.count("\n", position, start)
        # 2. The value, and the rows in it.
        location = f"{source}, line {number}"
        value, position = _decode_value(text, start, source if has_lines else location)
        yield from _unpack(value, source, location)
        number += text.count("\n", start, position)


def _decode_value(text: str, start: int, location: str) -> tuple[Any, int]:
    """Returns the JSON value that begins at ``start``, and where it ends."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        place = f", line {error.lineno}" if "\n" in text else ""
        raise UserError(
            f"{location}{place}: not valid JSON ({error.msg} at column {error.colno}){_guess(text)}"
        ) from None
    except _DuplicateKeyError as error:
        raise UserError(f"{location}: an object holds a key twice: {error}") from None
    except RecursionError:
        raise UserError(f"{location}: JSON that is nested too deeply for a row") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise UserError(f"{location}: a number with too many digits") from None


def _guess(text: str) -> str:
    """Returns the end of the message about text that is not JSON at all."""
    first = text.lstrip(_JSON_BLANK).partition("\n")[0]
    if any(_count_fields(first, delimiter) for delimiter in ",;\t"):
        return "; a table needs a name that ends with .csv or .tsv"
    return "" if first.startswith(("{", "[")) else "; expected JSON lines: one object per line"


def _unpack(value: Any, source: str, location: str) -> Iterator[Record]:
    """Yields the elements of a list, or of the only list in an object without fields of a row."""
    if isinstance(value, Mapping) and not value.keys() & set(FIELDS):
        lists = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], Mapping)]
        if len(lists) > 1:
            raise UserError(
                f"{location}: an object with {len(lists)} lists of rows; write the rows of one of them into a file"
            )
        value = lists[0] if lists else value
    if isinstance(value, list):
        yield from ((record, f"{source}, row {number}") for number, record in enumerate(value, 1))
    else:
        yield value, location


# --- Tables


def parse_table(text: str, source: str, delimiters: Iterable[str] = ",") -> Iterator[Record]:
    """Yields the records of a table whose first line names the columns; an empty cell is a missing value.

    The delimiter is the one with which most fields are named. Several wrong answers stand in one cell as a JSON list.

    Raises:
        UserError: for a header without fields, a row with another number of cells, and broken quotes.
    """
    # 1. The header.
    text = text.lstrip(INVISIBLE)
    first = _LINE.split(text, maxsplit=1)[0]
    delimiter = max(delimiters, key=lambda char: _count_fields(first, char))
    if not _count_fields(first, delimiter):
        names = (name.strip('"') for name in re.split("[,;\t]", first))
        raise UserError(
            f"{source}, line 1: a table begins with a line that names its columns, such as question,answer"
            f"{suggest_names(names)}"
        )
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        columns = [name.strip() for name in next(reader)]
        if duplicates := _find_duplicates(columns) & set(FIELDS):
            raise UserError(f"{source}, line 1: a column name occurs twice: {describe_keys(duplicates)}")
        # 2. The rows. A quoted cell may hold line ends, so the number is that of the line where the row begins.
        number = reader.line_num + 1
        for cells in reader:
            location = f"{source}, line {number}"
            if any(map(str.strip, cells)):
                if len(cells) != len(columns):
                    raise UserError(f"{location}: {len(cells)} cells, but the header has {len(columns)}")
                record = {name: cell for name, cell in zip(columns, cells, strict=True) if cell.strip()}
                yield _parse_cell_list(record, location), location
            number = reader.line_num + 1
    except csv.Error as error:
        problem = str(error).replace("'\t'", "a tab")
        raise UserError(f"{source}, line {reader.line_num}: not a valid table ({problem})") from None


def _count_fields(line: str, delimiter: str) -> int:
    """Returns how many fields of a row a header names if it is split at ``delimiter``."""
    return len({name.strip('" \r') for name in line.split(delimiter)} & set(FIELDS))


def _parse_cell_list(record: dict[str, Any], location: str) -> dict[str, Any]:
    """Returns the record with the wrong answers as a list, if their cell holds one."""
    cell = record.get("perturbed_answer", "").strip()
    if not cell.startswith("["):
        return record
    value = _decode_line(cell, f"{location}: perturbed_answer is no JSON list of strings")
    return {**record, "perturbed_answer": value}


def _read_parquet(data: bytes, source: str) -> Iterator[Record]:
    """Yields the records of a Parquet file; only columns that are fields of a row are read."""
    import pyarrow
    from pyarrow import parquet

    try:
        leaves = [column.path for column in parquet.ParquetFile(pyarrow.BufferReader(data)).schema]
        file = parquet.ParquetFile(pyarrow.BufferReader(data), read_dictionary=leaves)
        columns = [name for name in file.schema_arrow.names if name in FIELDS]
        if not columns:
            raise UserError(f"{source}: no column has the name of a field; {_NEEDED}")
        # What the file says about its size is checked before memory is allocated for it.
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        if sum(group.total_byte_size for group in groups) > MAX_BYTES:
            raise UserError(f"{source}: {_LIMIT}; this one has more")
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for index in range(batch.num_rows):
                number += 1
                # One row at a time: the same long value may stand in all of them.
                record = {name: batch.column(name)[index].as_py() for name in columns}
                yield record, f"{source}, row {number}"
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source}: a damaged Parquet file, or one of a kind that pyarrow cannot read") from None


_NEEDED = "a row needs question (or prompt) with answer, or text"


def describe_keys(keys: Collection[Any]) -> str:
    """Returns the usual keys by name and the number of the others, which may be content of a private row."""
    names = [key for key in keys if isinstance(key, str) and key.lower() in _PUBLIC_KEYS][:8]
    others = len(keys) - len(names)
    return ", ".join([*names, *([f"{others} other" + ("s" if others > 1 else "")] if others else [])]) or "none"


_OTHER_NAMES = {
    **dict.fromkeys(("q", "instruction"), "question"),
    **dict.fromkeys(("a", "output", "completion", "response"), "answer"),
    **dict.fromkeys(("content", "document"), "text"),
}
"""Names that other formats have for a field; they are not read, because an ``input`` or a role would be lost."""


def suggest_names(keys: Iterable[Any]) -> str:
    """Returns the end of a message that says how to rename keys that stand for fields; else an empty string."""
    suggestions = dict[str, None]()
    for key in keys:
        plain = key.strip().casefold() if isinstance(key, str) else ""
        field = plain if plain in FIELDS else _OTHER_NAMES.get(plain)
        if field and key != field:
            suggestions[f"{printable(key)!r} to {field!r}"] = None
    return f"; rename {', '.join(suggestions)}" if suggestions else ""
