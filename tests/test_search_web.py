"""Searches over HTTP: both services' shapes, every fault an ``InfraFault``, and a key that shows nowhere."""

from __future__ import annotations

import asyncio
import logging
import pickle
import traceback
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from arft_fast.tools.http_client import HttpClient
from arft_fast.tools.replay import RecordedSearch
from arft_fast.tools.search import Passage, Search, SearchBackend
from arft_fast.tools.search_cache import CachedSearch
from arft_fast.tools.search_web import RetrievalServer, Serper
from arft_fast.tools.tool import InfraFault

from .fault_server import KEY, FaultServer, fault_server

FOUND = [Passage("Eiffel Tower", "It stands in Paris.")]
EVERY_FAULT = (
    "unauthorized forbidden bad_request leak_in_error fails much_later drip drip_headers silent html truncated_json "
    "cut_off wrong_json wrong_organic deep_json huge_number big endless bomb broken_gzip short_gzip brotli to_private "
    "to_itself to_good to_file reset"
).split()

Value = TypeVar("Value")


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with fault_server() as server:
        yield server


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERPER_API_KEY", KEY)


def client() -> HttpClient:
    return HttpClient(deadline_s=0.5, attempts=2, pause_s=0.02)


def run(backend: SearchBackend, work: Callable[[SearchBackend], Awaitable[Value]]) -> Value:
    async def inner() -> Value:
        try:
            return await work(backend)
        finally:
            await backend.close()

    return asyncio.run(inner())


def ask(backend: SearchBackend, query: str = "tower", top_k: int = 3) -> list[Passage]:
    return run(backend, lambda backend: backend.search(query, top_k))


def serper(server: FaultServer, fault: str) -> Serper:
    return Serper(url=server.url(fault), client=client())


def test_serpers_snippets_are_the_passages(server: FaultServer) -> None:
    assert ask(serper(server, "good")) == FOUND
    assert server.last_headers["X-API-KEY"] == KEY


@pytest.mark.parametrize("path", ["empty", "half_character"])
def test_odd_answers_are_answers(server: FaultServer, path: str) -> None:
    found = ask(serper(server, path))
    assert found == {"empty": [], "half_character": [Passage("a?", "b?c")]}[path]


def test_a_query_of_half_characters_is_sent(server: FaultServer) -> None:
    assert ask(serper(server, "echo"), "a\ud800") == [Passage("a?", "a?")]


@pytest.mark.parametrize("path", EVERY_FAULT)
def test_every_fault_is_an_infra_fault(server: FaultServer, path: str) -> None:
    with pytest.raises(InfraFault):
        asyncio.run(Search(serper(server, path)).call("tower"))


def test_a_refused_key_names_its_variable_at_the_start(server: FaultServer) -> None:
    for path in ("unauthorized", "forbidden"):
        with pytest.raises(InfraFault, match="check the key in the environment variable SERPER_API_KEY"):
            run(serper(server, path), lambda backend: backend.start())
    assert "SERPER_API_KEY" in run(serper(server, "good"), lambda backend: backend.start())


@pytest.mark.parametrize("value", ["", "  ", "short", "two words here", "ключ-ключ-ключ", "line\nline-line"])
def test_a_key_that_cannot_be_one_is_refused_without_showing_it(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", value)
    with pytest.raises(ValueError, match="environment variable OTHER_KEY") as caught:
        Serper(key_variable="OTHER_KEY")
    assert not value.strip() or value.strip() not in str(caught.value)


def test_the_key_shows_nowhere(server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []
    for number, path in enumerate([*EVERY_FAULT, "leak", "good"]):
        backend = serper(server, path)
        cached = CachedSearch(backend, tmp_path / "cache.sqlite", budget=99, run="r", faults=99)
        recorded = RecordedSearch(cached, tmp_path / "record.jsonl", mode="record")
        tool = Search(recorded, form="readable")
        try:
            result = run(recorded, lambda _, tool=tool, number=number: tool.call(f"q{number}"))  # type: ignore[misc]
            seen += [repr(result), result.text]
        except InfraFault as fault:
            seen += ["".join(traceback.format_exception(fault)), repr(fault), str(pickle.dumps(fault.args))]
        seen += [repr(vars(each)) for each in (tool, recorded, cached, backend, backend._client)]
    seen += [record.getMessage() for record in caplog.records]
    seen += [file.read_bytes().decode("latin-1") for file in tmp_path.iterdir()]
    assert len(caplog.records) > 10 and any("your key is ***!" in text for text in seen)
    assert server.last_headers["X-API-KEY"] == KEY  # it was sent, and the search below can find it
    assert not [text for text in seen if KEY in text]


def test_a_retrieval_server_answers(server: FaultServer) -> None:
    assert ask(RetrievalServer(server.url("retrieve"), client=client()), top_k=2) == FOUND * 2
    plain = ask(RetrievalServer(server.url("retrieve_plain"), client=client()), top_k=4)
    assert plain == [Passage("A", "first"), Passage("B", "second"), Passage("", "third"), Passage("D", "x")]


@pytest.mark.parametrize("path", ["retrieve_wrong", "good", "html", "fails"])
def test_a_retrieval_server_of_another_kind_is_a_fault(server: FaultServer, path: str) -> None:
    with pytest.raises(InfraFault):
        run(RetrievalServer(server.url(path), client=client()), lambda backend: backend.start())


def test_a_url_that_is_none_is_refused() -> None:
    for url in ("localhost:8000/retrieve", "file:///etc/passwd"):
        with pytest.raises(ValueError, match="url"):
            RetrievalServer(url)
