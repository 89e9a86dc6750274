"""What users type after ``lm-ortho sweep`` and ``lm-ortho board``: read as lm-eval reads it, or refused in one line."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lm_ortho.cli.app import app
from lm_ortho.cli.board import parse_metadata, parse_model_args
from lm_ortho.errors import UserError
from lm_ortho.leaderboard.store import Store

runner = CliRunner()


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("retain=x", {"retain": "x"}),
        (
            "retain=r.jsonl,forget=alice:a.jsonl+bob:b.jsonl",
            {"retain": "r.jsonl", "forget": "alice:a.jsonl+bob:b.jsonl"},
        ),
        ("tofu_first=20, tofu_end=none", {"tofu_first": 20, "tofu_end": "none"}),
        ("question=a=b,sizes=[4096,8192]", {"question": "a=b", "sizes": [4096, 8192]}),
        ('{"retain": "a,b.jsonl", "n": [1, 2]}', {"retain": "a,b.jsonl", "n": [1, 2]}),
        (' {"retain": "x"}', {"retain": "x"}),
    ],
)
def test_metadata_is_read_as_lm_eval_reads_it(text: str, values: dict[str, Any]) -> None:
    assert parse_metadata(text) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("retain", r"metadata: 'retain' is not name=value, as in retain=retain\.jsonl"),
        ("retain=", "metadata: 'retain=' is not name=value"),
        ("=x", "metadata: '=x' is not name=value"),
        ("a=1,a=2", "metadata names a twice"),
        ("{", r"metadata='\{' is not JSON .*; or give it as retain=retain\.jsonl"),
        ("[1]", r"metadata='\[1\]' must be an object or retain=retain\.jsonl"),
        ("[" * 10**5, "metadata='.{80}' is not JSON"),
        ("x" * 10**5, "metadata: '.{80}' is not name=value"),
    ],
)
def test_bad_metadata_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_metadata(text)
    assert len(str(error.value)) < 250
    assert "\n" not in str(error.value)


def test_model_args_are_those_of_lm_eval() -> None:
    """`base=none` is a word there, and no None."""
    from lm_eval._cli.utils import key_val_to_dict

    text = "pretrained=my/model,base=none,density=1e-2,fresh=true,seed=3"
    assert parse_model_args(text) == key_val_to_dict(text)
    assert parse_model_args(text)["base"] == "none"
    assert parse_model_args("pretrained=2026") == {"pretrained": "2026"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha=1", "the sweep sets alpha; use --alpha"),
        ("pretrained=a,dtype=float16", "the sweep sets dtype; use --dtype"),
        ('{"batch_size": 4}', "the sweep sets batch_size; use --batch-size"),
        ('{"pretrained": ["a"]}', r"pretrained=\['a'\] must be the text"),
        ("pretrained=1.5", r"pretrained=1\.5 must be the text"),
        ("pretrained=", "'pretrained=' is not name=value"),
        ("pretrained=a,pretrained=b", "names pretrained twice"),
    ],
)
def test_bad_model_args_are_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_model_args(text)


@pytest.fixture
def other_database(tmp_path: Path) -> Path:
    """A folder with a database of another program under the name of our store, with tables of the same names."""
    with sqlite3.connect(tmp_path / "store.sqlite") as database:
        database.execute("CREATE TABLE pieces (square TEXT)")
        database.execute("CREATE TABLE facts (day TEXT)")
    return tmp_path


def test_a_database_of_another_program_is_no_store(other_database: Path) -> None:
    for command in ("status", "page"):
        result = runner.invoke(app, ["board", command, str(other_database)])
        assert isinstance(result.exception, UserError)
        assert "cannot be used as a store (no such column: key)" in str(result.exception)
    with pytest.raises(UserError, match="cannot be used as a store"):
        Store(other_database)


@pytest.mark.parametrize("command", ["status", "page"])
@pytest.mark.parametrize(
    ("place", "message"),
    [("missing", "holds no"), ("file", "holds no"), (".", "holds no"), ("empty", "its store is empty")],
)
def test_a_folder_without_results_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, place: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("empty").mkdir()
    Path("empty/store.sqlite").touch()
    result = runner.invoke(app, ["board", command, place])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert not list(tmp_path.rglob("leaderboard.*"))
