"""The store of results: one SQLite file, safe with several writing processes, consistent after a kill at any moment.

A *piece* is the unit of work: a model to make, or one task at one alpha of one model. Its key is a hash of everything
that decides the result, so an equal piece is never run twice.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lm_ortho.errors import UserError
from lm_ortho.files import create_private_file

NAME = "store.sqlite"
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
_SECONDS_BUSY = 60.0
"""How long a writer waits for the transaction of another, which takes milliseconds."""

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


_PROBES = (
    "SELECT key, cell, kind, config, status, result, error, owner, attempts, started, seconds FROM pieces LIMIT 0",
    "SELECT position, key FROM plan LIMIT 0",
    "SELECT id, command, started, ended, owner, log FROM runs LIMIT 0",
    "SELECT name, value FROM facts LIMIT 0",
)


@dataclass(frozen=True)
class Piece:
    """A unit of work. ``config`` describes it in full; ``kind`` is ``make``, ``tune`` or ``evaluate``."""

    key: str
    cell: str
    kind: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """A piece with its status and result; ``error`` is the text of a failure, ``seconds`` time the last attempt."""

    piece: Piece
    status: str = WAITING
    result: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    owner: str = ""
    attempts: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The record as plain JSON, without the numbers of single documents."""
        document_fields = ("samples", "groups", "documents")
        result = {name: value for name, value in self.result.items() if name not in document_fields}
        parts = {**self.piece.__dict__, "config": dict(self.piece.config)}
        return {**parts, "status": self.status, "result": result, "error": self.error, "seconds": self.seconds}


def current_owner() -> str:
    """Identity of this process, by which others can tell whether it is alive: host, process id, start time."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.2f}"


def is_alive(owner: str) -> bool:
    """Whether the process is alive; one on another host counts as alive, because it cannot be checked from here."""
    host, process_id, start_time = owner.rsplit(" ", 2)
    if host != socket.gethostname():
        return True
    try:
        process = psutil.Process(int(process_id))
        return abs(process.create_time() - float(start_time)) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def _connect(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection in write-ahead mode, closed at the end."""
    with closing(sqlite3.connect(path, timeout=_SECONDS_BUSY, isolation_level=None)) as db:
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode=WAL")
        yield db


