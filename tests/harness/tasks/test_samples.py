"""Logged samples of another run: anything a file may hold is values or one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm_ortho.errors import UserError
from lm_ortho.harness.tasks import muse
from lm_ortho.harness.tasks.samples import read_samples, values_by_question


@pytest.mark.parametrize("path", [12, "a" * 5000, "~no_such_user_here/x"])
def test_a_path_that_is_none_is_one_line(path: object) -> None:
    with pytest.raises(UserError, match=r"^tofu_retain_samples="):
        read_samples(path, "tofu_forget10", "tofu_retain_samples")


def test_numbers_without_end_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"doc": {}, "ppl": ' + "9" * 5000 + "}")
    with pytest.raises(UserError, match="line 1: not valid JSON"):
        read_samples(tmp_path / "samples.jsonl", "tofu_forget10", "tofu_retain_samples")
    records = [{"doc": {"question": "Who?"}, "ppl": [10**400]}]
    with pytest.raises(UserError, match="a sample has no number as ppl"):
        values_by_question(records, "ppl", task="tofu_forget10", argument="tofu_retain_samples")


@pytest.mark.parametrize("content", [b"\xff\xfe\xfa", b"[" * 100_000, b"[1, "])
def test_a_table_of_muse_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "news.json").write_bytes(content)
    with pytest.raises(UserError, match=r"muse_dir: .* is not valid JSON in UTF-8"):
        muse._read_from_directory(str(tmp_path), "news")


def test_a_table_of_muse_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "news.json").write_bytes(b'\xef\xbb\xbf[{"question": "Who?"}]')
    assert muse._read_from_directory(str(tmp_path), "news") == [{"question": "Who?"}]
