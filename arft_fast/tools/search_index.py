"""A search without a server or a dependency: BM25 over a local SQLite FTS5 file.

Deterministic (equal scores in order of insertion), read-only, safe from many threads and processes. Words are matched
as SQLite's ``unicode61`` tokenizer cuts them, diacritics removed: scripts without spaces between words are matched
poorly.

FTS5 scores every passage that holds any word of the query, so a word that is in more than a tenth of all passages, and
in more than 2,000, is left out of the query when a rarer one is there: it says little about which passage is meant and
costs nearly all of the time. Above a million passages ``search_tantivy``, which skips what cannot win, is the better
choice.
"""

from __future__ import annotations

import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

from arft_fast.tools.search import MAX_QUERY_CHARACTERS, Passage
from arft_fast.tools.tool import InfraFault

MAX_TERMS = 64
COMMON_SHARE = 0.1
COMMON_PASSAGES = 2000
"""A word is common when it is in more passages than both this number and ``COMMON_SHARE`` of all."""
_APPLICATION_ID = 0x41524654  # "ARFT": tells our files from any other SQLite file
_VERSION = 2
_TERM = re.compile(r"\w+")
_STEPS_BETWEEN_CHECKS = 10_000  # of SQLite's virtual machine: well under a millisecond

_SEARCH = """
SELECT title, text FROM passages
JOIN (SELECT rowid AS id, bm25(passages) AS score FROM passages WHERE passages MATCH ? ORDER BY score, id LIMIT ?)
ON passages.rowid = id ORDER BY score, id
"""  # texts are read for the winners only


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
            _create_tables(connection)
            connection.executemany("INSERT INTO passages (title, text) VALUES (?, ?)", checked(passages))
            (count,) = connection.execute("SELECT count(*) FROM passages").fetchone()
            if not count:
                raise ValueError("passages is empty: give at least one (title, text)")
            connection.execute("INSERT INTO passages (passages) VALUES ('optimize')")
            limit = max(COMMON_PASSAGES, int(COMMON_SHARE * count))
            connection.execute("INSERT INTO common SELECT term, doc FROM temp.vocabulary WHERE doc > ?", (limit,))
            connection.commit()
        finally:
            connection.close()
        os.replace(draft, path)


class SearchIndex:
    """A file of ``build_index``, searched. ``close`` releases its connections.

    Args:
        path: the file; it is never written.
        top_k: passages of one answer, where a query does not say.
        timeout_s: bound on one query.

    Raises:
        ValueError: ``path`` does not exist or is no such file.
    """

    def __init__(self, path: str | Path, *, top_k: int = 3, timeout_s: float = 5.0) -> None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self._path = Path(path).absolute()
        self.name = f"BM25 over {self._path.name}"
        self.top_k = top_k
        self._timeout_s = timeout_s
        self._closed = False
        # Connections wait here between queries: one for each query that ever ran at the same time, whatever its thread.
        self._idle = [_open(self._path)]
        self._common: Mapping[str, int] = dict(self._idle[0].execute("SELECT term, passages FROM common"))
        written = self._path.stat()
        self.identity = f"fts5:{self._path.name}:{written.st_size}:{written.st_mtime_ns}"

    def search(self, query: str, top_k: int | None = None) -> list[Passage]:
        """The best ``top_k`` passages for any word of ``query``, best first. Any text is a query; no word, no passage.

        Raises:
            InfraFault: the file broke, ``timeout_s`` passed, or the index is closed.
        """
        expression = match_expression(query, self._common)
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
            rows = connection.execute(_SEARCH, (expression, top_k or self.top_k)).fetchall()
        except sqlite3.Error as error:
            connection.close()
            late = time.monotonic() > deadline
            reason = f"took longer than timeout_s = {self._timeout_s:g}" if late else f"failed: {error}"
            raise InfraFault(f"search in {self._path} {reason}") from error
        self._idle.append(connection)
        if self._closed:
            self._close_idle()
        return [Passage(*row) for row in rows]

    def close(self) -> None:
        """Release everything, what a query under way uses when it ends. Idempotent."""
        self._closed = True
        self._close_idle()

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()


def query_words(query: str) -> list[str]:
    """The first ``MAX_TERMS`` different words of ``query``, in lower case: letters, digits and underscores only."""
    return list(dict.fromkeys(word.lower() for word in _TERM.findall(query[:MAX_QUERY_CHARACTERS])))[:MAX_TERMS]


def match_expression(query: str, common: Mapping[str, int] | None = None) -> str:
    """An FTS5 expression that matches any word of ``query``; empty when it holds none.

    Every word stands in quotes, so nothing in it is syntax. Words of ``common`` (with the number of their passages) are
    left out; when all are common, the rarest stays.
    """
    words = query_words(query)
    if common and words:
        words = [word for word in words if word not in common] or [min(words, key=lambda word: common[word])]
    return " OR ".join(f'"{word}"' for word in words)


def checked(passages: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    """``passages``, each with text; ``ValueError`` names the first without."""
    for number, (title, text) in enumerate(passages):
        if not text.strip():
            raise ValueError(f"passages[{number}] ({title!r}) has no text")
        yield title, text


def _create_tables(connection: sqlite3.Connection) -> None:
    try:
        connection.execute(
            "CREATE VIRTUAL TABLE passages USING fts5 (title, text, tokenize = 'unicode61 remove_diacritics 2')"
        )
    except sqlite3.OperationalError as error:
        raise RuntimeError(f"SQLite {sqlite3.sqlite_version} lacks FTS5; use a Python whose sqlite3 has it") from error
    connection.execute("CREATE TABLE common (term TEXT PRIMARY KEY, passages INTEGER) WITHOUT ROWID")
    connection.execute("CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab (main, passages, row)")


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
