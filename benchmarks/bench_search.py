"""The local searches, and an answer that the cache holds: one thread, one query after the other.

100,000 passages of 100 words whose frequencies follow Zipf's law. A query is six different words of a passage, drawn as
they come, frequent ones too; top 5. A search must find that passage for most queries before it is timed. Each query
runs three times and its shortest time counts: p99 is of the hardest queries, not of what else the machine does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from arft_fast.tools.search import Passage
from arft_fast.tools.search_cache import CachedSearch
from arft_fast.tools.search_index import SearchIndex, build_index
from arft_fast.tools.search_local import LocalIndex, LocalSearch
from arft_fast.tools.search_tantivy import TantivyIndex, build_tantivy

from .table import Entry, Table, cell

PASSAGES, WORDS, VOCABULARY, QUERIES, TOP_K = 100_000, 100, 50_000, 300, 5
FOUND = 0.9
"""Share of the queries whose passage must be among the first five. FTS5 leaves the most frequent words out."""


@dataclass(frozen=True)
class SearchRow(Entry):
    """``ms`` is the median of the queries."""

    build_s: float
    disk_mib: float
    found: float

    def cells(self) -> dict[str, str]:
        return {
            "p50 ms": cell(self.ms, 2),
            "p99 ms": cell(float(np.percentile(self.samples_ms, 99)), 2),
            "found": f"{self.found:.0%}",
            "build s": cell(self.build_s, 1),
            "disk MiB": cell(self.disk_mib, 1),
        }


@dataclass(frozen=True)
class Corpus:
    """Word numbers of the passages, and the queries with the number of the passage that each is of."""

    words: np.ndarray
    queries: Sequence[tuple[str, int]]

    def passages(self) -> Iterator[tuple[str, str]]:
        names = np.array([f"w{number}" for number in range(VOCABULARY)], dtype=object)
        for number, row in enumerate(self.words):
            yield f"t{number}", " ".join(names[row])


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, VOCABULARY + 1)
    cumulated = np.cumsum(shares / shares.sum())
    words = np.searchsorted(cumulated, rng.random((PASSAGES, WORDS)))
    queries = []
    for number in rng.choice(PASSAGES, QUERIES, replace=False):
        different = list(dict.fromkeys(rng.permutation(words[number]).tolist()))[:6]
        queries.append((" ".join(f"w{word}" for word in different), int(number)))
    return Corpus(words, queries)


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> Table:
    return Table(f"search: {PASSAGES:,} passages of {WORDS} words, {QUERIES} queries of six, top {TOP_K}, one thread")


def measure(
    name: str, corpus: Corpus, path: Path, build: Callable[[Path], None], open_index: Callable[[Path], LocalIndex]
) -> SearchRow:
    """Build, check and time one search."""
    started = time.perf_counter()
    build(path)
    build_s = time.perf_counter() - started
    index = open_index(path)
    files = [path] if path.is_file() else list(path.iterdir())
    hits = [
        f"t{number}" in {passage.title for passage in index.search(query, TOP_K)} for query, number in corpus.queries
    ]
    found = sum(hits) / len(hits)
    assert found >= FOUND, f"{name} finds the passage of {found:.0%} of the queries"
    samples_ms = [fastest_ms(partial(index.search, query, TOP_K)) for query, _ in corpus.queries]
    index.close()
    disk_mib = sum(file.stat().st_size for file in files) / 2**20
    return SearchRow(name, float(np.median(samples_ms)), tuple(samples_ms), None, build_s, disk_mib, found)


def fastest_ms(search: Callable[[], object]) -> float:
    """Of three runs."""
    seconds = []
    for _ in range(3):
        before = time.perf_counter()
        search()
        seconds.append(time.perf_counter() - before)
    return 1e3 * min(seconds)


def publish(name: str, row: SearchRow, figures: dict[str, float], table: Table, tables: list[Table]) -> None:
    """Into the figures and the table that all searches share."""
    figures[f"search.{name}_p50_ms"] = row.ms
    figures[f"search.{name}_p99_ms"] = float(np.percentile(row.samples_ms, 99))
    figures[f"search.{name}_build_s"] = row.build_s
    figures[f"search.{name}_disk_mib"] = row.disk_mib
    table.rows.append(row)
    if table not in tables:
        tables.append(table)


def test_fts5(corpus: Corpus, table: Table, tmp_path: Path, figures: dict[str, float], tables: list[Table]) -> None:
    row = measure(
        "SQLite FTS5", corpus, tmp_path / "fts5", lambda path: build_index(path, corpus.passages()), SearchIndex
    )
    publish("fts5", row, figures, table, tables)


def test_tantivy(corpus: Corpus, table: Table, tmp_path: Path, figures: dict[str, float], tables: list[Table]) -> None:
    if find_spec("tantivy") is None:
        table.left_out["tantivy"] = "not installed"
        pytest.skip("tantivy is not installed")
    row = measure(
        "tantivy", corpus, tmp_path / "tantivy", lambda path: build_tantivy(path, corpus.passages()), TantivyIndex
    )
    publish("tantivy", row, figures, table, tables)


def test_an_answer_of_the_cache(tmp_path: Path, figures: dict[str, float]) -> None:
    build_index(tmp_path / "index", [(f"t{number}", f"word{number} " * WORDS) for number in range(QUERIES)])
    queries = [f"word{number}" for number in range(QUERIES)]

    async def run() -> list[float]:
        cache = CachedSearch(LocalSearch(SearchIndex(tmp_path / "index")), tmp_path / "cache")
        fetched = [await cache.search(query, TOP_K) for query in queries]
        samples_ms, stored = [], list[list[Passage]]()
        for query in queries:
            before = time.perf_counter()
            stored.append(await cache.search(query, TOP_K))
            samples_ms.append(1e3 * (time.perf_counter() - before))
        await cache.close()
        assert stored == fetched and cache.counters()["hits"] == QUERIES
        return samples_ms

    figures["search.cache_hit_p50_ms"] = float(np.median(asyncio.run(run())))
