"""The cache: one fetch for all who ask, in this process and in others; limits that all share; faults that pass."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from arft_fast.tools.circuit_breaker import CircuitBreaker
from arft_fast.tools.search import Passage
from arft_fast.tools.search_cache import CachedSearch
from arft_fast.tools.search_store import SearchStore
from arft_fast.tools.tool import InfraFault

from .fault_server import KEY, fault_server

Value = TypeVar("Value")


class Backend:
    """Answers the query, after ``seconds``; ``faults`` is how many calls fail first."""

    name, paid = "fake", True

    def __init__(self, *, faults: int = 0, seconds: float = 0.0, identity: str = "fake") -> None:
        self.faults, self.seconds, self.identity = faults, seconds, identity
        self.asked: list[str] = []

    async def search(self, query: str, top_k: int) -> list[Passage]:
        self.asked.append(query)
        await asyncio.sleep(self.seconds)
        if len(self.asked) <= self.faults:
            raise InfraFault(f"fault {len(self.asked)}")
        return [Passage("t", query)]

    async def start(self) -> str:
        return self.name

    async def close(self) -> None: ...

    def counters(self) -> Mapping[str, int]:
        return {"retries": 7}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache.sqlite"


def use(cache: CachedSearch, work: Callable[[CachedSearch], Coroutine[Any, Any, Value]]) -> Value:
    async def run() -> Value:
        try:
            return await work(cache)
        finally:
            await cache.close()

    return asyncio.run(run())


def ask(cache: CachedSearch, *queries: str, top_k: int = 3) -> list[list[Passage] | BaseException]:
    """Of all at once."""

    async def work(cache: CachedSearch) -> list[list[Passage] | BaseException]:
        return await asyncio.gather(*(cache.search(query, top_k) for query in queries), return_exceptions=True)

    return use(cache, work)


def test_an_answer_is_fetched_once_for_all_runs(file: Path) -> None:
    first, second = Backend(), Backend()
    found = ask(CachedSearch(first, file), "Eiffel Tower")
    assert ask(CachedSearch(second, file), " eiffel  tower\n") == found == [[Passage("t", "Eiffel Tower")]]
    assert (len(first.asked), len(second.asked)) == (1, 0)


def test_answers_are_kept_apart_by_query_number_and_backend(file: Path) -> None:
    ask(CachedSearch(Backend(), file), "a")
    others = [(Backend(), "b", 3), (Backend(), "a", 4), (Backend(identity="another"), "a", 3)]
    for backend, query, top_k in others:
        ask(CachedSearch(backend, file), query, top_k=top_k)
        assert len(backend.asked) == 1


def test_callers_in_flight_share_a_fetch(file: Path) -> None:
    backend = Backend(seconds=0.05)
    cache = CachedSearch(backend, file)
    assert ask(cache, *["same"] * 8, "other") == [[Passage("t", "same")]] * 8 + [[Passage("t", "other")]]
    assert sorted(backend.asked) == ["other", "same"]
    counts = cache.counters()
    assert {name: counts[name] for name in ("calls", "shared", "fetched", "paid", "hits", "faults", "retries")} == {
        "calls": 9,
        "shared": 7,
        "fetched": 2,
        "paid": 2,
        "hits": 0,
        "faults": 0,
        "retries": 7,
    }


def test_a_shared_answer_may_be_changed_by_its_caller(file: Path) -> None:
    async def work(cache: CachedSearch) -> list[Passage]:
        first, second = await asyncio.gather(cache.search("x", 3), cache.search("x", 3))
        first.clear()
        return second

    assert use(CachedSearch(Backend(seconds=0.02), file), work) == [Passage("t", "x")]


def test_faults_are_not_kept_and_reach_every_caller(file: Path) -> None:
    backend = Backend(faults=1, seconds=0.02)
    cache = CachedSearch(backend, file)

    async def work(cache: CachedSearch) -> list[Passage]:
        outcomes = await asyncio.gather(*(cache.search("x", 3) for _ in range(4)), return_exceptions=True)
        assert [str(outcome) for outcome in outcomes] == ["fault 1"] * 4
        return await cache.search("x", 3)

    assert use(cache, work) == [Passage("t", "x")]
    assert cache.counters()["faults"] == 1


def test_a_cancelled_caller_does_not_cancel_the_others(file: Path) -> None:
    backend = Backend(seconds=0.1)

    async def work(cache: CachedSearch) -> list[Passage]:
        first = asyncio.create_task(cache.search("x", 3))
        await asyncio.sleep(0.02)
        second = asyncio.create_task(cache.search("x", 3))
        await asyncio.sleep(0.02)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await second

    assert use(CachedSearch(backend, file), work) == [Passage("t", "x")]
    assert backend.asked == ["x"]


def test_closing_ends_fetches_and_gives_claims_up(file: Path) -> None:
    async def work(cache: CachedSearch) -> None:
        call = asyncio.create_task(cache.search("x", 3))
        await asyncio.sleep(0.05)
        await cache.close()
        with pytest.raises(InfraFault, match="closed"):
            await call

    use(CachedSearch(Backend(seconds=60), file), work)
    assert ask(CachedSearch(Backend(), file), "x") == [[Passage("t", "x")]]  # at once, not after the lease


def test_closing_gives_a_claim_up_that_is_just_being_made(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CachedSearch(Backend(), file)
    claim = cache._store.claim

    def slow_claim(key: bytes, owner: str, lease_s: float) -> bool:
        time.sleep(0.1)
        return claim(key, owner, lease_s)

    monkeypatch.setattr(cache._store, "claim", slow_claim)

    async def work(cache: CachedSearch) -> None:
        call = asyncio.create_task(cache.search("x", 3))
        await asyncio.sleep(0.05)
        await cache.close()
        with pytest.raises(InfraFault, match="closed"):
            await call

    use(cache, work)
    assert sqlite3.connect(file).execute("SELECT count(*) FROM claims").fetchone() == (0,)


def test_answers_run_out(tmp_path: Path) -> None:
    now = [1000.0]
    store = SearchStore(tmp_path / "store", clock=lambda: now[0])
    store.put(b"k", [Passage("a", "b")], ttl_s=10)
    assert store.answer(b"k") == [Passage("a", "b")]
    now[0] += 10
    assert store.answer(b"k") is None
    store.close()


def test_a_claim_ends_with_its_lease(tmp_path: Path) -> None:
    now = [1000.0]
    store = SearchStore(tmp_path / "store", clock=lambda: now[0])
    assert store.claim(b"k", "one", 10) and not store.claim(b"k", "two", 10)
    store.release(b"k", "two")  # not its own
    assert not store.claim(b"k", "two", 10)
    now[0] += 10
    assert store.claim(b"k", "two", 10)
    store.release(b"k", "one")  # late, and no longer its own
    assert not store.claim(b"k", "one", 10)
    store.close()


def test_a_fetch_ends_with_its_lease(file: Path) -> None:
    (outcome,) = ask(CachedSearch(Backend(seconds=60), file, lease_s=0.1, longest_wait_s=0), "x")
    assert isinstance(outcome, InfraFault) and "lease_s = 0.1" in str(outcome)


def test_a_rate_limit_gives_turns_in_order(tmp_path: Path) -> None:
    now = [1000.0]
    store = SearchStore(tmp_path / "store", clock=lambda: now[0])
    waits = [store.reserve("b", 2.0, 3.0, 1.0) for _ in range(6)]
    assert waits == [0.0, 0.0, 0.0, 0.5, 1.0, None]  # a burst of three, then two a second; the last would wait too long
    now[0] += 1.0
    assert store.reserve("b", 2.0, 3.0, 1.0) == 0.5  # the refused one has taken no turn
    now[0] -= 500.0  # a clock that is set back must not stop everything
    assert store.reserve("b", 2.0, 3.0, 1.0) == 1.0
    now[0] += 2.0
    assert store.reserve("b", 2.0, 3.0, 1.0) == 0.0
    store.close()


def test_beyond_the_rate_limit_is_a_fault_that_says_so(file: Path) -> None:
    backend = Backend()
    outcomes = ask(CachedSearch(backend, file, rate_per_s=1.0, longest_wait_s=0.1), "a", "b")
    faults = [str(outcome) for outcome in outcomes if isinstance(outcome, InfraFault)]
    assert len(backend.asked) == len(faults) == 1 and "rate_per_s = 1" in faults[0]


def test_the_budget_of_a_run_is_kept_and_named(file: Path) -> None:
    first = Backend()
    outcomes = ask(CachedSearch(first, file, budget=2, run="one"), "a", "b", "c")
    faults = [str(outcome) for outcome in outcomes if isinstance(outcome, InfraFault)]
    assert len(first.asked) == 2 and len(faults) == 1 and "budget of 2 paid calls" in faults[0]
    assert isinstance(ask(CachedSearch(Backend(), file, budget=2, run="one"), "d")[0], InfraFault)  # resumed
    assert ask(CachedSearch(Backend(), file, budget=2, run="two"), "d") == [[Passage("t", "d")]]
    assert ask(CachedSearch(Backend(), file, budget=0, run="three"), "d") == [[Passage("t", "d")]]  # stored: free


def test_a_failing_backend_is_left_alone_and_tried_again(file: Path) -> None:
    backend = Backend(faults=3)

    async def work(cache: CachedSearch) -> list[Passage]:
        for word in ("a", "b"):
            with pytest.raises(InfraFault, match=r"^fault"):
                await cache.search(word, 3)
        with pytest.raises(InfraFault, match=r"fake failed 2 times in a row, left alone .*: fault 2"):
            await cache.search("c", 3)
        assert len(backend.asked) == 2
        await asyncio.sleep(0.1)
        with pytest.raises(InfraFault, match=r"^fault 3"):
            await cache.search("d", 3)
        with pytest.raises(InfraFault, match="left alone"):
            await cache.search("e", 3)
        await asyncio.sleep(0.1)
        return await cache.search("f", 3)

    assert use(CachedSearch(backend, file, faults=2, cooldown_s=0.08), work) == [Passage("t", "f")]


def test_a_breaker_lets_one_call_try_at_a_time() -> None:
    now = [0.0]
    breaker = CircuitBreaker("s", faults=1, cooldown_s=10, clock=lambda: now[0])
    with pytest.raises(InfraFault), breaker.guard():
        raise InfraFault("x")
    now[0] = 10.0
    with pytest.raises(asyncio.CancelledError), breaker.guard():
        with pytest.raises(InfraFault, match="until the call that tries it is back"):
            breaker.check()
        raise asyncio.CancelledError  # says nothing about the service
    with breaker.guard():
        pass
    breaker.check()


@pytest.mark.parametrize("damage", [b"not a database at all" * 500, b"SQLite format 3\0" + b"\xff" * 8000])
def test_a_damaged_file_is_set_aside(file: Path, damage: bytes) -> None:
    file.write_bytes(damage)
    cache = CachedSearch(Backend(), file)
    line = use(cache, lambda cache: cache.start())
    (aside,) = [each for each in file.parent.iterdir() if ".damaged-" in each.name]
    assert aside.read_bytes() == damage and f"set aside as {aside.name}" in line
    assert ask(CachedSearch(Backend(), file), "x") == [[Passage("t", "x")]]


def test_a_file_that_breaks_during_the_run_is_set_aside(file: Path) -> None:
    one, two = SearchStore(file), SearchStore(file)
    for i in range(2000):
        one.put(i.to_bytes(32), [Passage("t", "x" * 50)], 1000)
    one.close()
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    two.close()
    with open(file, "r+b") as stream:
        stream.seek(4096)
        stream.write(b"\xff" * (file.stat().st_size - 4096))
    assert one.answer((77).to_bytes(32)) is None and one.set_aside
    one.put(b"k", [Passage("a", "b")], 1000)
    assert two.answer(b"k") == [Passage("a", "b")] and not two.set_aside
    one.close()
    two.close()


def test_a_file_that_cannot_be_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its folder does not exist"):
        CachedSearch(Backend(), tmp_path / "nowhere" / "cache")
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE precious (x)")
    with pytest.raises(ValueError, match="database of something else"):
        CachedSearch(Backend(), other)
    assert sqlite3.connect(other).execute("SELECT count(*) FROM precious").fetchone() == (0,)


def test_an_answer_that_cannot_be_stored_is_still_given(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CachedSearch(Backend(), file)

    def full(*_: object) -> None:
        raise InfraFault("disk full")

    monkeypatch.setattr(cache._store, "put", full)
    assert ask(cache, "x") == [[Passage("t", "x")]]
    assert cache.counters()["cache_faults"] == 1


@pytest.mark.parametrize(
    "setting",
    [{"ttl_s": 0}, {"lease_s": -1}, {"rate_per_s": 0}, {"burst": 0}, {"budget": 5}, {"longest_wait_s": 90}],
)
def test_a_bad_setting_is_named(file: Path, setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        CachedSearch(Backend(), file, **setting)  # type: ignore[arg-type]


RANK = """
import asyncio, json, sys, time
from arft_fast.tools.search_cache import CachedSearch
from arft_fast.tools.search_web import Serper
url, file, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
async def main():
    cache = CachedSearch(Serper(url=url), file, **settings)
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.monotonic()
    found = await asyncio.gather(*(cache.search(f"q{i}", 3) for i in range(6)), return_exceptions=True)
    await cache.close()
    kinds = sorted({type(each).__name__ for each in found})
    print(json.dumps({**cache.counters(), "seconds": time.monotonic() - started, "kinds": kinds}))
