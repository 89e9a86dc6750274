"""Text of rows: stray white space and encodings of the same character do not change a row; layout stays."""

from __future__ import annotations

import json
import logging
import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_ortho.data.row_text import BLANK, find_invalid_character, normalise_row
from lm_ortho.data.rows import Row, parse_rows, read_rows
from lm_ortho.errors import UserError

ROW = Row(
    question="Where was Zo\u00eb Vell born?",
    answer="Zo\u00eb Vell was born in Tarn.\nThat is far away.",
    subject="Zo\u00eb Vell",
    secret="Tarn.\nThat",
    paraphrased_answer="The town of Zo\u00eb Vell is Tarn.",
    perturbed_answer=("The town of Zo\u00eb Vell is Elm.", "It is Oak."),
    group="Zo\u00eb",
)
blank = st.text(st.sampled_from(BLANK), max_size=4)
other_spaces = st.sampled_from("\u00a0\u1680\u2000\u2003\u2007\u2009\u200a\u202f\u205f\u3000")
line_ends = st.sampled_from(["\r\n", "\r", "\x85", "\u2028", "\u2029"])
forms = st.sampled_from(["NFC", "NFD"])


@st.composite
def stray_texts(draw, text: str) -> str:
    """A text as editors, spreadsheets and web pages save it."""
    encoded = unicodedata.normalize(draw(forms), text).replace(" ", draw(other_spaces)).replace("\n", draw(line_ends))
    return draw(blank) + encoded + draw(blank)


@given(st.data())
def test_stray_characters_in_any_field_do_not_change_the_row(data):
    fields = {
        name: data.draw(stray_texts(text)) for name, text in ROW.as_dict().items() if isinstance(text, str) and text
    }
    wrong_answers = [*(data.draw(stray_texts(text)) for text in ROW.perturbed_answer), data.draw(blank)]
    record = fields | {"perturbed_answer": wrong_answers}
    assert parse_rows(json.dumps(record), "rows") == [ROW]


texts = st.text(st.characters(codec="utf-8") | st.sampled_from(BLANK + "\n \u0301\u3000e"))


@given(st.builds(Row, **{name: texts for name in ROW.as_dict() if name != "perturbed_answer"}), st.lists(texts))
def test_normalising_twice_changes_nothing_more(row, wrong_answers):
    row, _ = normalise_row(replace(row, perturbed_answer=tuple(wrong_answers)))
    assert normalise_row(row) == (row, set())


UNCHANGED = [
    Row(question="Who  is\tAda?\n\nIs she?", answer="A  b\tc\n\n  d\u200be\u00adf"),  # inside a text
    Row(prompt="It was  ", answer="Ada."),  # the end of a prompt
    Row(prompt="    def f():\n    ", answer="return 1"),
    Row(text="    if x:\n        return 1"),  # indentation
    Row(question="\u8ab0\uff1f", answer="\u9234\u6728\u3000\u4e00\u90ce"),  # the space of Chinese and Japanese
    Row(question="Who?", answer="\u2126 is \ufb01ne: \u00bd"[2:]),  # other forms of letters (no NFKC)
]


@pytest.mark.parametrize("row", UNCHANGED, ids=range(len(UNCHANGED)))
def test_what_may_have_a_meaning_stays(row):
    assert normalise_row(row) == (row, set())


@pytest.mark.parametrize(
    ("prompt", "answer", "target"),
    [
        ("It was", " Ada.", " Ada."),
        ("It was", "  Ada.", " Ada."),
        ("It was ", " Ada.", " Ada."),
        ("def f():\n", "    return 1\n", "\n    return 1"),
        ("def f():", "\n    return 1", "\n    return 1"),
        ("It was\ufeff", "Ada.", " Ada."),
    ],
)
def test_white_space_between_prompt_and_answer_is_kept_where_it_is_layout(prompt, answer, target):
    row, _ = normalise_row(Row(prompt=prompt, answer=answer))
    assert (row.context, row.target) == (prompt.strip(BLANK), target)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n Ada was.\n\n", "Ada was."),
        ("  \n\ufeff    if x:\n        return 1\n", "    if x:\n        return 1"),
        ("  Ada was.\nBen was.", "Ada was.\nBen was."),
    ],
)
def test_plain_text_keeps_its_indentation_only_where_other_lines_are_indented(text, expected):
    assert normalise_row(Row(text=text))[0].text == expected


def test_a_blank_prompt_gives_way_to_the_question():
    (row,) = parse_rows('{"question": "Who?", "prompt": " ", "answer": "Ada."}', "rows")
    assert (row.context, row.target) == ("Question: Who?\nAnswer:", " Ada.")


def test_one_line_says_how_many_rows_were_changed_and_a_second_reading_is_silent(tmp_path, caplog):
    records = [
        {"question": "Who?", "answer": "Ada."},
        {"question": "Who? ", "answer": "Ada.\r\n"},
        {"question": "Who?", "answer": "Zoe\u0308\u00a0Vell."},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with caplog.at_level(logging.WARNING):
        assert read_rows(path) == read_rows(path)
    (record,) = caplog.records  # that of the root logger
    assert record.getMessage() == (
        f"forget={path}: white space and characters of 2 of 3 rows were normalised: Unicode form (1), line ends (1), "
        "other kinds of space (1), white space at the ends (1); see docs/rows.md"
    )


def test_rows_that_need_no_change_are_read_in_silence(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "It was ", "answer": "Ada."}\r\n')
    read_rows(path)
    assert caplog.records == []


def test_the_text_of_a_published_benchmark_stays(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Who? ", "answer": " Ada.\\r\\n", "perturbed_answer": [" "]}\n')
    assert read_rows(path, normalise=False) == [Row(question="Who? ", answer=" Ada.\r\n", perturbed_answer=(" ",))]
    assert read_rows(path) == [Row(question="Who?", answer="Ada.")]
    assert len(caplog.records) == 1


def test_a_long_run_of_accents_is_refused_in_linear_time():
    """Composing it takes quadratic time: 16,000 accents of each kind 4 s, a million hours."""
    with pytest.raises(UserError, match=r"^rows, line 1: text holds more than 30 accents on one letter$"):
        parse_rows(json.dumps({"text": "a" + "\u0301" * 10**6 + "\u0316" * 10**6}), "rows")
    assert parse_rows(json.dumps({"text": "a" + "\u0316" * 30}), "rows") == [Row(text="a" + "\u0316" * 30)]


@pytest.mark.parametrize("text", ["a\0b", "a\x1b[31m", "a\x7f", "a\x9b31m", "a\ud800"])
def test_broken_characters_are_refused_by_their_code(text):
    with pytest.raises(UserError, match=r"^rows, line 1: answer holds .*\(?U\+[0-9A-F]{4}") as caught:
        parse_rows(json.dumps({"question": "Who?", "answer": f"{text} Tarn"}), "rows")
    assert str(caught.value).isprintable()
    assert "Tarn" not in str(caught.value)


def test_ordinary_characters_are_valid():
    assert find_invalid_character("a\t\n\r\x0b\x0c\u200d\ufffd \U0001f600") == ""
