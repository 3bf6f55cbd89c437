"""The search tool without a server: BM25 over a local SQLite FTS5 file.

Deterministic (equal scores in order of insertion), read-only, safe from many threads. Words are matched as SQLite's
``unicode61`` tokenizer cuts them, diacritics removed: scripts without spaces between words are matched poorly.
"""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from arft_fast.tools.tool import InfraFault, ToolResult

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_TERMS = 64
MAX_QUERY_CHARACTERS = 4096
_APPLICATION_ID = 0x41524654  # "ARFT": tells our files from any other SQLite file
_VERSION = 1
_THREADS = 4
_TERM = re.compile(r"\w+")
_STEPS_BETWEEN_CHECKS = 10_000  # of SQLite's virtual machine: well under a millisecond

_SEARCH = """
SELECT title, text FROM passages
JOIN (SELECT rowid AS id, bm25(passages) AS score FROM passages WHERE passages MATCH ? ORDER BY score, id LIMIT ?)
ON passages.rowid = id ORDER BY score, id
"""  # texts are read for the winners only


class Passage(NamedTuple):
    """One thing that can be found. Both fields are searched."""

    title: str
    text: str


def build_index(path: str | Path, passages: Iterable[tuple[str, str]]) -> None:
    """Write the index of ``passages`` (title, text) to ``path``: whole or not at all, replacing what was there.

    A ``SearchIndex`` that is open on the old file keeps reading the old file.

    Raises:
        ValueError: no passages, or one without text.
        RuntimeError: this Python's SQLite was built without FTS5.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        draft = Path(scratch) / path.name
        connection = sqlite3.connect(draft)
        try:
            connection.execute("PRAGMA journal_mode = OFF")  # a draft that breaks is thrown away
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {_VERSION}")
            _create_table(connection)
            connection.executemany("INSERT INTO passages (title, text) VALUES (?, ?)", _checked(passages))
            if connection.execute("SELECT count(*) FROM passages").fetchone() == (0,):
                raise ValueError("passages is empty: give at least one (title, text)")
            connection.execute("INSERT INTO passages (passages) VALUES ('optimize')")
            connection.commit()
        finally:
            connection.close()
        os.replace(draft, path)


class SearchIndex:
    """A file of ``build_index``, searched. ``close`` releases threads and connections.

    Args:
        path: the file; it is never written.
        top_k: passages of one answer.
        timeout_s: bound on one query.
        passage_limit: characters of one passage in ``render``.

    Raises:
        ValueError: ``path`` does not exist or is no such file.
    """

    name = "search"

    def __init__(self, path: str | Path, *, top_k: int = 3, timeout_s: float = 5.0, passage_limit: int = 2000) -> None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        if passage_limit < 1:
            raise ValueError(f"passage_limit must be at least 1, got {passage_limit}")
        self._path = Path(path).absolute()
        self._top_k = top_k
        self._timeout_s = timeout_s
        self._passage_limit = passage_limit
        self._closed = False
        # Connections wait here between queries: one for each query that ever ran at the same time, whatever its thread.
        self._idle = [_open(self._path)]
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="search-index")

    def search(self, query: str) -> list[Passage]:
        """The best ``top_k`` passages for any word of ``query``, best first. Any text is a query; no word, no passage.

        Raises:
            InfraFault: the file broke, ``timeout_s`` passed, or the index is closed.
        """
        expression = match_expression(query)
        if not expression:
            return []
        if self._closed:
            raise InfraFault(f"search index {self._path} is closed")
        try:
            connection = self._idle.pop()  # atomic
        except IndexError:
            try:
                connection = _open(self._path)
            except ValueError as error:  # it was in order when this object was made
                raise InfraFault(str(error)) from error
        deadline = time.monotonic() + self._timeout_s
        connection.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS_BETWEEN_CHECKS)
        try:
            rows = connection.execute(_SEARCH, (expression, self._top_k)).fetchall()
        except sqlite3.Error as error:
            connection.close()
            late = time.monotonic() > deadline
            reason = f"took longer than timeout_s = {self._timeout_s:g}" if late else f"failed: {error}"
            raise InfraFault(f"search in {self._path} {reason}") from error
        self._idle.append(connection)
        if self._closed:
            self._close_idle()
        return [Passage(*row) for row in rows]

    def render(self, passages: Sequence[Passage]) -> str:
        """``1. Content:<text> 2. Content:<text>``: the form of Visual-ARFT's scaffold, without the tags around it."""
        texts = [" ".join(passage.text.split())[: self._passage_limit] for passage in passages]
        return " ".join(f"{i}. Content:{text}" for i, text in enumerate(texts, start=1)) or "No results."

    async def call(self, argument: str, image: Image | None = None) -> ToolResult:
        """Search for ``argument``; ``image`` plays no part.

        Raises:
            InfraFault: see ``search``.
        """
        started = time.perf_counter()
        text, error = "", None
        if not match_expression(argument):
            error = "the query holds no word"
        elif self._closed:
            raise InfraFault(f"search index {self._path} is closed")
        else:
            text = self.render(await asyncio.get_running_loop().run_in_executor(self._threads, self.search, argument))
        return ToolResult(text=text, error=error, seconds=time.perf_counter() - started)

    async def start(self) -> str:
        """Nothing is to be started: the file was opened and checked when this object was made."""
        return f"{self.name}: BM25 over {self._path.name}, top {self._top_k}"

    async def close(self) -> None:
        """Wait for the queries under way, then release everything. Idempotent."""
        self._closed = True
        await asyncio.to_thread(self._threads.shutdown)
        self._close_idle()

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()


def match_expression(query: str) -> str:
    """An FTS5 expression that matches any word of ``query``; empty when it holds none.

    Every word stands in quotes and holds letters, digits and underscores only, so nothing in it is syntax.
    """
    words = dict.fromkeys(word.lower() for word in _TERM.findall(query[:MAX_QUERY_CHARACTERS]))
    return " OR ".join(f'"{word}"' for word in list(words)[:MAX_TERMS])


def _checked(passages: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    for number, (title, text) in enumerate(passages):
        if not text.strip():
            raise ValueError(f"passages[{number}] ({title!r}) has no text")
        yield title, text


def _create_table(connection: sqlite3.Connection) -> None:
    try:
        connection.execute(
            "CREATE VIRTUAL TABLE passages USING fts5 (title, text, tokenize = 'unicode61 remove_diacritics 2')"
        )
    except sqlite3.OperationalError as error:
        raise RuntimeError(f"SQLite {sqlite3.sqlite_version} lacks FTS5; use a Python whose sqlite3 has it") from error


def _open(path: Path) -> sqlite3.Connection:
    remedy = "write it with build_index(path, passages)"
    if not path.is_file():
        raise ValueError(f"search index {path} does not exist; {remedy}")
    # immutable: no lock and no journal is looked for; build_index replaces files and never changes one
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True, check_same_thread=False)
    try:
        (kind,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if (kind, version) != (_APPLICATION_ID, _VERSION):
            raise ValueError(f"search index {path} was not written by this version of build_index; {remedy}")
        connection.execute(_SEARCH, ('"a"', 1)).fetchall()
    except sqlite3.Error as error:
        connection.close()
        raise ValueError(f"search index {path} cannot be read ({error}); {remedy}") from error
    except ValueError:
        connection.close()
        raise
    return connection
