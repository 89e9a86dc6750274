"""The cache of results of a verdict: what is computed once, and what makes a result stale."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm_ortho.errors import UserError
from lm_ortho.pipeline.code_hash import DECOMPOSITION, code_hash
from lm_ortho.verdict import runner
from lm_ortho.verdict.runner import ResultCache


def test_a_result_is_computed_once_and_again_when_anything_changes(tmp_path):
    calls: list[int] = []

    def compute():
        calls.append(1)
        return {"n": len(calls)}

    results = ResultCache(tmp_path / "results")
    assert results.get("a", compute, limit=3) == {"n": 1}
    assert results.get("a", compute, limit=3) == {"n": 1}
    assert ResultCache(tmp_path / "results").get("a", compute, limit=3) == {"n": 1}
    assert results.get("a", compute, limit=None) == {"n": 2}
    assert results.get("b", compute, limit=3) == {"n": 3}
    changed_results = ResultCache(tmp_path / "results")
    changed_results._identity = "other code"
    assert changed_results.get("a", compute, limit=3) == {"n": 4}


def test_an_interrupted_computation_stores_nothing(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    results = ResultCache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        results.get("a", interrupt)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a-half.partial").write_text("{")
    assert results.get("a", lambda: {"n": 1}) == {"n": 1}


@pytest.mark.parametrize("content", [b"", b'{"n": ', b"\xff\xfe", b"[1]"])
def test_half_a_result_is_computed_again(tmp_path, content):
    results = ResultCache(tmp_path)
    results.get("a", lambda: {"n": 1})
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert not results.has("a")
    assert results.get("a", lambda: {"n": 2}) == {"n": 2}
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert results.has("a")


def test_a_cache_folder_that_cannot_be_made_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot hold the results of a verdict"):
        ResultCache(tmp_path / "file" / "verdict")


def test_a_decomposition_stays_valid_when_only_measurement_code_changes(tmp_path):
    def fill(folder):
        (folder / "file").touch()

    results = ResultCache(tmp_path)
    folder = results.get_folder("a", fill, seed=0)
    assert (folder / "file").exists()
    results._identity = "other code that measures"
    assert results.get_folder("a", lambda folder: pytest.fail("filled again"), seed=0) == folder
    assert results.get_folder("a", fill, seed=1) != folder
    results._decomposition_identity = "other code that decomposes"
    assert results.get_folder("a", fill, seed=0) != folder


def test_an_interrupted_folder_is_filled_again(tmp_path):
    def interrupt(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    results = ResultCache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        results.get_folder("a", interrupt)
    assert not list(results.get_folder("a", lambda folder: (folder / "file").touch()).glob("half"))


def compute_hashes() -> tuple[str, str]:
    return runner._hash_measurement_code(), code_hash(*DECOMPOSITION)


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("sieve/simple.py", (True, True)),
        ("_templates/forget", (True, False)),
        ("verdict/relearning.py", (True, False)),
        ("verdict/checks.py", (False, False)),
    ],
)
def test_only_code_that_computes_a_result_makes_it_stale(monkeypatch, file, stale):
    before = compute_hashes()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * str(path).endswith(file))
    code_hash.cache_clear()
    after = compute_hashes()
    code_hash.cache_clear()
    assert tuple(old != new for old, new in zip(before, after, strict=True)) == stale
