"""Record and replay: the same answers again, offline."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from random import Random

import pytest

from arft_fast.tasks.mini_corpus import corpus_passages
from arft_fast.tasks.mini_search import MiniSearch
from arft_fast.tools.replay import RecordedSearch
from arft_fast.tools.search import Passage, Search, SearchBackend
from arft_fast.tools.search_index import SearchIndex, build_index
from arft_fast.tools.search_local import LocalSearch
from arft_fast.tools.tool import InfraFault


class Drifting:
    """Never answers the same twice."""

    name, identity, paid = "drifting", "drifting", True

    def __init__(self, fails: bool = False) -> None:
        self.asked, self.started, self.fails = 0, False, fails

    async def search(self, query: str, top_k: int) -> list[Passage]:
        self.asked += 1
        await asyncio.sleep(0.01)
        if self.fails:
            raise InfraFault("down")
        return [Passage("a\ud800", f"{query} {self.asked} </information>\u2028")]

    async def start(self) -> str:
        self.started = True
        return self.name

    async def close(self) -> None: ...

    def counters(self) -> Mapping[str, int]:
        return {"retries": 0}


def ask(backend: SearchBackend, *queries: str, top_k: int = 3) -> list[list[Passage]]:
    async def run() -> list[list[Passage]]:
        try:
            return await asyncio.gather(*(backend.search(query, top_k) for query in queries))
        finally:
            await backend.close()

    return asyncio.run(run())


def test_a_replay_repeats_the_recording_without_the_backend(tmp_path: Path) -> None:
    file, backend = tmp_path / "run.jsonl", Drifting()
    found = ask(RecordedSearch(backend, file, mode="record"), "a", "b", "A ", "b")
    asked = backend.asked
    replay = RecordedSearch(backend, file, mode="replay")
    assert "2 answers in run.jsonl" in asyncio.run(replay.start())
    assert ask(replay, "a", "b", "A ", "b") == found == [found[0], found[1], found[0], found[1]]
    assert (backend.asked, backend.started, replay.paid, replay.counters()) == (asked, False, False, {"replayed": 4})
    assert ask(RecordedSearch(None, file, mode="replay"), "b") == [found[1]]


@pytest.mark.parametrize(("query", "top_k"), [("c", 3), ("a", 4)])
def test_a_query_that_was_not_recorded_is_named(tmp_path: Path, query: str, top_k: int) -> None:
    file = tmp_path / "run.jsonl"
    ask(RecordedSearch(Drifting(), file, mode="record"), "a")
    with pytest.raises(InfraFault, match=rf"holds no answer to '{query}' with top_k = {top_k}"):
        ask(RecordedSearch(None, file, mode="replay"), query, top_k=top_k)


def test_a_recording_is_continued(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    (first,) = ask(RecordedSearch(Drifting(), file, mode="record"), "a")
    backend = Drifting()
    assert ask(RecordedSearch(backend, file, mode="record"), "a", "b")[0] == first and backend.asked == 1
    assert len(file.read_text().splitlines()) == 2


def test_faults_are_not_recorded(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    recorder = RecordedSearch(Drifting(fails=True), file, mode="record")
    for _ in range(2):  # on two event loops: nothing of the first may be left
        with pytest.raises(InfraFault, match="down"):
            ask(recorder, "a", "a")
    assert file.read_bytes() == b""


def test_a_half_written_line_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    found = ask(RecordedSearch(Drifting(), file, mode="record"), "a")
    with open(file, "a") as stream:
        stream.write('{"query": "b", "top')
    assert ask(RecordedSearch(None, file, mode="replay"), "a") == found
    ask(RecordedSearch(Drifting(), file, mode="record"), "c")
    assert len(RecordedSearch(None, file, mode="replay")._answers) == 2


@pytest.mark.parametrize("line", ["{}", "nonsense", '{"query": "b", "top_k": 3, "passages": [[1]]}', "[" * 100_000])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "run.jsonl"
    ask(RecordedSearch(Drifting(), file, mode="record"), "a")
    with open(file, "a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ValueError, match=r"run\.jsonl, line 2"):
        RecordedSearch(None, file, mode="replay")


def test_a_setting_that_makes_no_sense_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="backend is None"):
        RecordedSearch(None, tmp_path / "x", mode="record")
    with pytest.raises(ValueError, match="cannot be opened"):
        RecordedSearch(None, tmp_path / "x", mode="replay")
    with pytest.raises(ValueError, match="mode"):
        RecordedSearch(None, tmp_path / "x", mode="again")  # type: ignore[arg-type]


def test_episodes_of_mini_search_are_the_same_offline(tmp_path: Path) -> None:
    path = tmp_path / "mini.sqlite"
    build_index(path, corpus_passages())
    index, file = SearchIndex(path), tmp_path / "run.jsonl"

    def observations(search: Search) -> list[str]:
        task = MiniSearch(index, search=search)
        prompts = [task.train_prompt(i) for i in range(12)]
        queries = [turns[0].text for turns in (task.demonstrate(prompt, Random(0)) for prompt in prompts)]

        async def run() -> list[str]:
            results = [await task.tools["search"].call(query) for query in queries]
            await search.close()
            return [result.text for result in results]

        return asyncio.run(run())

    live = observations(Search(RecordedSearch(LocalSearch(SearchIndex(path)), file, mode="record"), top_k=1))
    path.unlink()
    offline = observations(Search(RecordedSearch(None, file, mode="replay"), top_k=1))
    assert offline == live and len(set(live)) > 6
    index.close()