asyncio.run(main())
"""


def two_ranks(url: str, file: Path, **settings: object) -> list[dict[str, Any]]:
    """What two processes counted that asked the same six questions at the same time."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, url, str(file), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"SERPER_API_KEY": KEY, "PYTHONPATH": ""},
        )
        for _ in range(2)
    ]
    try:
        for rank in ranks:
            assert rank.stdout and rank.stdout.readline() == "ready\n"
        for rank in ranks:
            assert rank.stdin
            rank.stdin.write("go\n")
            rank.stdin.flush()
        return [json.loads(rank.communicate(timeout=60)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def test_two_processes_pay_once_and_share_the_rate(file: Path) -> None:
    with fault_server() as server:
        one, two = two_ranks(server.url("slow_good"), file, rate_per_s=5.0, burst=1.0)
        assert server.served["slow_good"] == one["paid"] + two["paid"] == 6
    assert one["hits"] + two["hits"] == 6 and one["kinds"] == two["kinds"] == ["list"]
    assert max(one["seconds"], two["seconds"]) > 0.95  # six calls at five a second, the first at once


def test_two_processes_share_the_budget(file: Path) -> None:
    with fault_server() as server:
        one, two = two_ranks(server.url("good"), file, budget=4, run="r")
        assert server.served["good"] == one["paid"] + two["paid"] == 4
    assert {"InfraFault", "list"} >= {*one["kinds"], *two["kinds"]}


def test_a_killed_process_blocks_nobody_for_longer_than_its_lease(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SearchStore(file)
    backend, started = Backend(), time.monotonic()
    cache = CachedSearch(backend, file)
    claim = cache._store.claim
    key: list[bytes] = []

    def claimed_before(asked: bytes, owner: str, lease_s: float) -> bool:
        if not key:
            key.append(asked)
            store.claim(asked, "killed", 0.3)
        return claim(asked, owner, lease_s)

    monkeypatch.setattr(cache._store, "claim", claimed_before)
    assert ask(cache, "x") == [[Passage("t", "x")]]
    assert 0.3 <= time.monotonic() - started < 3
    store.close()
