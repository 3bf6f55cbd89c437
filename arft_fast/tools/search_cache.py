"""A backend behind a disk cache, with all that keeps a paid service affordable and a failing one bearable.

The samples of a group ask the same things, and so do the ranks. An answer is fetched once: callers of this process wait
for the one that fetches (single flight), other processes see its claim in the file and wait too. What is fetched obeys
a rate limit and a budget that all processes share, and a circuit breaker of this process. Faults are never stored.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import TypeVar

from arft_fast.tools.circuit_breaker import CircuitBreaker
from arft_fast.tools.search import Passage, SearchBackend, normalise
from arft_fast.tools.search_store import SearchStore
from arft_fast.tools.tool import InfraFault

_TTL_JITTER = 0.1
_POLL_S = 0.05  # between looks at what another process fetches
Value = TypeVar("Value")


class CachedSearch:
    """``backend`` with a cache in the file ``path``. Owns the backend: ``close`` closes it.

    Args:
        path: file of ``search_store``; ranks of one machine share it, and so may runs.
        ttl_s: how long an answer is good, give or take a tenth, so that answers do not all run out together.
        lease_s: bound on one fetch, waiting for the rate limit included; after it another process may fetch.
        rate_per_s: calls of the backend by all processes; None = no limit.
        burst: calls that may come at once after a quiet time.
        longest_wait_s: for the rate limit; a call that would wait longer is a fault.
        budget: paid calls of ``run`` by all processes; None = no limit. A call that failed counts, its repetitions by
            the HTTP client do not.
        run: name of the run, which the budget belongs to.
        faults, cooldown_s: see ``CircuitBreaker``.

    Raises:
        ValueError: a setting is out of range, or the file cannot be used.
    """

    def __init__(
        self,
        backend: SearchBackend,
        path: str | Path,
        *,
        ttl_s: float = 30 * 86400.0,
        lease_s: float = 90.0,
        rate_per_s: float | None = None,
        burst: float = 1.0,
        longest_wait_s: float = 30.0,
        budget: int | None = None,
        run: str = "",
        faults: int = 5,
        cooldown_s: float = 30.0,
    ) -> None:
        for name, value in (("ttl_s", ttl_s), ("lease_s", lease_s), ("rate_per_s", rate_per_s)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not burst >= 1:
            raise ValueError(f"burst must be at least 1, got {burst}")
        if budget is not None and (budget < 0 or not run):
            raise ValueError(f"budget must not be negative and needs the name of the run, got {budget}, run {run!r}")
        if not 0 <= longest_wait_s < lease_s:
            raise ValueError(f"longest_wait_s must be from 0 to below lease_s = {lease_s:g}, got {longest_wait_s}")
        self.name = backend.name
        self.paid = backend.paid
        self._backend = backend
        self._ttl_s = ttl_s
        self._lease_s = lease_s
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._longest_wait_s = longest_wait_s
        self._budget = budget
        self._run = run
        self._breaker = CircuitBreaker(backend.name, faults=faults, cooldown_s=cooldown_s)
        self._store = SearchStore(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search-cache")  # the store is for one thread
        self._flights: dict[bytes, asyncio.Task[list[Passage]]] = {}
        self._counts: Counter[str] = Counter()
        self._random = Random()  # of its own: jitter must not move the seeds of a run
        self._closed = False

    @property
    def identity(self) -> str:
        return self._backend.identity

    async def search(self, query: str, top_k: int) -> list[Passage]:
        """See ``SearchBackend.search``. A caller that is cancelled leaves the fetch to the others, and to the cache.

        Raises:
            InfraFault: the backend failed; the breaker is open; the rate limit, the budget or the lease is used up; the
                file cannot be used.
        """
        if self._closed:
            raise InfraFault(f"the cache of {self.name} is closed")
        self._counts["calls"] += 1
        key = _key(self.identity, query, top_k)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = asyncio.create_task(self._answer(key, query, top_k), name="search")
            flight.add_done_callback(lambda task: self._landed(key, task))
        else:
            self._counts["shared"] += 1
        await asyncio.wait([flight])
        if flight.cancelled():
            raise InfraFault(f"the cache of {self.name} was closed during a search")
        return list(flight.result())

    async def start(self) -> str:
        """Start the backend; the line tells of the cache.

        Raises:
            InfraFault: see the backend's ``start``.
        """
        line = f"{await self._backend.start()}, cache in {self._store.path.name}"
        if self._store.set_aside:
            line += f" (damaged, set aside as {self._store.set_aside[-1].name}, begun anew)"
        return line

    async def close(self) -> None:
        """End the fetches under way and release everything. Idempotent."""
        self._closed = True
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        await self._backend.close()
        await asyncio.to_thread(self._thread.shutdown)
        self._store.close()

    def counters(self) -> Mapping[str, int]:
        """``calls``: ``shared`` ones joined another's in this process, of the others each is one of ``hits`` (on disk),
        ``fetched`` or ``faults``. Also ``paid`` calls, ``cache_faults``, and what the backend counts."""
        names = ("calls", "hits", "shared", "fetched", "faults", "paid", "cache_faults")
        return {**{name: self._counts[name] for name in names}, **self._backend.counters()}

    def _landed(self, key: bytes, flight: asyncio.Task[list[Passage]]) -> None:
        del self._flights[key]
        if not flight.cancelled() and flight.exception() is not None:
            self._counts["faults"] += 1

    async def _answer(self, key: bytes, query: str, top_k: int) -> list[Passage]:
        stored = await self._in_thread(lambda: self._store.answer(key))
        if stored is None:
            owner = uuid.uuid4().hex
            try:
                stored = await self._stored_or_claimed(key, owner)
                if stored is None:
                    return await self._fetch_and_store(key, query, top_k)
            finally:
                await self._try_to(lambda: self._store.release(key, owner))
        self._counts["hits"] += 1
        return stored

    async def _stored_or_claimed(self, key: bytes, owner: str) -> list[Passage] | None:
        """The answer that another process has stored meanwhile, or None when ``owner`` has claimed to fetch it."""
        give_up = time.monotonic() + self._lease_s
        while True:
            claimed = await self._in_thread(lambda: self._store.claim(key, owner, self._lease_s))
            stored = await self._in_thread(lambda: self._store.answer(key))  # after the claim: it may have just come
            if claimed or stored is not None:
                return stored
            if time.monotonic() > give_up:
                raise InfraFault(f"another process has been asking {self.name} for lease_s = {self._lease_s:g}")
            await asyncio.sleep(self._random.uniform(0.5, 1.5) * _POLL_S)

    async def _fetch_and_store(self, key: bytes, query: str, top_k: int) -> list[Passage]:
        try:
            async with asyncio.timeout(self._lease_s):
                passages = await self._fetch(query, top_k)
        except TimeoutError as error:
            raise InfraFault(f"{self.name} gave no answer within lease_s = {self._lease_s:g}") from error
        self._counts["fetched"] += 1
        ttl_s = self._ttl_s * self._random.uniform(1 - _TTL_JITTER, 1 + _TTL_JITTER)
        await self._try_to(lambda: self._store.put(key, passages, ttl_s))
        return passages

    async def _fetch(self, query: str, top_k: int) -> list[Passage]:
        self._breaker.check()  # before anything is reserved or spent
        await self._wait_for_turn()
        self._breaker.check()
        await self._spend()
        with self._breaker.guard():
            return (await self._backend.search(query, top_k))[:top_k]

    async def _wait_for_turn(self) -> None:
        rate_per_s = self._rate_per_s
        if rate_per_s is None:
            return
        wait_s = await self._in_thread(
            lambda: self._store.reserve(self.identity, rate_per_s, self._burst, self._longest_wait_s)
        )
        if wait_s is None:
            limit = f"rate_per_s = {rate_per_s:g} leaves no turn within longest_wait_s = {self._longest_wait_s:g}"
            raise InfraFault(f"{self.name}: {limit}; raise the rate, or lower the rollouts in flight")
        await asyncio.sleep(wait_s)

    async def _spend(self) -> None:
        if not self.paid:
            return
        budget = self._budget
        if budget is not None and not await self._in_thread(lambda: self._store.spend(self._run, budget)):
            raise InfraFault(f"{self.name}: the budget of {budget} paid calls a run is used up; raise it, or replay")
        self._counts["paid"] += 1

    async def _in_thread(self, work: Callable[[], Value]) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _try_to(self, work: Callable[[], object]) -> None:
        """Write to the cache; an answer that is there already is not lost to a full disk."""
        try:
            await self._in_thread(work)
        except InfraFault as fault:
            self._counts["cache_faults"] += 1
            logging.getLogger(__name__).warning("%s", fault)


def _key(identity: str, query: str, top_k: int) -> bytes:
    asked = json.dumps([identity, normalise(query), top_k])  # ASCII, whatever the query holds
    return hashlib.sha256(asked.encode()).digest()
