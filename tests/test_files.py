"""Output directories: refused when occupied, and written completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lm_ortho.errors import UserError
from lm_ortho.files import atomic_directory, check_output_directory


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with atomic_directory(target) as scratch:
        (scratch / "file").write_text("x")
        assert not target.exists()
        assert scratch.parent == target.parent
    assert (target / "file").read_text() == "x"
    assert list(target.parent.iterdir()) == [target]


def test_an_empty_directory_and_a_relative_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with atomic_directory(Path("out")) as scratch:
        (scratch / "file").touch()
    assert os.listdir() == ["out"]


def fail(target: Path, error: BaseException) -> None:
    with atomic_directory(target) as scratch:
        (scratch / "file").touch()
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failure_leaves_no_files(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fail(tmp_path / "out", error())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"out='.*' cannot be written \(No space left on device\)"):
        fail(tmp_path / "out", OSError(28, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_unusable_directories_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    check_output_directory(tmp_path / "new")
    with pytest.raises(UserError, match=r"out='.*' holds file; choose a new or empty directory"):
        check_output_directory(tmp_path)
    with pytest.raises(UserError, match=r"keep='.*file' is a file"):
        check_output_directory(tmp_path / "file", "keep")
    with pytest.raises(UserError, match="cannot be created"):
        check_output_directory(tmp_path / "file" / "below")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="is not a directory that you may write to"):
        check_output_directory(tmp_path / "new")


def test_directories_that_cannot_be_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", str(tmp_path)):
        with pytest.raises(UserError, match="name a new directory inside it"):
            check_output_directory(Path(name))


def test_a_link_to_an_empty_directory_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_directory(tmp_path / "link") as scratch:
        (scratch / "file").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "x"


def test_a_name_that_is_too_long_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^out=.* cannot be looked up \(File name too long\)"):
        check_output_directory(tmp_path / ("a" * 300))
