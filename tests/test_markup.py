"""Text of any origin in every output: it is printed as it is, or as an escape, and never acts."""

from __future__ import annotations

import csv
import io
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console
from rich.table import Table

from lm_ortho.errors import printable
from lm_ortho.markdown import markdown_table
from lm_ortho.markup import TEXT_LIMIT, csv_text, markdown_code, markdown_text, terminal_text, xml_text
from tests.support.hostile import HOSTILE_NAMES, PageText

MARKS = st.text(alphabet="ab1_ \\`*[]()<>&|~!#=+-@:/\"'\n\x1b.", max_size=12)
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=[]), max_size=40) | MARKS | st.sampled_from(HOSTILE_NAMES)
RENDERER = MarkdownIt("commonmark").enable("table").enable("strikethrough")


def squeeze(text: str) -> str:
    """``text`` without the white space that HTML does not show."""
    return " ".join(text.split())


@given(ANY_TEXT)
@example("_a_ a_b __ `x` \\| \\\\|")
def test_markdown_shows_the_text_in_a_table(text: str) -> None:
    page = PageText(RENDERER.render(markdown_table(["title", "other"], [[markdown_text(text), "b"]])))
    assert page.tags == "table thead tr th th tbody tr td td".split()
    assert squeeze(page.text) == squeeze(f"title other {printable(text, TEXT_LIMIT)} b")


@given(ANY_TEXT)
@example("number #")
@example(" ##")
def test_markdown_shows_the_text_in_a_heading_and_a_paragraph(text: str) -> None:
    page = PageText(RENDERER.render(f"# {markdown_text('a' + text)}\n\nMade by {markdown_text(text)}."))
    heading = printable("a" + text, TEXT_LIMIT)
    assert page.tags == ["h1", "p"]
    assert squeeze(page.text) == squeeze(f"{heading}\nMade by {printable(text, TEXT_LIMIT)}.")


@given(ANY_TEXT)
def test_code_in_markdown(text: str) -> None:
    shown = printable(text, TEXT_LIMIT)
    page = PageText(RENDERER.render(markdown_table(["title"], [[markdown_code(text)]])))
    assert set(page.tags) <= set("table thead tr th tbody td code".split())
    assert squeeze(page.text) == squeeze(f"title {shown}")
    assert "<script" not in markdown_code(text)


def test_links_do_not_make_themselves() -> None:
    """GitHub turns addresses into links."""
    assert markdown_text("https://evil.example") == r"https:\//evil.example"
    assert markdown_text("www.evil.example, me@evil.example") == r"www\.evil.example, me\@evil.example"
    assert markdown_text("tofu_forget alpha=0.5 (tuned)") == "tofu_forget alpha=0.5 (tuned)"


@given(ANY_TEXT)
def test_svg_and_labels_are_valid_xml_with_the_text(text: str) -> None:
    element = ElementTree.fromstring(f'<text title="{xml_text(text)}">{xml_text(text)}</text>'.encode())
    assert (element.text or "") == printable(text, TEXT_LIMIT)
    assert element.get("title") == printable(text, TEXT_LIMIT)
    assert len(element) == 0


@given(ANY_TEXT)
def test_a_cell_of_a_csv_file_is_no_formula(text: str) -> None:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerow([csv_text(text), "end"])
    (row,) = csv.reader(io.StringIO(stream.getvalue()))
    assert row[1:] == ["end"]
    assert not row[0].lstrip().startswith(tuple("=+-@＝＋－＠")) or is_number(row[0])
    assert row[0].removeprefix("'") == printable(text, TEXT_LIMIT).removeprefix("'")


def is_number(text: str) -> bool:
    try:
        return float(text) is not None
    except ValueError:
        return False


@pytest.mark.parametrize("number", ["-0.5", "1e-9", "+3", "0", "-inf"])
def test_numbers_stay_numbers(number: str) -> None:
    assert csv_text(number) == number


@given(ANY_TEXT)
def test_a_terminal_shows_the_text_and_no_markup(text: str) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=2 * TEXT_LIMIT)
    table = Table(box=None, pad_edge=False)
    table.add_column(terminal_text("title"), no_wrap=True)
    table.add_row(terminal_text(text))
    console.print(table)
    console.print(terminal_text(text), soft_wrap=True)
    _, cell, line = stream.getvalue().split("\n")[:3]
    assert cell.rstrip() == line.rstrip() == printable(text, TEXT_LIMIT).rstrip()
    assert "\x1b" not in stream.getvalue()
