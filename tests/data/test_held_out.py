"""Retain rows that a calibration does not read: how many, which ones, and what else decides."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_ortho.data.held_out import FEWEST_RETAIN_ROWS, MOST_ROWS, SHARE, describe_split, split_retain_rows
from lm_ortho.data.row import Row
from lm_ortho.data.rows import write_rows
from lm_ortho.errors import UserError


def make_rows(subjects: int, facts: int) -> list[Row]:
    return [
        Row(question=f"Fact {fact} of S{subject}?", answer=f"It is {fact}.", subject=f"S{subject}")
        for subject in range(subjects)
        for fact in range(facts)
    ]


def test_whole_subjects_are_held_out_whatever_the_order_of_the_rows():
    rows = make_rows(subjects=60, facts=5)
    split = split_retain_rows(rows)
    assert len(split.held_out) == 30
    assert len(split.calibration) == 270
    assert not {row.subject for row in split.held_out} & {row.subject for row in split.calibration}
    shuffled_rows = random.Random(0).sample(rows, len(rows))
    assert set(split_retain_rows(shuffled_rows).held_out) == set(split.held_out)
    assert split.held_out == [row for row in rows if row in split.held_out], "in the order of the file"


def test_no_more_rows_than_an_interval_needs():
    assert len(split_retain_rows(make_rows(500, 4)).held_out) == MOST_ROWS


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 300)), max_size=400),
    st.booleans(),
)
def test_every_row_is_in_one_part_and_the_calibration_never_suffers(pairs, with_subjects):
    rows = [
        Row(question=f"q{question}", answer="a", subject=f"s{subject}" if with_subjects and subject else "")
        for subject, question in pairs
    ]
    split = split_retain_rows(rows)
    assert sorted(map(repr, (*split.calibration, *split.held_out))) == sorted(map(repr, rows))
    assert len(split.held_out) <= min(MOST_ROWS, SHARE * len(rows))
    assert not split.held_out or len(rows) >= FEWEST_RETAIN_ROWS
    parts = [{row.subject or row.context for row in part} for part in split]
    assert not parts[0] & parts[1], "a question that occurs twice is in one part"


def test_small_sets_and_large_subjects_stay_whole():
    small = split_retain_rows(make_rows(FEWEST_RETAIN_ROWS - 1, 1))
    assert small.held_out == []
    assert "fewer than 100" in describe_split(small, "auto")
    few_subjects = split_retain_rows(make_rows(3, 100))
    assert few_subjects.held_out == []
    assert "too large" in describe_split(few_subjects, "auto")


def test_own_rows_are_never_read_by_the_calibration(tmp_path):
    rows = make_rows(30, 2)
    write_rows(tmp_path / "own.jsonl", [*rows[:4], Row(question="New?", answer="Yes.")])
    split = split_retain_rows(rows, str(tmp_path / "own.jsonl"))
    assert len(split.held_out) == 5
    assert split.calibration == rows[4:]
    assert split_retain_rows(rows, rows[:4]).calibration == rows[4:]
    assert split_retain_rows(make_rows(200, 1), "none").held_out == []
    with pytest.raises(UserError, match="held_out: it holds all rows of retain"):
        split_retain_rows(rows[:4], str(tmp_path / "own.jsonl"))
    with pytest.raises(UserError, match=r"held_out='nowhere\.jsonl': no such file"):
        split_retain_rows(rows, "nowhere.jsonl")
