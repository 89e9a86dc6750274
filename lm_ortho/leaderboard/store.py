"""What is finished: one SQLite file, safe with several processes writing, whole after a kill at any moment.

A *piece* is what is done or not done: a model that was made, or one task at one alpha of one model. Its key is a hash
of everything that decides the result, so an equal piece is never done twice.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lm_ortho.errors import UserError

NAME = "store.sqlite"
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
_SECONDS_BUSY = 60.0
"""How long a writer waits for another one's transaction, which takes milliseconds."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS pieces (
    key TEXT PRIMARY KEY,
    cell TEXT NOT NULL,
    kind TEXT NOT NULL,
    config TEXT NOT NULL,
    status TEXT NOT NULL,
    result TEXT,
    error TEXT,
    owner TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    started REAL,
    seconds REAL
);
CREATE TABLE IF NOT EXISTS plan (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY, command TEXT NOT NULL, started REAL NOT NULL, ended REAL, owner TEXT, log TEXT
);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Piece:
    """One thing to do. ``config`` says what, in full; ``kind`` is ``make``, ``tune`` or ``evaluate``."""

    key: str
    cell: str
    kind: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """A piece with what became of it; ``error`` ends the traceback, ``seconds`` are those of the last attempt."""

    piece: Piece
    status: str = WAITING
    result: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    owner: str = ""
    attempts: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Everything but the numbers of single documents."""
        single = ("samples", "groups", "documents")
        result = {name: value for name, value in self.result.items() if name not in single}
        parts = {**self.piece.__dict__, "config": dict(self.piece.config)}
        return {**parts, "status": self.status, "result": result, "error": self.error, "seconds": self.seconds}


def owner_now() -> str:
    """This process, so that others can tell whether it is still alive: host, id, and when it started."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.2f}"


