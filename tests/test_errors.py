"""Error messages quote files of any origin: they are one line, of bounded length, without control characters."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_ortho import cli
from lm_ortho.errors import MESSAGE_LIMIT, UserError, printable

ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=[]), max_size=300)


@given(ANY_TEXT, st.integers(20, 250))
def test_printable_text_is_one_short_line_that_a_terminal_prints(text: str, limit: int) -> None:
    line = printable(text, limit)
    assert line.isprintable()
    assert len(line) <= limit
    line.encode("utf-8")
    assert printable(line, limit) == line
    assert str(UserError(line)) == line


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S"]), max_size=200))
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\x1b]0;owned\x07\x1b[31mred", r"\x1b]0;owned\x07\x1b[31mred"),
        ("a\r\n  b\tc", "a b c"),
        ("\ud800 and \u202egnp.exe", r"\ud800 and \u202egnp.exe"),
        (r"C:\Users\new", r"C:\Users\new"),
        ("Zürich 東京 [/x]", "Zürich 東京 [/x]"),
        (b"\xff", r"b'\xff'"),
    ],
)
def test_examples(text: object, line: str) -> None:
    assert printable(text) == line


def test_a_long_message_keeps_the_argument_and_the_advice() -> None:
    message = str(UserError(f"bits={'9' * 10**6}: must be a number from 2 to 8"))
    assert len(message) == MESSAGE_LIMIT
    assert message.startswith("bits=999")
    assert message.endswith("9: must be a number from 2 to 8")
    assert " [...] " in message


def test_an_error_survives_the_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(UserError("bits=1\x1b[2J: too few")))
    assert (str(error), error.code, error.args) == (r"bits=1\x1b[2J: too few",) * 2 + ((r"bits=1\x1b[2J: too few",),)


def test_the_command_line_prints_no_escape_sequences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise UserError("name='\x1b]0;owned\x07': unknown [/x]")

    monkeypatch.setattr("lm_ortho.cli.app.app", fail)
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 1
    assert capsys.readouterr().err == "error: name='\\x1b]0;owned\\x07': unknown [/x]\n"


def test_an_access_token_is_left_out_wherever_it_was_typed() -> None:
    assert str(UserError("prompts='x,token=hf_0123456789abcdef' is unknown")) == "prompts='x,token=hf_...' is unknown"
