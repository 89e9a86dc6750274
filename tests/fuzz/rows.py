"""Fuzzes the reader of row files: JSON lines and whatever else lies under such a name."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_ortho.data.rows import Row, read_rows
from tests.fuzz.oracle import ODD_TEXTS, REFUSED, RIGHT, Refusal, attempt, fuzz_case, mutate, odd_value

SECRET = "Quellmund-7731"
"""Stands in answers and secrets; no message may quote it."""
WORDS = "Ada Brook born in Marsh Town river code of the baker Zürich 東京 42 naïve ѐ it's".split(" ")
FIELDS = (
    "question",
    "answer",
    "prompt",
    "text",
    "subject",
    "secret",
    "paraphrased_answer",
    "perturbed_answer",
    "group",
)
SUFFIXES = (".jsonl", ".json", ".csv", ".txt", "", ".jsonl.gz", ".parquet", ".gz", ".tsv", ".JSONL")

Record = dict[str, Any]


def draw_record(draw: random.Random) -> Record:
    """A right row: no white space at an end, text in composed form, every secret in its answer."""

    def words(low: int = 1, high: int = 6) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    kind = draw.choice(("question", "question", "prompt", "text"))
    if kind == "text":
        return {"text": f"{words()} {SECRET}."}
    record: Record = {kind: f"{words()}?" if kind == "question" else words(), "answer": f"{words()} {SECRET}."}
    if draw.random() < 0.5:
        record["secret"] = SECRET
    if draw.random() < 0.3:
        record["subject"] = words(1, 2)
    if draw.random() < 0.3:
        record["paraphrased_answer"] = words()
    if draw.random() < 0.3:
        record["perturbed_answer"] = [words() for _ in range(draw.randint(1, 3))]
    if draw.random() < 0.3:
        record["group"] = words(1, 1)
    return record


def make_row(record: Record) -> Row:
    """The row that a right record must become."""
    values = {**record, "perturbed_answer": tuple(record.get("perturbed_answer", ()))}
    return Row(**values)


def format_lines(draw: random.Random, records: list[Any]) -> bytes:
    """The records as JSON lines in one of the forms that JSON writers produce."""
    ascii_only, separators = draw.random() < 0.5, draw.choice([None, (",", ":")])
    lines = [json.dumps(record, ensure_ascii=ascii_only, separators=separators) for record in records]
    text = "\n".join(lines) + draw.choice(["", "\n", "\n\n"])
    return text.encode("utf-8", "surrogatepass")


# --- Mutators of records ---------------------------------------------------------------------------------------------


def _any_record(change: Callable[[random.Random, Record], Any]) -> Callable[[random.Random, list[Any]], list[Any]]:
    def mutator(draw: random.Random, records: list[Any]) -> list[Any]:
        index = draw.randrange(len(records))
        if isinstance(records[index], dict):
            records[index] = change(draw, dict(records[index]))
        return records

    mutator.__name__ = change.__name__
    return mutator


def set_odd_value(draw: random.Random, record: Record) -> Record:
    value = odd_value(draw)
    is_json = isinstance(value, (str, int, float, list, dict, type(None)))
    return {**record, draw.choice(FIELDS): value if is_json else str(value)}


def drop_field(draw: random.Random, record: Record) -> Record:
    record.pop(draw.choice(sorted(record)), None) if record else None
    return record


def rename_field(draw: random.Random, record: Record) -> Record:
    name = draw.choice(sorted(record)) if record else "question"
    other = draw.choice([name.upper(), f" {name}", f"{name}s", "", "\ufeff" + name, "__class__", name[::-1]])
    return {other if key == name else key: value for key, value in record.items()}


def insert_odd_text(draw: random.Random, record: Record) -> Record:
    name = draw.choice(FIELDS)
    text = record.get(name, "")
    if isinstance(text, str):
        place = draw.randint(0, len(text))
        record[name] = text[:place] + draw.choice(ODD_TEXTS) + text[place:]
    return record


def change_secret(draw: random.Random, record: Record) -> Record:
    return {**record, "secret": draw.choice([SECRET.lower(), SECRET + "x", " " + SECRET, SECRET, ["x"], 7])}


def nest_value(draw: random.Random, record: Record) -> Record:
    value: Any = "x"
    for _ in range(draw.choice([1, 3, 50])):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return {**record, draw.choice([*FIELDS, "other"]): value}


def replace_record(draw: random.Random, record: Record) -> Any:
    return draw.choice([None, 1, "text", [], [record], {}, [[record]], {"rows": [record]}, True])


RECORD_MUTATORS = [
    _any_record(change)
    for change in (
        set_odd_value, drop_field, rename_field, insert_odd_text, change_secret, nest_value, replace_record,
    )
]  # fmt: skip


# --- Mutators of bytes -----------------------------------------------------------------------------------------------


def truncate(draw: random.Random, content: bytes) -> bytes:
    return content[: draw.randint(0, len(content))]


def flip_bytes(draw: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 5)):
        if changed:
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def insert_bytes(draw: random.Random, content: bytes) -> bytes:
    part = draw.choice([
        b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n\n", b"{", b"}", b"[", b"]", b",", b'"', b"\\",
        b"\\ud800",
        b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"\xe2\x80\xa8", b"\x1b[2J", b"//", b"/*",
        b"\xed\xa0\x80",
    ])  # fmt: skip
    place = draw.randint(0, len(content))
    return content[:place] + part + content[place:]


def change_encoding(draw: random.Random, content: bytes) -> bytes:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return content
    codec = draw.choice(["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "utf-7"])
    return text.encode(codec, "replace")


def change_line_ends(draw: random.Random, content: bytes) -> bytes:
    return content.replace(b"\n", draw.choice([b"\r\n", b"\r", b"\n\r", b"", b"\x0b", b"\x85", b"\xe2\x80\xa9"]))


def compress(draw: random.Random, content: bytes) -> bytes:
    packed = gzip.compress(content, mtime=0)
    return packed if draw.random() < 0.5 else packed[: draw.randint(1, len(packed))]


def compress_bomb(draw: random.Random, content: bytes) -> bytes:
    return gzip.compress(content + b" " * 10**6, mtime=0)


def make_array(draw: random.Random, content: bytes) -> bytes:
    joint = draw.choice([b",", b",\n", b""])
    return b"[" + joint.join(line for line in content.split(b"\n") if line) + draw.choice([b"]", b",]", b""])


def make_table(draw: random.Random, content: bytes) -> bytes:
    mark = draw.choice([b",", b";", b"\t"])
    head = mark.join([b"question", b"answer"])
    return head + b"\n" + mark.join([b'"Where, then?"', SECRET.encode()]) + draw.choice([b"\n", b"", b'\n"', mark])


def nest_deeply(draw: random.Random, content: bytes) -> bytes:
    depth = draw.choice([100, 2000, 100_000])
    return draw.choice([b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth]) + content


def repeat_content(draw: random.Random, content: bytes) -> bytes:
    return content * draw.choice([2, 10])


def replace_content(draw: random.Random, content: bytes) -> bytes:
    return draw.choice([
        b"", b"\n", b"null", b"[]", b"{}", b"\x89PNG\r\n\x1a\n\x00", b"PK\x03\x04", b"\x1f\x8b", b"PAR1",
        b"SQLite format 3\x00",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", b"<html></html>", b"\x80\x04K\x01.",
        draw.randbytes(draw.randint(1, 200)),
    ])  # fmt: skip


BYTE_MUTATORS = [
    truncate, flip_bytes, insert_bytes, change_encoding, change_line_ends, compress, compress_bomb, make_array,
    make_table,
    nest_deeply, repeat_content, replace_content,
]  # fmt: skip


# --- Cases -----------------------------------------------------------------------------------------------------------


@fuzz_case
def run_case(seed: int) -> str:
    """Reads one file. Raises ``AssertionError`` unless it gives right rows or one clear refusal."""
    draw = random.Random(seed)
    records: list[Any] = [draw_record(draw) for _ in range(draw.randint(1, 5))]
    is_valid = draw.random() < 0.2
    folder = Path(tempfile.mkdtemp(prefix="fuzz-rows-"))
    try:
        path = folder / f"rows{'.jsonl' if is_valid or draw.random() < 0.6 else draw.choice(SUFFIXES)}"
        if is_valid:
            path.write_bytes(format_lines(draw, records))
            rows = attempt(lambda: read_rows(path, "forget"), names=[])
            expected = [make_row(record) for record in records]
            assert rows == expected, f"{len(expected)} right rows became {rows!r:.300}"
            return RIGHT
        if draw.random() < 0.5:
            records = mutate(draw, records, RECORD_MUTATORS)
        content = format_lines(draw, records)
        if draw.random() < 0.7:
            content = mutate(draw, content, BYTE_MUTATORS, most=2)
        place = _place(draw, path, content)
        result = attempt(lambda: read_rows(place, "forget"), names=["forget"], secrets=[SECRET])
        return REFUSED if isinstance(result, Refusal) else _check_rows(result)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _place(draw: random.Random, path: Path, content: bytes) -> str | Path:
    """Writes the file, in one case of twenty as something else than a file; returns what the user names."""
    if draw.random() > 0.05:
        path.write_bytes(content)
        return path if draw.random() < 0.5 else str(path)
    kind = draw.choice(["folder", "missing", "fifo", "device", "link", "loop", "text"])
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to(draw.choice(["/dev/null", "/dev/zero"]))
    elif kind == "link":
        (path.parent / "target").write_bytes(content)
        path.symlink_to("target")
    elif kind == "loop":
        path.symlink_to(path.name)
    return draw.choice(ODD_TEXTS) if kind == "text" else path


def _check_rows(rows: Any) -> str:
    """Whatever was read must be rows that a tokenizer can encode, each with something to predict."""
    assert isinstance(rows, list), f"not a list: {type(rows)}"
    assert rows, "no rows and no refusal"
    for row in rows:
        assert isinstance(row, Row), f"not a row: {row!r:.100}"
        (row.context + row.target + row.subject + row.group + row.paraphrased_answer).encode()
        "".join(row.perturbed_answer).encode()
        assert row.target.strip(), f"nothing to predict: {row!r:.100}"
        assert not row.secret or row.secret in row.answer, "a secret outside of its answer"
    return RIGHT