class Store:
    """The file ``store.sqlite`` of a directory. Every change is one transaction."""

    def __init__(self, directory: Path, *, create: bool = True) -> None:
        """Raises ``UserError`` where the file is missing (``create=False``) or cannot be read or written."""
        self.path = directory / NAME
        if not create and not self.path.is_file():
            raise UserError(f"{str(directory)!r} holds no {NAME}: no sweep or board was run with this --out")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # Results and commands are for the owner; sqlite gives the files beside it the access rights of this one.
            with suppress(FileExistsError):
                create_private_file(self.path)
            with self._transaction() as db:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    db.execute(statement)
                for query in _PROBES:  # a database of another program may have tables of the same names
                    db.execute(query)
        except OSError as error:
            raise UserError(f"out={str(directory)!r} cannot be written ({error.strerror})") from None
        except sqlite3.DatabaseError as error:
            raise UserError(f"{str(self.path)!r} cannot be used as a store ({error})") from None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """An exclusive write transaction; rolled back after an error."""
        with _connect(self.path) as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def plan(self, pieces: Sequence[Piece], *, facts: Mapping[str, Any], keep: bool = False) -> None:
        """Stores the pieces of the table, in order; they replace an earlier plan, or are appended to it (``keep``)."""
        with self._transaction() as db:
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

    def get_fact(self, name: str) -> Any:
        """The fact that was stored under the name, or None."""
        with _connect(self.path) as db:
            row = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return json.loads(row["value"]) if row else None

    def claim(self, keys: Iterable[str], retry_failed: bool = False) -> list[str]:
        """Claims the pieces that are not done and not running in another live process; returns their keys."""
        claimed_keys, owner = [], current_owner()
        with self._transaction() as db:
            for key in keys:
                row = db.execute("SELECT status, owner FROM pieces WHERE key = ?", (key,)).fetchone()
                is_owned = row["status"] == RUNNING and row["owner"] != owner and is_alive(row["owner"])
                if row["status"] == DONE or is_owned or (row["status"] == FAILED and not retry_failed):
                    continue
                db.execute("UPDATE pieces SET status = ?, owner = ? WHERE key = ?", (RUNNING, owner, key))
                claimed_keys.append(key)
        return claimed_keys

    def begin(self, key: str) -> None:
        """Records that an attempt starts now."""
        with self._transaction() as db:
            db.execute(
                "UPDATE pieces SET attempts = attempts + 1, started = ? WHERE key = ? AND status = ?",
                (time.time(), key, RUNNING),
            )

    def finish(self, key: str, result: Mapping[str, Any], seconds: float) -> None:
        """Records that the piece is done."""
        self._set_result(key, DONE, json.dumps(dict(result), default=str), None, seconds)

    def fail(self, key: str, error: str, seconds: float = 0.0) -> None:
        """Records that the piece failed."""
        self._set_result(key, FAILED, None, _encodable(error), seconds)

    def _set_result(self, key: str, status: str, result: str | None, error: str | None, seconds: float) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE pieces SET status = ?, result = ?, error = ?, owner = NULL, seconds = ? WHERE key = ?",
                (status, result, error, round(seconds, 3), key),
            )

    def release(self, keys: Iterable[str] | None = None) -> None:
        """Returns claimed pieces to the waiting ones; by default all that this process has claimed."""
        with self._transaction() as db:
            rows = db.execute("SELECT key FROM pieces WHERE owner = ?", (current_owner(),))
            claimed_keys = [row["key"] for row in rows]
            released_keys = claimed_keys if keys is None else [key for key in keys if key in set(claimed_keys)]
            db.executemany(
                "UPDATE pieces SET status = ?, owner = NULL WHERE key = ? AND status = ?",
                [(WAITING, key, RUNNING) for key in released_keys],
            )

    def records(self, results: bool = True) -> list[Record]:
        """The pieces of the plan, in order; one whose process died is waiting again.

        ``results=False`` leaves out the results, which may be large.
        """
        columns = "key, cell, kind, config, status, error, owner, attempts, seconds" + (", result" if results else "")
        with _connect(self.path) as db:
            rows = db.execute(f"SELECT {columns} FROM plan JOIN pieces USING (key) ORDER BY position").fetchall()
        return [_record(dict(row)) for row in rows]

    def statuses(self) -> dict[str, str]:
        """The status of every piece of the plan by key, as in ``records``."""
        with _connect(self.path) as db:
            rows = db.execute("SELECT key, status, owner FROM plan JOIN pieces USING (key)").fetchall()
        return {row["key"]: _status(dict(row)) for row in rows}

    def start_run(self, command: str, log: str) -> int:
        """Records that a run starts now; returns its number."""
        with self._transaction() as db:
            entry = (_encodable(command), time.time(), current_owner(), _encodable(log))
            cursor = db.execute("INSERT INTO runs (command, started, owner, log) VALUES (?, ?, ?, ?)", entry)
        return int(cursor.lastrowid or 0)

    def end_run(self, number: int) -> None:
        """Records that the run ended, with or without errors."""
        with self._transaction() as db:
            db.execute("UPDATE runs SET ended = ? WHERE id = ?", (time.time(), number))

    def runs(self) -> list[dict[str, Any]]:
        """Every run with command, start, end (None: interrupted or running), log file, and whether it is alive."""
        with _connect(self.path) as db:
            runs = [dict(row) for row in db.execute("SELECT * FROM runs ORDER BY id")]
        return [run | {"alive": run["ended"] is None and is_alive(run["owner"])} for run in runs]


def _encodable(text: str) -> str:
    """``text`` with halves of surrogate pairs as escapes: an error may quote them, and sqlite stores UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _status(row: Mapping[str, Any]) -> str:
    is_orphaned = row["status"] == RUNNING and not is_alive(row["owner"])
    return WAITING if is_orphaned else str(row["status"])


def _record(row: Mapping[str, Any]) -> Record:
    return Record(
        piece=Piece(row["key"], row["cell"], row["kind"], json.loads(row["config"])),
        status=_status(row),
        result=json.loads(row["result"]) if row.get("result") else {},
        error=row["error"] or "",
        owner=row["owner"] or "",
        attempts=row["attempts"],
        seconds=row["seconds"] or 0.0,
    )
