"""A local index as a search backend: its queries run in a few threads, beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from arft_fast.tools.search import Passage
from arft_fast.tools.tool import InfraFault


class LocalIndex(Protocol):
    """An open, read-only index: ``search_index.SearchIndex`` or ``search_tantivy.TantivyIndex``."""

    name: str

    @property
    def identity(self) -> str:
        """Of the file's content, for caches."""
        ...

    def search(self, query: str, top_k: int | None = None) -> list[Passage]:
        """Safe from many threads. Raises ``InfraFault`` when the index breaks or is closed."""
        ...

    def close(self) -> None: ...


class LocalSearch:
    """``index`` as a ``SearchBackend``. Owns it: ``close`` closes it.

    Args:
        threads: queries that run at the same time.
    """

    paid = False

    def __init__(self, index: LocalIndex, *, threads: int = 4) -> None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.name = index.name
        self._index = index
        self._closed = False
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="local-search")

    @property
    def identity(self) -> str:
        return self._index.identity

    async def search(self, query: str, top_k: int) -> list[Passage]:
        """See ``SearchBackend.search``."""
        if self._closed:
            raise InfraFault(f"{self.name} is closed")
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._index.search, query, top_k)

    async def start(self) -> str:
        """Nothing is to be started: the index was opened and checked when it was made."""
        return self.name

    async def close(self) -> None:
        """Wait for the queries under way, then release everything. Idempotent."""
        self._closed = True
        await asyncio.to_thread(self._threads.shutdown)
        self._index.close()

    def counters(self) -> Mapping[str, int]:
        return {}