def is_alive(owner: str) -> bool:
    """Whether the process is there; one on another host counts as alive, nobody here can tell."""
    host, number, started = owner.rsplit(" ", 2)
    if host != socket.gethostname():
        return True
    try:
        process = psutil.Process(int(number))
        return abs(process.create_time() - float(started)) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Store:
    """The file ``store.sqlite`` of a directory. Every change is one transaction."""

    def __init__(self, directory: Path, *, create: bool = True) -> None:
        """Raises ``UserError`` where there is none (``create`` false), or it cannot be read or written."""
        self.path = directory / NAME
        if not create and not self.path.is_file():
            raise UserError(f"{str(directory)!r} holds no {NAME}: no sweep or board was run with this --out")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with self._changing() as db:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    db.execute(statement)
        except OSError as error:
            raise UserError(f"out={str(directory)!r} cannot be written ({error.strerror})") from None
        except sqlite3.DatabaseError as error:
            raise UserError(f"{str(self.path)!r} cannot be used as a store ({error})") from None

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=_SECONDS_BUSY, isolation_level=None)) as db:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA journal_mode=WAL")
            yield db

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that sees no other writer; rolled back after an error."""
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def plan(self, pieces: Sequence[Piece], *, facts: Mapping[str, Any], keep: bool = False) -> None:
        """Writes down what belongs to the table, in order, in the place of an earlier plan or (``keep``) after it."""
        with self._changing() as db:
            before = [row["key"] for row in db.execute("SELECT key FROM plan ORDER BY position")] if keep else []
            keys = dict.fromkeys([*before, *(piece.key for piece in pieces)])
            db.execute("DELETE FROM plan")
            db.executemany("INSERT INTO plan VALUES (?, ?)", enumerate(keys))
            db.executemany(
                "INSERT OR IGNORE INTO pieces (key, cell, kind, config, status) VALUES (?, ?, ?, ?, ?)",
                [(p.key, p.cell, p.kind, json.dumps(dict(p.config), sort_keys=True), WAITING) for p in pieces],
            )
            for name, value in facts.items():
                db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def fact(self, name: str) -> Any:
        """What was written down under the name, or None."""
        with self._reading() as db:
            row = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return json.loads(row["value"]) if row else None

    def claim(self, keys: Iterable[str], retry_failed: bool = False) -> list[str]:
        """Of the pieces those that this process has to do now: not done, and nobody alive is at them."""
        mine, owner = [], owner_now()
        with self._changing() as db:
            for key in keys:
                row = db.execute("SELECT status, owner FROM pieces WHERE key = ?", (key,)).fetchone()
                taken = row["status"] == RUNNING and row["owner"] != owner and is_alive(row["owner"])
                if row["status"] == DONE or taken or (row["status"] == FAILED and not retry_failed):
                    continue
                db.execute("UPDATE pieces SET status = ?, owner = ? WHERE key = ?", (RUNNING, owner, key))
                mine.append(key)
        return mine

    def begin(self, key: str) -> None:
        """Counts an attempt, which starts now."""
        with self._changing() as db:
            db.execute(
                "UPDATE pieces SET attempts = attempts + 1, started = ? WHERE key = ? AND status = ?",
                (time.time(), key, RUNNING),
            )

    def finish(self, key: str, result: Mapping[str, Any], seconds: float) -> None:
        """The piece is done."""
        self._settle(key, DONE, json.dumps(dict(result), default=str), None, seconds)

    def fail(self, key: str, error: str, seconds: float = 0.0) -> None:
        """The piece ended in an error."""
        self._settle(key, FAILED, None, error, seconds)

    def _settle(self, key: str, status: str, result: str | None, error: str | None, seconds: float) -> None:
        with self._changing() as db:
            db.execute(
                "UPDATE pieces SET status = ?, result = ?, error = ?, owner = NULL, seconds = ? WHERE key = ?",
                (status, result, error, round(seconds, 3), key),
            )

    def release(self, keys: Iterable[str] | None = None) -> None:
        """Gives claimed pieces back undone; all of this process without ``keys``."""
        with self._changing() as db:
            mine = [row["key"] for row in db.execute("SELECT key FROM pieces WHERE owner = ?", (owner_now(),))]
            wanted = mine if keys is None else [key for key in keys if key in set(mine)]
            db.executemany(
                "UPDATE pieces SET status = ?, owner = NULL WHERE key = ? AND status = ?",
                [(WAITING, key, RUNNING) for key in wanted],
            )

    def forget(self, keys: Iterable[str]) -> None:
        """Makes pieces undone again."""
        with self._changing() as db:
            db.executemany(
                "UPDATE pieces SET status = ?, result = NULL, owner = NULL WHERE key = ?",
                [(WAITING, key) for key in keys],
            )

    def records(self, results: bool = True) -> list[Record]:
        """The pieces of the plan, in order; one whose process died is waiting again. ``results`` may be left out."""
        columns = "key, cell, kind, config, status, error, owner, attempts, seconds" + (", result" if results else "")
        with self._reading() as db:
            rows = db.execute(f"SELECT {columns} FROM plan JOIN pieces USING (key) ORDER BY position").fetchall()
        return [_record(dict(row)) for row in rows]

    def statuses(self) -> dict[str, str]:
        """Where every piece of the plan stands, as in ``records``."""
        with self._reading() as db:
            rows = db.execute("SELECT key, status, owner FROM plan JOIN pieces USING (key)").fetchall()
        return {row["key"]: _status(dict(row)) for row in rows}

    def start_run(self, command: str, log: str) -> int:
        """Number of a run that starts now."""
        with self._changing() as db:
            entry = (command, time.time(), owner_now(), log)
            made = db.execute("INSERT INTO runs (command, started, owner, log) VALUES (?, ?, ?, ?)", entry)
        return int(made.lastrowid or 0)

    def end_run(self, number: int) -> None:
        """The run is over, however it went."""
        with self._changing() as db:
            db.execute("UPDATE runs SET ended = ? WHERE id = ?", (time.time(), number))

    def runs(self) -> list[dict[str, Any]]:
        """Every run with command, start, end (None: interrupted, or still at work) and log file."""
        with self._reading() as db:
            found = [dict(row) for row in db.execute("SELECT * FROM runs ORDER BY id")]
        return [run | {"alive": run["ended"] is None and is_alive(run["owner"])} for run in found]


def _status(row: Mapping[str, Any]) -> str:
    died = row["status"] == RUNNING and not is_alive(row["owner"])
    return WAITING if died else str(row["status"])


def _record(row: Mapping[str, Any]) -> Record:
    return Record(
        Piece(row["key"], row["cell"], row["kind"], json.loads(row["config"])),
        _status(row),
        json.loads(row["result"]) if row.get("result") else {},
        row["error"] or "",
        row["owner"] or "",
        row["attempts"],
        row["seconds"] or 0.0,
    )
