"""What searches share across ranks and runs, in one SQLite file: answers, claims, a rate limit and a budget.

- answers: under a key of 32 bytes, until a point of time.
- claims: who is fetching an answer, so that no one pays for it twice. A claim ends with its lease: a process that was
  killed does not block the others.
- buckets: a token bucket for each rate limit. A caller reserves the next free slot and is told how long to wait.
- budgets: paid calls of a run.

The file is in write-ahead mode, which needs shared memory: processes of one machine, on a local disk. Times are those
of the machine's clock. A file that is damaged is set aside, not repaired; a budget then begins anew.
Methods block for about a millisecond and are safe from several processes, not from several threads.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from arft_fast.tools.search import Passage
from arft_fast.tools.tool import InfraFault

_APPLICATION_ID = 0x41524643  # "ARFC"
_VERSION = 1
_BUSY_S = 10.0
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}
_TABLES = f"""
CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, passages TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS claims (key BLOB PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS buckets (name TEXT PRIMARY KEY, tokens REAL NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS budgets (run TEXT PRIMARY KEY, calls INTEGER NOT NULL) WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
"""
Value = TypeVar("Value")


class SearchStore:
    """The file ``path``, made when it is not there. Every method may raise ``InfraFault``: the file cannot be used.

    Args:
        clock: seconds since the epoch.

    Raises:
        ValueError: the folder does not exist, or ``path`` is a database of something else.
    """

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = Path(path).absolute()
        self.set_aside: list[Path] = []
        """Damaged files that this object moved out of the way."""
        self._clock = clock
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        if not self.path.parent.is_dir():
            raise ValueError(f"search cache {self.path}: its folder does not exist; make it or give another path")
        try:
            self._execute(lambda connection: connection.execute("DELETE FROM answers WHERE until <= ?", (clock(),)))
        except InfraFault as error:
            raise ValueError(f"{error}; give another path") from error

    def answer(self, key: bytes) -> list[Passage] | None:
        """What was stored under ``key``, None when there is nothing or it is out of date."""

        def read(connection: sqlite3.Connection) -> list[Passage] | None:
            query = "SELECT passages FROM answers WHERE key = ? AND until > ?"
            row = connection.execute(query, (key, self._clock())).fetchone()
            return None if row is None else [Passage(*passage) for passage in json.loads(row[0])]

        return self._execute(read)

    def claim(self, key: bytes, owner: str, lease_s: float) -> bool:
        """Whether ``owner`` now is the one who fetches ``key``: nobody else's lease runs."""

        def write(connection: sqlite3.Connection) -> bool:
            now = self._clock()
            held = "SELECT 1 FROM claims WHERE key = ? AND owner != ? AND until > ?"
            with _writing(connection):
                if connection.execute(held, (key, owner, now)).fetchone():
                    return False
                connection.execute("REPLACE INTO claims VALUES (?, ?, ?)", (key, owner, now + lease_s))
            return True

        return self._execute(write)

    def release(self, key: bytes, owner: str) -> None:
        """Give ``owner``'s claim up."""
        self._execute(lambda c: c.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, owner)))

    def put(self, key: bytes, passages: Sequence[Passage], ttl_s: float) -> None:
        """Store an answer for ``ttl_s`` seconds."""
        row = (key, json.dumps(passages, ensure_ascii=False), self._clock() + ttl_s)
        self._execute(lambda connection: connection.execute("REPLACE INTO answers VALUES (?, ?, ?)", row))

    def reserve(self, bucket: str, rate_per_s: float, burst: float, longest_wait_s: float) -> float | None:
        """Seconds until the caller's turn, now reserved; None when that would be more than ``longest_wait_s``."""

        def write(connection: sqlite3.Connection) -> float | None:
            now = self._clock()
            with _writing(connection):
                row = connection.execute("SELECT tokens, at FROM buckets WHERE name = ?", (bucket,)).fetchone()
                tokens, at = row or (burst, now)
                tokens = min(burst, tokens + max(0.0, now - at) * rate_per_s) - 1.0
                wait_s = max(0.0, -tokens / rate_per_s)
                if wait_s > longest_wait_s:
                    return None
                connection.execute("REPLACE INTO buckets VALUES (?, ?, ?)", (bucket, tokens, now))
            return wait_s

        return self._execute(write)

    def spend(self, run: str, budget: int) -> bool:
        """Count one more paid call of ``run``; False, and nothing counted, when ``budget`` is used up."""

        def write(connection: sqlite3.Connection) -> bool:
            with _writing(connection):
                row = connection.execute("SELECT calls FROM budgets WHERE run = ?", (run,)).fetchone()
                calls = row[0] if row else 0
                if calls >= budget:
                    return False
                connection.execute("REPLACE INTO budgets VALUES (?, ?)", (run, calls + 1))
            return True

        return self._execute(write)

    def close(self) -> None:
        """Idempotent; a later call opens the file again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _execute(self, work: Callable[[sqlite3.Connection], Value]) -> Value:
        """``work`` on the open file; once more on a new one when the file turns out to be damaged."""
        try:
            try:
                return work(self._open())
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGE:
                    raise
            self._replace_damaged()
            return work(self._open())
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            self.close()
            raise InfraFault(f"search cache {self.path} cannot be used: {error}") from error

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            with self._exclusive():
                connection = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
                self._connection, self._inode = connection, self.path.stat().st_ino
                (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
                if tables and _mark(connection) != (_APPLICATION_ID, _VERSION):
                    raise ValueError("it is a database of something else, or of another version")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.executescript(_TABLES)
        return self._connection

    def _replace_damaged(self) -> None:
        """Move the damaged file away, unless another process has done so already."""
        self.close()
        with self._exclusive():
            if not self.path.exists() or self.path.stat().st_ino != self._inode:
                return
            aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
            for suffix in ("-wal", "-shm", ""):
                file = self.path.with_name(self.path.name + suffix)
                if file.exists():
                    os.replace(file, aside.with_name(aside.name + suffix))
            self.set_aside.append(aside)
        logging.getLogger(__name__).warning("search cache %s is damaged: set aside as %s", self.path, aside.name)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Alone among processes: for opening and replacing the file."""
        with open(self.path.with_name(self.path.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _mark(connection: sqlite3.Connection) -> tuple[int, int]:
    (kind,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return kind, version


@contextmanager
def _writing(connection: sqlite3.Connection) -> Iterator[None]:
    """A transaction that no other process writes beside."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:  # a serious error has ended it already
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
