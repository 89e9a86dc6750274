"""Pieces of a sweep or board: the content of every file that a task reads is part of the key."""

from __future__ import annotations

from lm_ortho.data.rows import Row, write_rows
from lm_ortho.leaderboard.cells import hash_task_files


def test_rows_of_every_named_source_are_part_of_the_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hashes = set()
    for text in ("one", "another"):
        for name in ("run:1.jsonl", "c++rows.jsonl"):
            write_rows(name, [Row(text=text)])
        for value in ("run:1.jsonl", "alice:c++rows.jsonl+bob:run:1.jsonl"):
            hashes.add(hash_task_files({"forget": value})["forget"])
    assert len(hashes) == 4
