"""Files of rows: the same rows in every format, one clear line about every other file, and no content in messages."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import os
import socket
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import datasets
import numpy
import pyarrow
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lm_ortho.data import row_files, rows
from lm_ortho.data.rows import Row, parse_rows, read_forget_sets, read_rows, write_rows
from lm_ortho.errors import UserError

RECORDS: list[dict] = [
    {"question": "Where was Ola born?", "answer": 'In "Hale", 048.', "secret": "048", "perturbed_answer": ["In Ives."]},
    {"question": "Is it NA?", "answer": "NA", "perturbed_answer": ["Yes, it is; so", "No\nno"]},
    {"text": "Once, there was\ta dog.\nIt sat."},
]
ROWS = [Row(**{**record, "perturbed_answer": tuple(record.get("perturbed_answer", ()))}) for record in RECORDS]


def to_lines(records: list[dict], separator: str = "\n") -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + separator for record in records)


def to_table(records: list[dict], delimiter: str = ",") -> str:
    """The CSV of records: lists as JSON, missing values as empty cells."""
    names = list({name: None for record in records for name in record})
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, names, delimiter=delimiter, restval="")
    writer.writeheader()
    writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in record.items()} for record in records)
    return file.getvalue()


def to_parquet(records: list[dict], with_schema: bool = True) -> bytes:
    file = pyarrow.BufferOutputStream()
    schema = SCHEMA if with_schema else None
    parquet.write_table(pyarrow.Table.from_pylist(records, schema=schema), file)
    return file.getvalue().to_pybytes()


def write_content(path: Path, content: bytes | str) -> None:
    path.unlink(missing_ok=True)  # a new file: the reader remembers the old one
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


TEXT = pyarrow.string()
SCHEMA = pyarrow.schema(
    {"perturbed_answer": pyarrow.list_(TEXT), "id": pyarrow.int64()}
    | dict.fromkeys(["question", "answer", "secret", "text", "subject"], TEXT)
)
FORMATS: dict[str, tuple[str, Callable[[list[dict]], str | bytes]]] = {
    "json lines": ("rows.jsonl", to_lines),
    "no ending": ("rows", to_lines),
    "line ends of Windows": ("rows.jsonl", lambda records: to_lines(records, "\r\n")),
    "line ends of old Macs": ("rows.jsonl", lambda records: to_lines(records, "\r")),
    "blank lines": ("rows.txt", lambda records: "\n \n" + to_lines(records, "\n\n\t\n")),
    "byte-order mark": ("rows.jsonl", lambda records: "\ufeff" + to_lines(records)),
    "marks of appended files": ("rows.jsonl", lambda records: "\ufeff" + to_lines(records, "\n\ufeff")),
    "utf-16": ("rows.jsonl", lambda records: to_lines(records).encode("utf-16")),
    "utf-16 big-endian": ("rows.jsonl", lambda records: codecs.BOM_UTF16_BE + to_lines(records).encode("utf-16-be")),
    "utf-32": ("rows.json", lambda records: to_lines(records).encode("utf-32")),
    "json array": ("rows.json", lambda records: json.dumps(records)),
    "array named jsonl": ("rows.jsonl", lambda records: "\n" + json.dumps(records, indent=2)),
    "array, one element a line": ("rows.json", lambda records: "[\n" + to_lines(records, ",\n").rstrip(",\n") + "\n]"),
    "pretty-printed objects": ("rows.json", lambda records: "".join(json.dumps(r, indent=4) + "\n" for r in records)),
    "data": ("rows.json", lambda records: json.dumps({"version": 2, "data": records})),
    "data over several lines": ("rows.json", lambda records: json.dumps({"rows": records, "tags": ["a"]}, indent=1)),
    "csv": ("rows.csv", to_table),
    "CSV of Excel": ("ROWS.CSV", lambda records: "\ufeff" + to_table(records, ";")),
    "tsv": ("rows.tsv", lambda records: to_table(records, "\t")),
    "csv with empty lines": ("rows.csv", lambda records: to_table(records) + "\n,,,\n\n"),
    "gzip": ("rows.jsonl.gz", lambda records: gzip.compress(to_lines(records).encode())),
    "gzip without its ending": ("rows.json", lambda records: gzip.compress(json.dumps(records).encode())),
    "gzip in parts": ("r.jsonl.gz", lambda rs: b"".join(gzip.compress(to_lines([r]).encode()) for r in rs)),
    "gzip of a table": ("rows.csv.gz", lambda records: gzip.compress(to_table(records).encode())),
    "parquet": ("rows.parquet", to_parquet),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    file, encode = FORMATS[name]
    write_content(tmp_path / file, encode(RECORDS))
    assert read_rows(tmp_path / file) == ROWS


def test_what_datasets_writes_is_read(tmp_path):
    table = datasets.Dataset.from_list([{"question": "Who?", "answer": "Ada.", "perturbed_answer": ["Eve.", "Bo."]}])
    table.to_json(tmp_path / "a.jsonl")
    table.to_parquet(tmp_path / "a.parquet")
    expected = [Row(question="Who?", answer="Ada.", perturbed_answer=("Eve.", "Bo."))]
    assert read_rows(tmp_path / "a.jsonl") == read_rows(tmp_path / "a.parquet") == expected


def test_a_single_object_is_one_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[0], indent=2))
    assert read_rows(tmp_path / "a.json") == ROWS[:1]


def test_nothing_is_guessed_about_cells(tmp_path):
    """No number loses its zeros, no text is taken for a missing value, and a file name may hold a pattern."""
    path = tmp_path / "rows[1]*.csv"
    path.write_text("question,answer,secret,perturbed_answer\nCode?,0048,0048,nan\nWho?,null,,\n")
    assert read_rows(path) == [
        Row(question="Code?", answer="0048", secret="0048", perturbed_answer=("nan",)),
        Row(question="Who?", answer="null"),
    ]


# --- Properties

texts = st.text(st.characters(codec="utf-8"), max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(texts, children, max_size=3),
    max_leaves=4,
)
records = st.fixed_dictionaries(
    {"question": texts, "answer": texts},
    optional=dict.fromkeys(["secret", "text", "subject"], texts) | {"perturbed_answer": st.lists(texts, max_size=3)},
)
in_any_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def outcome_of(path) -> list[Row] | str:
    """The rows of a file, or an empty string where it is refused as it should be."""
    try:
        return read_rows(path)
    except UserError as error:
        message = str(error)
        assert message.startswith("forget=")
        assert message.isprintable()
        assert len(message) < 1000
        return ""


@in_any_folder
@given(st.lists(records, min_size=1, max_size=4))
def test_any_rows_are_the_same_in_every_format_or_refused_in_all(tmp_path, some_records):
    assume(all(any(map(str.strip, map(str, record.values()))) for record in some_records))  # a table skips empty lines
    outcomes = []
    for name in ("json lines", "line ends of Windows", "utf-16", "pretty-printed objects", "csv", "gzip", "parquet"):
        file, encode = FORMATS[name]
        write_content(tmp_path / file, encode(some_records))
        outcomes.append(outcome_of(tmp_path / file))
    assert outcomes == outcomes[:1] * len(outcomes)


@in_any_folder
@given(st.lists(records, min_size=1, max_size=4))
def test_what_was_written_is_read_again(tmp_path, some_records):
    write_content(tmp_path / "a.jsonl", to_lines(some_records))
    first = outcome_of(tmp_path / "a.jsonl")
    if first:
        write_rows(tmp_path / "b.jsonl", first)
        assert read_rows(tmp_path / "b.jsonl") == first


fragments = st.sampled_from(
    '{ } [ ] : , " \\ \n \r \t ; NaN 1e999 -0 null true \ufeff \0 \x1b <html> a question,answer \\ud800 \\u0000'.split(
        " "
    )
) | st.sampled_from(['"question"', '"answer": "Ada"', '{"text": "a"}', '{"data": [', "1" * 5000, "[" * 2000])
ENDINGS = ("rows.jsonl", "rows.csv", "rows.tsv", "rows.parquet", "rows.csv.gz")


@in_any_folder
@given(
    st.sampled_from(ENDINGS), st.binary(max_size=40) | st.lists(fragments).map(lambda parts: "".join(parts).encode())
)
def test_any_other_file_is_one_clear_error(tmp_path, file, content):
    write_content(tmp_path / file, content)
    outcome_of(tmp_path / file)


@in_any_folder
@given(
    st.sampled_from(["parquet", "gzip", "utf-16", "csv", "tsv"]),
    st.integers(0, 2000),
    st.binary(min_size=1, max_size=3),
)
def test_a_damaged_file_is_one_clear_error(tmp_path, name, position, replacement):
    file, encode = FORMATS[name]
    content = encode(RECORDS)
    content = content if isinstance(content, bytes) else content.encode()
    position %= len(content)
    write_content(tmp_path / file, content[:position] + replacement + content[position + len(replacement) :])
    outcome_of(tmp_path / file)


@given(st.dictionaries(st.sampled_from(["question", "answer", "text", "secret", "perturbed_answer", "id"]), values))
def test_values_of_any_type_are_a_row_or_one_clear_error(record):
    with suppress(UserError):
        parse_rows(json.dumps(record), "rows")


# --- Refused


def write_archive(path, name: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "secret Tarn")


def write_numbers(path) -> None:
    with path.open("wb") as file:
        numpy.save(file, numpy.arange(3))


REFUSED: dict[str, tuple[Callable | bytes | str, str]] = {
    "empty.jsonl": ("", "holds no rows, it is empty"),
    "blank.jsonl": (" \n", "the file holds no rows"),
    "array.json": ("[]", "the file holds no rows"),
    "header.csv": ("question,answer\n", "the file holds no rows"),
    "folder.jsonl": (lambda p: p.mkdir(), "is a directory; name a file in it"),
    "pipe.jsonl": (os.mkfifo, "is a pipe; write its rows into a file first"),
    "device.jsonl": (lambda p: p.symlink_to("/dev/zero"), "is a device"),
    "loop.jsonl": (lambda p: p.symlink_to(p), "no such file that can be read"),
    "book.xlsx": (lambda p: write_archive(p, "xl/workbook.xml"), "is an Excel workbook; save its sheet as CSV"),
    "letter.docx": (lambda p: write_archive(p, "word/document.xml"), "is a Word document"),
    "rows.zip": (lambda p: write_archive(p, "rows.jsonl"), "is a zip archive; unpack it"),
    "old.xls": (b"\xd0\xcf\x11\xe0\xa1\xb1", "an old Office file"),
    "rows.jsonl.zst": (b"(\xb5/\xfd$", "compressed with zstandard; unpack it, or"),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(b"{}")), "a gzip file inside a gzip file"),
    "cut.jsonl.gz": (gzip.compress(b"Tarn" * 99)[:-9], "a damaged gzip file"),
    "rows.pkl": (b"\x80\x04N.", "a pickle, which is never loaded because it can run code"),
    "rows.npy": (write_numbers, "a NumPy file"),
    "rows.pdf": (b"%PDF-1.7 Tarn", "a PDF"),
    "page.jsonl": ("\n<!DOCTYPE html><p>Tarn</p>", "a page in HTML or XML"),
    "lfs.jsonl": ("version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
    "utf16.jsonl": ('{"text": "Tarn"}'.encode("utf-16-le"), "UTF-16 without a byte-order mark"),
    "latin.csv": (b"question,answer\nWho?,Zo\xeb Tarn\n", "not UTF-8 text (invalid continuation"),
    "table.txt": ("question,answer\nWho?,Tarn\n", "a table needs a name that ends with .csv"),
    "list.yaml": ("- question: Tarn\n", "expected JSON lines: one object per line"),
    "comma.jsonl": ('{"text": "Tarn"},\n{"text": "Elm"}\n', "line 1: not valid JSON"),
    "first.jsonl": ('{"text": "Tarn\n{"text": "Elm"}\n', "line 1: not valid JSON"),
    "pretty.json": ('[\n {"text": "Tarn"},\n {"text": Tarn}\n]', "line 3: not valid JSON"),
    "deep.jsonl": ("[" * 10**6, "nested too deeply"),
    "deep2.jsonl": ('{"text": "a"}\n{"id":' + '{"a":' * 10**5 + "\n", "line 2: JSON that is nested"),
    "digits.jsonl": ('{"text": "Tarn", "id": ' + "1" * 5000 + "}", "a number with too many digits"),
    "twice.jsonl": ('{"text": "Tarn", "text": "Elm"}', "an object holds a key twice: text"),
    "nan.jsonl": ('{"text": NaN}', "text must be a string, found NaN; leave out a field"),
    "bool.jsonl": ('{"text": true}', "text must be a string, found true or false"),
    "nested.jsonl": ('{"text": {"Tarn": 1}}', "text must be a string, found an object"),
    "columns.json": ('{"question": ["Tarn"], "answer": ["b"]}', "must be a string, found a list"),
    "splits.json": ('{"train": [{}], "test": [{}]}', "an object with 2 lists of rows"),
    "second.json": ('[{"text": "Tarn"}, 7]', "row 2: expected an object with question"),
    "names.jsonl": ('{"Tarn": "x", "Completion": "y", "x": ""}', "found keys Completion, 2 others"),
    "headless.csv": ("Who?,Tarn\n", "line 1: a table begins with a line that names its columns"),
    "double.csv": ("answer,question,answer\na,b,Tarn\n", "a column name occurs twice: answer"),
    "ragged.csv": ('question,answer\n"a\nb",c\nd,e,Tarn\n', "line 4: 3 cells, but the header has 2"),
    "short.csv": ("question,answer\nTarn\n", "line 2: 1 cells, but the header has 2"),
    "quote.csv": ('question,answer\na,"Tarn\n', "not a valid table (unexpected end of data)"),
    "quote.tsv": ('question\tanswer\na\t"Tarn"s\n', "not a valid table (a tab expected after '\"')"),
    "list.csv": ("text,perturbed_answer\na,['Tarn']\n", "perturbed_answer is no JSON list of strings"),
    "other.parquet": (to_parquet([{"id": 7}], with_schema=False), "no column has the name of a field"),
    "bytes.parquet": (to_parquet([{"text": b"Tarn"}], with_schema=False), "text must be a string, found bytes"),
    "broken.parquet": (b"PAR1 Tarn PAR1", "a damaged Parquet file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_by_what_they_are(tmp_path, name):
    content, expected = REFUSED[name]
    if callable(content):
        content(tmp_path / name)
    else:
        write_content(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        read_rows(tmp_path / name)
    message = str(caught.value)
    assert expected in message
    assert message.startswith("forget=")
    assert message.isprintable()
    assert "Tarn" not in message
    assert len(message) < 500


def test_a_socket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket may have 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        with pytest.raises(UserError, match="forget='s' is a socket"):
            read_rows("s")


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").touch()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read \(Permission denied\)$"):
        read_rows(tmp_path / "a.jsonl")


def test_large_files_and_bombs_are_refused_before_memory_is_needed(tmp_path, monkeypatch):
    with (tmp_path / "large.jsonl").open("wb") as file:
        file.truncate(row_files.MAX_BYTES + 1)  # a hole: nothing is on the disk
    with pytest.raises(UserError, match=r"large\.jsonl' has 128 MiB; a file of rows may have 128 MiB"):
        read_rows(tmp_path / "large.jsonl")
    monkeypatch.setattr(row_files, "MAX_BYTES", 10**5)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * 10**7))
    with pytest.raises(UserError, match="also after decompression; this one has more"):
        read_rows(tmp_path / "bomb.jsonl.gz")
    parquet.write_table(pyarrow.table({"text": ["Tarn" * 10**5]}), tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 10**5
    with pytest.raises(UserError, match="also after decompression; this one has more"):
        read_rows(tmp_path / "bomb.parquet")


@pytest.mark.parametrize("name", ["header.csv", "keys.json", "names.jsonl"])
def test_many_names_take_linear_time(tmp_path, name):
    content = {
        "header.csv": "question," * 10**5 + "\n",
        "keys.json": "{" + ",".join(f'"k{i}": 1, "k{i}": 2' for i in range(10**5)) + "}",
        "names.jsonl": json.dumps(
            {"".join(c): 1 for c in itertools.product(*zip("question", "QUESTION", strict=True))}
        ),
    }[name]
    write_content(tmp_path / name, content)
    seconds = -time.process_time()
    outcome_of(tmp_path / name)
    assert seconds + time.process_time() < 20  # about one; in quadratic time minutes


def test_one_long_value_in_many_rows_is_refused(tmp_path, monkeypatch):
    """The value is in the Parquet file once, so the size of the file says nothing about the size of the rows."""
    parquet.write_table(pyarrow.table({"text": ["Tarn" * 10**4] * 10**3}), tmp_path / "bomb.parquet")
    monkeypatch.setattr(rows, "MAX_BYTES", 10**6)
    with pytest.raises(UserError, match=r"row 26: more than 1048576 rows or 1000000 characters"):
        read_rows(tmp_path / "bomb.parquet")


def test_too_many_and_too_long_rows_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 4)
    monkeypatch.setattr(rows, "MAX_ROWS", 3)
    with pytest.raises(UserError, match="line 4: more than 3 rows"):
        read_rows(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "Tarn" * 2**20 + "."}))
    with pytest.raises(UserError, match="line 1: the row has more than 4194304 characters; split it"):
        read_rows(tmp_path / "b.jsonl")


# --- Names of sources


def test_existing_files_win_over_names_of_memories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("c++rows.jsonl", "run:1.jsonl", "b.jsonl", "a:x.jsonl+b:y.jsonl", "7"):
        write_rows(name, [Row(text=name)])
    assert read_forget_sets("run:1.jsonl") == {"memory": [Row(text="run:1.jsonl")]}
    assert read_forget_sets("a:x.jsonl+b:y.jsonl") == {"memory": [Row(text="a:x.jsonl+b:y.jsonl")]}
    assert read_forget_sets("alice:c++rows.jsonl+bob:b.jsonl") == {
        "alice": [Row(text="c++rows.jsonl")],
        "bob": [Row(text="b.jsonl")],
    }
    assert read_forget_sets("one:run:1.jsonl+true:b.jsonl").keys() == {"one", "true"}
    assert read_rows(7) == [Row(text="7")]  # lm-eval makes a number of such a name


def test_the_home_directory_may_be_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path / "a.jsonl", [Row(text="a")])
    assert read_rows("~/a.jsonl") == read_forget_sets("alice:~/a.jsonl")["alice"] == [Row(text="a")]
    with pytest.raises(UserError, match=r"forget='~nobody-of-that-name/a\.jsonl': no such file; ~ is followed"):
        read_rows("~nobody-of-that-name/a.jsonl")


@pytest.mark.parametrize("spec", ["1:a.jsonl", "1:a.jsonl+2:b.jsonl", "Alice:a.jsonl", "my-set:a.jsonl"])
def test_a_name_that_no_memory_can_have_is_explained(spec):
    with pytest.raises(UserError, match=r"no such file; .* lower-case letters, digits and underscores, a letter first"):
        read_forget_sets(spec)


@pytest.mark.parametrize(
    "spec", [True, None, ["a.jsonl"], {"a": "b"}, "", "  ", "a\0b", "a\ud800", "a" * 5000, 10**20, 0.5]
)
def test_anything_else_than_the_name_of_a_file_is_one_clear_error(spec):
    with pytest.raises(UserError, match=r"^retain") as caught:
        read_forget_sets(spec, "retain")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_a_name_with_escape_sequences_does_not_reach_the_terminal(tmp_path):
    path = tmp_path / "\x1b[31m\n.jsonl"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"\\x1b\[31m\\n\.jsonl', line 1: a row needs") as caught:
        read_rows(path)
    assert str(caught.value).isprintable()


def test_a_space_after_a_separator_is_not_part_of_a_quoted_cell(tmp_path):
    write_content(tmp_path / "rows.csv", 'question, answer\n"Who, then?", "Ada, of Tarn."\n')
    assert read_rows(tmp_path / "rows.csv") == [Row(question="Who, then?", answer="Ada, of Tarn.")]


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("a.jsonl", '{"question ": "Who?", "answer": "Ada."}', "rename 'question ' to 'question'"),
        ("a.jsonl", '{"Question": "Who?", "Answer": "Ada."}', "rename 'Question' to 'question', 'Answer' to 'answer'"),
        (
            "a.jsonl",
            '{"instruction": "Who?", "output": "A."}',
            "rename 'instruction' to 'question', 'output' to 'answer'",
        ),
        ("a.csv", "Question,Answer\nWho?,Ada.\n", "rename 'Question' to 'question', 'Answer' to 'answer'"),
    ],
)
def test_names_that_stand_for_a_field_are_suggested(tmp_path, name, content, hint):
    write_content(tmp_path / name, content)
    with pytest.raises(UserError, match=hint):
        read_rows(tmp_path / name)
