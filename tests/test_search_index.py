"""The local index: any text is a query, answers are deterministic, faults are told apart."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arft_fast.tools.search_index import MAX_TERMS, Passage, SearchIndex, build_index, match_expression
from arft_fast.tools.tool import InfraFault

PASSAGES = [
    ("Eiffel Tower", "The Eiffel Tower stands in Paris."),
    ("Louvre", "The Louvre is a museum\nin Paris,   France."),
    ("Café Zürich", "A café in Barcelona."),
    ("Twin A", "zebra crossing"),
    ("Twin B", "zebra crossing"),
    ("Twin C", "zebra crossing"),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "passages.sqlite"
    build_index(path, PASSAGES)
    return path


@pytest.fixture
def index(path: Path) -> Iterator[SearchIndex]:
    index = SearchIndex(path)
    yield index
    index.close()


def test_the_best_passage_comes_first(index: SearchIndex) -> None:
    assert index.search("Where is the Eiffel tower?")[0] == Passage(*PASSAGES[0])


def test_titles_are_searched(index: SearchIndex) -> None:
    assert index.search("twin b")[0].title == "Twin B"


def test_equal_scores_come_in_order_of_insertion(index: SearchIndex) -> None:
    assert [passage.title for passage in index.search("zebra")] == ["Twin A", "Twin B", "Twin C"]


def test_top_k_bounds_the_answer(path: Path) -> None:
    index = SearchIndex(path, top_k=2)
    assert (len(index.search("zebra")), len(index.search("zebra", 1))) == (2, 1)
    index.close()


def test_accents_and_case_do_not_matter(index: SearchIndex) -> None:
    assert index.search("CAFE zurich")[0].title == "Café Zürich"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(query=st.text(st.characters(codec=None)) | st.text(alphabet="\"*:^(){}[]+-_\\,\0' ORANDNEAR"))
def test_any_text_is_a_query(index: SearchIndex, query: str) -> None:
    assert len(index.search(query)) <= 3


@pytest.mark.parametrize(
    "query",
    ['" OR zebra', "title:zebra", "zeb*", "NOT eiffel", "zebra NEAR crossing", "^zebra", "-zebra", "{title} : a"],
)
def test_query_syntax_is_only_words(index: SearchIndex, query: str) -> None:
    words = match_expression(query).split(" OR ")
    assert all(word[0] == word[-1] == '"' and word[1:-1].isalnum() for word in words)
    assert all(
        any(word.strip('"') in f"{p.title} {p.text}".lower().split() for word in words) for p in index.search(query)
    )


def test_a_prefix_star_does_not_widen_the_search(index: SearchIndex) -> None:
    assert index.search("zeb*") == []


def test_long_queries_are_cut() -> None:
    words = match_expression(" ".join(f"w{i}" for i in range(10_000))).split(" OR ")
    assert words == [f'"w{i}"' for i in range(MAX_TERMS)]


@pytest.mark.parametrize("query", ["", "  \n", "?!", '"""', "quetzalcoatl"])
def test_nothing_is_found_without_a_word_that_matches(index: SearchIndex, query: str) -> None:
    assert index.search(query) == []


def test_many_threads_get_the_same_answer(index: SearchIndex) -> None:
    queries = ["eiffel", "zebra", "cafe", "paris"] * 50
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(index.search, queries)) == [index.search(query) for query in queries]


def test_a_missing_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.sqlite does not exist; write it with build_index"):
        SearchIndex(tmp_path / "nowhere.sqlite")
    assert not (tmp_path / "nowhere.sqlite").exists()


def test_another_database_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE passages (title, text)")
    with pytest.raises(ValueError, match=r"other\.sqlite was not written by this version of build_index"):
        SearchIndex(other)


@pytest.mark.parametrize("content", [b"", b"not a database at all, just text" * 100])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.sqlite").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.sqlite"):
        SearchIndex(tmp_path / "broken.sqlite")


def test_a_file_that_breaks_later_is_an_infra_fault(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    build_index(path, [(f"t{i}", f"common word{i} " * 50) for i in range(2000)])
    index = SearchIndex(path)
    with open(path, "r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * (path.stat().st_size - 8192))
    with pytest.raises(InfraFault, match=r"index\.sqlite failed"):
        index.search("common word7")
    index.close()


def test_a_slow_query_is_an_infra_fault(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    build_index(path, [("", "common " * 20) for _ in range(5000)])
    index = SearchIndex(path, timeout_s=1e-6)
    with pytest.raises(InfraFault, match="longer than timeout_s"):
        index.search("common")
    index.close()


def test_a_failed_build_leaves_the_old_index(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    build_index(path, [("old", "first")])
    with pytest.raises(ValueError, match=r"passages\[1\] \('empty'\) has no text"):
        build_index(path, [("new", "second"), ("empty", " ")])
    with pytest.raises(ValueError, match="passages is empty"):
        build_index(path, [])
    assert [entry.name for entry in tmp_path.iterdir()] == ["index.sqlite"]
    index = SearchIndex(path)
    assert index.search("first") == [Passage("old", "first")]
    index.close()


def test_a_rebuild_does_not_disturb_an_open_index(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    build_index(path, [("old", "first")])
    old = SearchIndex(path)
    build_index(path, [("new", "second")])
    new = SearchIndex(path)
    assert (old.search("first"), new.search("first")) == ([Passage("old", "first")], [])
    old.close()
    new.close()


def test_paths_with_uri_characters_work(tmp_path: Path) -> None:
    path = tmp_path / "a b?mode=rw#%41.sqlite"
    build_index(path, PASSAGES)
    index = SearchIndex(path)
    assert index.search("zebra")
    index.close()


def test_a_closed_index_says_so(path: Path) -> None:
    index = SearchIndex(path)
    index.search("zebra")
    index.close()
    index.close()
    with pytest.raises(InfraFault, match="closed"):
        index.search("zebra")


def test_another_content_has_another_identity(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    build_index(path, [("", "first")])
    first = SearchIndex(path).identity
    assert SearchIndex(path).identity == first
    build_index(path, [("", "second")])
    assert SearchIndex(path).identity != first


def test_a_word_of_most_passages_is_left_out_beside_a_rarer_one(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    build_index(path, ((f"t{i}", f"the{' of' * (i % 4 > 0)} thing{i % 50}") for i in range(2500)))
    index = SearchIndex(path)
    assert [passage.title for passage in index.search("the thing7 t7", 2)] == ["t7", "t57"]
    assert index.search("THE thing7") == index.search("thing7")
    assert len(index.search("the of", 3)) == 3  # of common words the rarest stays
    assert match_expression("the of", {"the": 2500, "of": 1875}) == '"of"'
    index.close()


def test_no_word_is_common_in_a_small_index(path: Path) -> None:
    assert SearchIndex(path).search("the", 1)  # in a third of the passages


@pytest.mark.parametrize("setting", [{"top_k": 0}, {"timeout_s": 0.0}])
def test_a_bad_setting_is_named(path: Path, setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        SearchIndex(path, **setting)  # type: ignore[arg-type]
