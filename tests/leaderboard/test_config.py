"""A board file is plain YAML within limits; whatever it cannot mean is refused with its line or key before a run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_ortho.errors import UserError
from lm_ortho.leaderboard.config import MAX_CELLS, make_board, read_board
from lm_ortho.leaderboard.plain_yaml import MAX_BYTES, MAX_DEPTH, MAX_VALUES, read_plain_yaml

BOARD = "name: b\ntasks: [tofu_forget]\nmethods: [{method: npo}]\n"
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=5), part, max_size=3),
    max_leaves=10,
)


@pytest.fixture
def read(tmp_path: Path):
    """Reads the text of a board."""

    def read(text: str, encoding: str = "utf-8") -> Any:
        (tmp_path / "b.yaml").write_bytes(text.encode(encoding))
        return read_board(tmp_path / "b.yaml")

    return read


@settings(max_examples=30)
@given(PLAIN)
def test_plain_data_is_what_yaml_says(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "plain.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    assert read_plain_yaml(path, "board") == data


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_board_in_any_common_encoding(read, encoding: str) -> None:
    text = BOARD.replace("name: b\n", "name: b\ntitle: Zürich 東京\n").replace("\n", "\r\n")
    assert read(text, encoding).title == "Zürich 東京"


def test_anchors_may_be_used(read) -> None:
    board = read(BOARD + "budget: &b {steps: 3}\ntuning: {budget: *b}\n")
    assert board.tuning.budget == board.budget
    merged = read("name: b\ntasks: [t]\nmethods: [&m {method: npo, seeds: [1]}, {<<: *m, method: simnpo}]\n")
    assert [entry.seeds for entry in merged.methods] == [(1,), (1,)]


def test_a_date_is_text(read) -> None:
    assert read(BOARD.replace("name: b", "name: 2026-11-30")).name == "2026-11-30"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold keys such as name, methods and tasks"),
        ("# nothing\n", "must hold keys"),
        ("name: [", "is not YAML"),
        ("a: 1\n---\nb: 2\n", "is not YAML: expected a single document"),
        ("\x00", "is not YAML"),
        ("name: b\nname: c\n", "line 1: the key 'name' occurs twice"),
        ("models:\n  1: {}\n", "line 2: the key 1 means a number in YAML; write it in quotes if it is a name"),
        ("models:\n  no: {}\n", "line 2: the key no means true or false in YAML; write it in quotes"),
        ("metadata: {? [1] : 2}", "a list or a mapping cannot be a key"),
        ("metadata: {a: !!python/object/apply:os.system [touch marker]}", "python/object/apply:os.system is refused"),
        ("metadata: {a: !!binary aGk=}", "the tag tag:yaml.org,2002:binary is refused"),
        ("metadata: {a: !!int x}", "holds a value that YAML cannot read"),
        ("metadata: {a: !!bool x}", "holds a value that YAML cannot read"),
        (f"limit: {'9' * 5000}", "holds a value that YAML cannot read"),
        ("metadata: {a: .nan}", "line 1: .nan is not a finite number"),
        ("metadata: {a: 1.0e+400}", "1.0e+400 is not a finite number"),
        ("metadata: &a {b: *a}", f"more than {MAX_DEPTH} levels inside each other"),
        ("metadata: " + "[" * 300 + "]" * 300, "levels"),
        ("metadata: " + "[" * 5000, "nested too deeply"),
        ("metadata: [" + "x, " * MAX_VALUES + "]", f"holds more than {MAX_VALUES} values"),
        ("#" * (MAX_BYTES + 1), f"has {MAX_BYTES + 1} bytes; a file of this kind has at most {MAX_BYTES}"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_with_its_line(read, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read(text)
    assert message in str(error.value)
    assert "b.yaml" in str(error.value)
    assert not Path("marker").exists()


@pytest.mark.parametrize("kind", ["list", "merge"])
def test_few_lines_that_stand_for_billions_of_values_are_refused_at_once(read, kind: str) -> None:
    lines = ["metadata:", "  l0: &l0 {x: 1}"]
    for level in range(1, 11):
        copies = ", ".join([f"*l{level - 1}"] * 9)
        lines.append(f"  l{level}: &l{level} " + (f"[{copies}]" if kind == "list" else f"{{<<: [{copies}]}}"))
    start = time.process_time()
    with pytest.raises(UserError, match=f"holds more than {MAX_VALUES} values"):
        read("\n".join(lines))
    assert time.process_time() - start < 5


def test_places_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for place, message in [
        (tmp_path, "is a folder; name a YAML file"),
        (tmp_path / "fifo", "is not a regular file"),
        (Path("/dev/zero"), "is not a regular file"),
        (tmp_path / "none", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (tmp_path / "a\x00b", "cannot be read"),
        (tmp_path / "binary", "is not YAML"),
    ]:
        with pytest.raises(UserError, match=message):
            read_board(place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": [{"method": 1}]}, "methods.0.method=1: Input should be a valid string; YAML reads it as a number"),
        ({"name": True}, "name=True: Input should be a valid string; YAML reads it as a number or as true or false"),
        ({"tasks": ["t", False]}, "tasks.1=False: Input should be a valid string; YAML reads it"),
        ({"limit": True}, "limit=True: a number is needed, not true or false (or yes, no, on, off)"),
        ({"seeds": [False]}, "seeds.0=False: a number is needed"),
        ({"alphas": [True]}, "alphas.0=True: a number is needed"),
        ({"methods": [{"method": "npo", "seeds": [True]}]}, "methods.0.seeds.0=True: a number is needed"),
        ({"limits": {"t": True}}, "limits.t=True: a number is needed"),
        ({"batch_size": True}, "a number is needed"),
        ({"resources": {"cpus": True}}, "resources.cpus=True: a number is needed"),
        ({"limits": {"t": -1}}, "limits.t=-1: Input should be greater than or equal to 1"),
        ({"limit": 10**30}, "limit=1000000000000000000000000000000: "),
        ({"seeds": [-1]}, "seeds.0=-1: "),
        ({"seeds": [2**32]}, "seeds.0=4294967296: "),
        ({"seeds": []}, "seeds=[]: "),
        ({"alphas": []}, "alphas=[]: "),
        ({"alphas": [float("nan")]}, "alphas.0=nan: Input should be a finite number"),
        ({"resources": {"memory_gb": float("inf")}}, "resources.memory_gb=inf: Input should be a finite number"),
        ({"methods": [{"method": "npo", "grid": {"lr": []}}]}, "methods.0.grid.lr=[]: "),
        ({"methods": [{"method": "../npo"}]}, "methods.0.method='../npo': "),
        ({"name": "../b"}, "name='../b': "),
        ({"name": "/b"}, "name='/b': "),
        ({"name": "b\n"}, "name='b\\n': "),
        ({"name": "b" * 101}, "at most 100 characters"),
        ({"models": {"a\x1b[0m": {}}}, "the name 'a\\\\x1b[0m' of a model or task has odd characters"),
        ({"models": {"": {}}}, "at least 1 character"),
        ({"tasks": [" t"]}, "the name ' t' of a model or task has odd characters or outer spaces"),
        ({"dtype": "float33"}, "dtype='float33' is unknown; use auto, float32, bfloat16 or float16"),
        ({"batch_size": -1}, "batch_size"),
        ({"batch_size": "many"}, "batch_size='many': must be a whole number from 1 on, auto, or auto:N"),
        ({"imports": ["os; x"]}, "imports=['os; x']: 'os; x' is not the name of a Python module"),
        ({"imports": [""]}, "is not the name of a Python module"),
        ({"k" * 10**5: 1}, "is unknown"),
        ({"seed": 1}, "seed is unknown; did you mean 'seeds'?"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_board({**yaml.safe_load(BOARD), **change}, "board='x.yaml'")
    assert message in str(error.value)
    assert str(error.value).startswith("board='x.yaml': ")
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= 2000


@pytest.mark.parametrize("value", [1, "16", "auto", "auto:4"])
def test_batch_sizes_of_lm_eval(value: Any) -> None:
    assert make_board({**yaml.safe_load(BOARD), "batch_size": value}).batch_size == value


def test_a_grid_that_would_never_end_is_refused_at_once() -> None:
    grid = {f"s{number}": list(range(10)) for number in range(30)}
    content = {**yaml.safe_load(BOARD), "methods": [{"method": "npo", "grid": grid}]}
    with pytest.raises(UserError, match=f"make more than a billion cells; a board has at most {MAX_CELLS:,}"):
        make_board(content)
    whole = {**yaml.safe_load(BOARD), "seeds": list(range(MAX_CELLS))}
    assert len(make_board(whole).seeds) == MAX_CELLS
    with pytest.raises(UserError, match=f"make {2 * MAX_CELLS:,} cells"):
        make_board({**whole, "models": {"a": {}, "b": {}}})
