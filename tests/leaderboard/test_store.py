"""The store of sweeps and boards: claims, two writers, kills, damage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lm_ortho.errors import UserError
from lm_ortho.leaderboard import store as store_module
from lm_ortho.leaderboard.progress import TimeEstimate
from lm_ortho.leaderboard.store import DONE, FAILED, NAME, RUNNING, WAITING, Piece, Record, Store

PIECES = [Piece(f"key{number}", "cell", "evaluate", {"task": f"t{number}", "alpha": 0.0}) for number in range(4)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    store.plan(PIECES, facts={"name": "test"})
    return store


def test_a_piece_goes_from_waiting_to_done(store: Store) -> None:
    assert set(store.statuses().values()) == {WAITING}
    assert store.claim(["key0", "key1"]) == ["key0", "key1"]
    assert store.statuses()["key0"] == RUNNING
    store.begin("key0")
    store.finish("key0", {"values": {"t0": {"acc": [0.5, 0.4, 0.6, True]}}}, 1.23456)
    store.fail("key1", "out of luck", 2)
    first, second, *_ = store.records()
    assert (first.status, first.seconds, first.attempts) == (DONE, 1.235, 1)
    assert first.result["values"]["t0"]["acc"] == [0.5, 0.4, 0.6, True]
    assert (second.status, second.error) == (FAILED, "out of luck")
    assert store.claim(["key0", "key1", "key2"]) == ["key2"]
    assert store.claim(["key0", "key1"], retry_failed=True) == ["key1"]
    store.release()
    assert store.statuses() == {"key0": DONE, "key1": WAITING, "key2": WAITING, "key3": WAITING}


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_only_the_owner_may_read_it(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        store = Store(tmp_path / "out")
        with store_module._connect(store.path) as db:
            db.execute("INSERT INTO facts VALUES ('a', '1')")
            modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys((NAME, f"{NAME}-wal", f"{NAME}-shm"), 0o600)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask  # the pages in it are for everybody


def test_an_error_with_half_a_surrogate_pair_is_stored(store: Store) -> None:
    store.fail("key0", "no \ud800")
    store.start_run("lm-ortho sweep \udcff", "logs/run-1.log")
    assert store.records()[0].error == r"no \ud800"
    assert store.runs()[0]["command"] == r"lm-ortho sweep \udcff"


def test_the_order_is_that_of_the_plan_and_a_new_plan_keeps_results(store: Store) -> None:
    store.finish("key3", {}, 1)
    store.plan([PIECES[3], PIECES[1]], facts={})
    assert [(record.piece.key, record.status) for record in store.records()] == [("key3", DONE), ("key1", WAITING)]
    store.plan(PIECES[:2], facts={}, keep=True)
    assert [record.piece.key for record in store.records(results=False)] == ["key3", "key1", "key0"]
    assert store.get_fact("name") == "test"
    assert store.get_fact("nothing") is None


def test_what_a_living_process_is_at_is_left_to_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.claim(["key0"])
    owner = store_module.current_owner()
    assert store_module.is_alive(owner)
    monkeypatch.setattr(store_module, "current_owner", lambda: f"{owner.split()[0]} 1 0.00")
    assert store.claim(["key0", "key1"]) == ["key1"]
    monkeypatch.undo()
    assert store.statuses()["key1"] == WAITING  # process 1 did not start at 0.00: another one has its number


def test_a_process_on_another_host_counts_as_alive(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "current_owner", lambda: "elsewhere 7 1.00")
    store.claim(["key0"])
    monkeypatch.undo()
    assert store.claim(["key0"]) == []


_WRITER = """
import sys
from pathlib import Path
from lm_ortho.leaderboard.store import Store
store = Store(Path(sys.argv[1]), create=False)
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    for key in store.claim([f"key{number}"]):
        store.begin(key)
        store.finish(key, {"by": sys.argv[2]}, 0.1)
"""


def _writer(directory: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _WRITER, str(directory), name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_write_and_no_piece_is_done_twice(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.plan([Piece(f"key{number}", "cell", "evaluate", {}) for number in range(100)], facts={})
    writers = [_writer(tmp_path, name) for name in "ab"]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    assert [writer.wait(60) for writer in writers] == [0, 0]
    records = store.records()
    assert {record.status for record in records} == {DONE}
    assert {record.attempts for record in records} == {1}
    for writer in writers:
        for stream in (writer.stdin, writer.stdout):
            assert stream is not None
            stream.close()


def test_what_a_killed_process_was_at_waits_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.plan(PIECES, facts={})
    code = _WRITER.split("print(")[0] + "store.claim(['key0']); print('claimed', flush=True); sys.stdin.readline()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        assert store.statuses()["key0"] == RUNNING
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert store.statuses()["key0"] == WAITING
    assert store.claim(["key0"]) == ["key0"]


def test_runs_say_whether_they_are_alive(store: Store) -> None:
    number = store.start_run("lm-ortho sweep", "logs/run-1.log")
    assert [(run["command"], run["alive"]) for run in store.runs()] == [("lm-ortho sweep", True)]
    store.end_run(number)
    assert store.runs()[0]["alive"] is False


def test_bad_places_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sweep or board was run"):
        Store(tmp_path / "nothing", create=False)
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Store(tmp_path / "file")
    (tmp_path / "store.sqlite").write_text("this is no database, but it is long enough to be read as one" * 10)
    with pytest.raises(UserError, match="cannot be used as a store"):
        Store(tmp_path)


def test_the_time_left_is_estimated_from_comparable_pieces() -> None:
    def record(kind: str, name: str, seconds: float | None) -> Record:
        config = {"task": name} if kind == "evaluate" else {"method": name}
        status = WAITING if seconds is None else DONE
        return Record(Piece(f"{kind} {name} {seconds}", "cell", kind, config), status, seconds=seconds or 0.0)

    finished_records = [
        record("make", "ortho", 1000),
        record("tune", "npo", 20),
        record("tune", "npo", 24),
        record("tune", "npo", 150),
        record("tune", "rmu", 10),
        record("evaluate", "a", 5),
    ]
    assert TimeEstimate([*finished_records, record("make", "ortho", None)]).seconds() == 1000
    assert TimeEstimate([*finished_records, record("make", "npo", None)]).seconds() == 24, (
        "one slow try is no reason to expect more"
    )
    assert TimeEstimate([*finished_records, record("make", "wanda", None)]).seconds() == 24, "nor is one slow method"
    assert TimeEstimate([*finished_records, record("evaluate", "b", None)]).seconds() == 5
    estimate = TimeEstimate([*finished_records, record("evaluate", "b", None), record("make", "rmu", None)])
    assert estimate.text() == "about 15 s left"
    estimate.add("make rmu None", 40)
    assert estimate.seconds() == 5
    assert TimeEstimate([record("make", "ortho", None)]).text() == "time left unknown yet"
    assert TimeEstimate([record("make", "ortho", 3)]).text() == "nothing left"
